"""Writing files so that a reader sees the old one or the new one, never half of it."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

_SALT = secrets.randbelow(10**10)


def _fsync_dir(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def lock_folder(folder: Path) -> IO[str] | None:
    """Make a folder and hold its ``.lock``, until the file is closed or the process ends; None where another process
    holds it.

    Raises:
        OSError: the folder or the file can't be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = open(folder / ".lock", "w")  # noqa: SIM115 - held for longer than this call
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.close()
        return None
    return handle


def temporary_beside(target: Path) -> Path:
    """A name beside ``target`` that no other process writes to: on a shared disk, another machine's or container's has
    the same process id.
    """
    return target.with_name(f".{target.name}.{os.getpid()}{_SALT:010d}.tmp")


def write_bytes_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` to a temporary name beside ``path``, flush it to disk, then rename it over ``path``."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(target)
    try:
        with open(temporary, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):  # what went wrong first is what has to be told
            temporary.unlink(missing_ok=True)
        raise
    _fsync_dir(target.parent)


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """UTF-8 twin of :func:`write_bytes_atomic`."""
    write_bytes_atomic(path, text.encode("utf-8"))


def write_json_atomic(path: str | os.PathLike[str], value: Any) -> None:
    """Indented JSON; NaN and Inf are refused (``ValueError``) because no JSON reader agrees on them."""
    write_text_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def new_directory(final: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary sibling folder that becomes ``final`` in one rename when the block ends well, and vanishes when
    it doesn't.

    Raises:
        FileExistsError: ``final`` exists already (folders written this way are never overwritten).
    """
    target = Path(final)
    if target.exists():
        raise FileExistsError(f"{target} exists already; versioned folders are written once")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(target)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_dir():
                _fsync_dir(path)  # a file's name is in its folder, which has to reach the disk as well
            elif path.is_file():
                flush_file(path)
        _fsync_dir(temporary)
        os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _fsync_dir(target.parent)


def stays_inside(folder: str | os.PathLike[str], name: str) -> bool:
    """Whether a file's name from a manifest or the like, symbolic links followed, leads to a place below ``folder``."""
    base = Path(folder).resolve()
    try:
        fits = len(os.fsencode(name)) < 4096 and all(
            len(os.fsencode(part)) < 256 for part in Path(name).parts
        )  # longer ones are no file's name
        return bool(name) and fits and base in (base / name).resolve().parents
    except (OSError, ValueError, RuntimeError):  # a name with a NUL byte, a circle of links
        return False


def flush_file(path: str | os.PathLike[str]) -> None:
    """Wait until a written file's bytes are on the disk."""
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())


_UNFINISHED = re.compile(r"\..+\.\d+\.tmp")


def remove_unfinished(folder: str | os.PathLike[str]) -> list[Path]:
    """Delete what writers of this module that were killed left directly in ``folder``; to be called while nobody writes
    there. Returns it.
    """
    base = Path(folder)
    found = [path for path in base.iterdir() if _UNFINISHED.fullmatch(path.name)] if base.is_dir() else []
    for path in found:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()
    return found


def disk_remedy(error: OSError) -> str:
    """What to do about a disk that refused."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "make room on that disk"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "make the folder writable again (owner, mode, read-only mount)"
    return "check that disk"


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
