"""One look at an export a machine: of the processes that are about to read it there, the first hashes it, the others
wait for that and compare what the disk says of the files.

Eight workers of a server, or eight servers of a machine, read the same export at the same time; each hashing all of it
would read a large model eight times over.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pact_nemo.checkpoints.manifest import MANIFEST_NAME, Manifest, verify_manifest
from pact_nemo.runtime.files import write_text_atomic

#: How long one look holds: the processes that load an export look at it within minutes of each other.
HOLDS_S = 600.0


def verify_once(folder: str | Path, *, expect_version: int | None = None, notes: Path | None = None) -> Manifest:
    """:func:`pact_nemo.checkpoints.manifest.verify_manifest`, of whose digests one process a machine checks.

    Any change of a file since then (size, time, inode) has it hashed again, and so has a look that is older than
    :data:`HOLDS_S`.

    Args:
        notes: where the machine's processes tell each other; None: a private folder of this user, in memory where there
            is one.

    Raises:
        CheckpointError: as verify_manifest.
    """
    base = Path(folder).resolve()
    place = notes if notes is not None else _notes()
    if place is None:
        return verify_manifest(base, expect_version=expect_version)
    note = place / hashlib.sha256(str(base).encode()).hexdigest()[:32]
    with _alone(place / f"{note.name[:2]}.lock"):
        manifest = verify_manifest(base, expect_version=expect_version, digests=False)
        seen = _seen(base, manifest)
        if not _holds(note, seen):
            verify_manifest(base, expect_version=expect_version)
            if _seen(base, manifest) == seen:  # else a file changed while it was read
                with suppress(OSError):  # the others hash, too
                    write_text_atomic(note, json.dumps({"time": time.time(), "seen": seen}))
    _forget(place)
    return manifest


def _notes() -> Path | None:
    """This user's private folder for notes; None where there is none, or where somebody else could write to it."""
    root = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(tempfile.gettempdir())
    folder = root / f"pact-verified-{os.getuid()}"
    with suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077:
            return folder
    return None


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """One process at a time; the kernel lets the next one in when this one is killed."""
    with open(lock, "a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _seen(base: Path, manifest: Manifest) -> dict[str, list[int]]:
    """What the disk says of the manifest and of each of its files."""
    found = {}
    for name in (MANIFEST_NAME, *manifest.files):
        now = (base / name).stat()
        found[name] = [now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino, now.st_dev]
    return found


def _holds(note: Path, seen: dict[str, list[int]]) -> bool:
    try:
        row = json.loads(note.read_text(encoding="utf-8"))
        return bool(row["seen"] == seen and 0 <= time.time() - row["time"] < HOLDS_S)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _forget(place: Path) -> None:
    """Remove notes that hold no more. Locks stay: somebody may be waiting for one."""
    for note in place.iterdir():
        with suppress(OSError):
            if not note.suffix and time.time() - note.stat().st_mtime > HOLDS_S:
                note.unlink()
