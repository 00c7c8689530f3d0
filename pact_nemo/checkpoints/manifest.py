"""Versioned HF export folders and the manifest that says a folder is whole.

An export root holds ``v000000``, ``v000001``, …: one Hugging Face model folder a version. A folder is written under a temporary name and
becomes visible in one rename, with ``manifest.json`` as the last file in it: size and BLAKE3 digest of every other file. A reader verifies the
manifest before it lets the weights near a server or a trainer, so a torn, truncated or bit-flipped export is refused with the file's name.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pact_nemo.errors import CheckpointError
from pact_nemo.files import digest_file, new_directory, write_json_atomic

MANIFEST_NAME = "manifest.json"
MANIFEST_SCHEMA = 2
DIGESTS = {1: "sha256", 2: "blake3"}  # by schema; the older one is still read
_VERSION_FOLDER = re.compile(r"v(\d{6,})")
_HASHING_THREADS = 4  # hashlib releases the GIL; sharded exports hash in parallel
_REMEDY = "delete the folder and export that version again (or point at an intact one)"


@dataclass(frozen=True)
class FileEntry:
    """One file of an export: size in bytes and hex digest of its content."""

    size: int
    digest: str

    @classmethod
    def of(cls, path: str | Path, algorithm: str = DIGESTS[MANIFEST_SCHEMA]) -> FileEntry:
        """Of a file as it is."""
        return cls(Path(path).stat().st_size, digest_file(path, algorithm))


@dataclass(frozen=True)
class Manifest:
    """What an export folder must contain.

    Attributes:
        version: weight version, a non-negative integer that grows by one with each export (the optimizer step in training).
        files: path relative to the folder (forward slashes) -> entry; every file of the folder but the manifest.
        extra: free facts of the writer (step, dtype, source), JSON values.
        algorithm: of the digests.
    """

    version: int
    files: dict[str, FileEntry]
    extra: dict[str, Any] = field(default_factory=dict)
    algorithm: str = DIGESTS[MANIFEST_SCHEMA]

    @property
    def total_bytes(self) -> int:
        """Size of all files together, manifest left out."""
        return sum(entry.size for entry in self.files.values())


def export_path(root: str | Path, version: int) -> Path:
    """Where version ``version`` lives: ``<root>/v{version:06d}``."""
    if version < 0:
        raise CheckpointError(f"export version {version} is negative; versions count from 0")
    return Path(root) / f"v{version:06d}"


def versions(root: str | Path) -> list[int]:
    """All visible export versions under ``root``, ascending; empty when the root does not exist. Temporary folders don't count."""
    folder = Path(root)
    if not folder.is_dir():
        return []
    matches = (_VERSION_FOLDER.fullmatch(path.name) for path in folder.iterdir() if path.is_dir())
    return sorted(int(match.group(1)) for match in matches if match)


def latest_version(root: str | Path) -> int | None:
    """Highest visible export version, or None when there is none."""
    found = versions(root)
    return found[-1] if found else None


def write_manifest(
    folder: str | Path, version: int, extra: dict[str, Any] | None = None, known: dict[str, FileEntry] | None = None
) -> Manifest:
    """Write ``manifest.json`` for every file of ``folder``; to be called last, before the folder becomes visible.

    Args:
        known: entries of files that their writers have described already; the others are hashed here.

    Raises:
        CheckpointError: the folder holds no weights.
    """
    base = Path(folder)
    names = _data_files(base)
    if not any(name.endswith(".safetensors") for name in names):
        raise CheckpointError(f"{base} holds no *.safetensors file; write the weights before the manifest")
    files = {name: entry for name, entry in (known or {}).items() if name in names}
    rest = [name for name in names if name not in files]
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        files |= dict(zip(rest, pool.map(lambda name: FileEntry.of(base / name), rest), strict=True))
    manifest = Manifest(version, {name: files[name] for name in names}, dict(extra or {}))
    rows = {name: {"size": entry.size, manifest.algorithm: entry.digest} for name, entry in manifest.files.items()}
    write_json_atomic(base / MANIFEST_NAME, {"schema": MANIFEST_SCHEMA, "version": version, "extra": manifest.extra, "files": rows})
    return manifest


def read_manifest(folder: str | Path) -> Manifest:
    """Parse ``manifest.json`` without looking at the other files.

    Raises:
        CheckpointError: the manifest is absent, unreadable, or of another schema.
    """
    path = Path(folder) / MANIFEST_NAME
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
        if row["schema"] not in DIGESTS:
            raise CheckpointError(f"{path}: schema {row['schema']!r}, this version reads {sorted(DIGESTS)}; export again")
        algorithm = DIGESTS[row["schema"]]
        files = {str(name): FileEntry(int(entry["size"]), str(entry[algorithm])) for name, entry in row["files"].items()}
        return Manifest(int(row["version"]), files, dict(row["extra"]), algorithm)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the export is incomplete; {_REMEDY}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} can't be read ({error!r}); {_REMEDY}") from error


def verify_manifest(folder: str | Path, *, expect_version: int | None = None) -> Manifest:
    """Check every file of an export against its manifest.

    Sizes are compared first (cheap: a torn copy is found without hashing), then digests. A ``*.safetensors`` file that the manifest
    doesn't list is refused as well, because weight loaders glob for them.

    Args:
        expect_version: refuse a folder whose manifest says another version.

    Raises:
        CheckpointError: names the file concerned and the remedy.
    """
    base = Path(folder)
    if not base.is_dir():
        raise CheckpointError(f"{base} is not a folder; give the path of an export")
    manifest = read_manifest(base)
    if expect_version is not None and manifest.version != expect_version:
        raise CheckpointError(
            f"{base / MANIFEST_NAME} says version {manifest.version}, expected {expect_version}; give the folder of that version"
        )
    for name, entry in manifest.files.items():
        path = base / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; {_REMEDY}")
        size = path.stat().st_size
        if size != entry.size:
            raise CheckpointError(f"{path} has {size} bytes, the manifest says {entry.size}; {_REMEDY}")
    strays = [name for name in _data_files(base) if name.endswith(".safetensors") and name not in manifest.files]
    if strays:
        raise CheckpointError(f"{base / strays[0]} is not in the manifest, yet a weight loader would read it; remove it")
    names = list(manifest.files)
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        digests = pool.map(lambda name: digest_file(base / name, manifest.algorithm), names)
        for name, digest in zip(names, digests, strict=True):
            if digest != manifest.files[name].digest:
                raise CheckpointError(f"{base / name} is corrupt: its {manifest.algorithm} digest differs from the manifest's; {_REMEDY}")
    return manifest


@contextmanager
def new_export(root: str | Path, version: int, extra: dict[str, Any] | None = None) -> Iterator[Path]:
    """Yield a temporary folder to write an HF model into; on a clean exit it gets its manifest and becomes ``<root>/v{version:06d}``.

    Raises:
        CheckpointError: that version exists already.
    """
    try:
        with new_directory(export_path(root, version)) as folder:
            yield folder
            write_manifest(folder, version, extra)
    except FileExistsError as error:
        raise CheckpointError(f"{error}; a version is exported once") from error


def prune_exports(root: str | Path, keep: int, protect: Collection[int] = ()) -> list[int]:
    """Delete old export versions; the ``keep`` newest and the ``protect`` ones stay. Returns the versions deleted, ascending.

    Each folder is renamed out of sight before it is deleted, so no reader finds a half-deleted version.
    """
    if keep < 1:
        raise CheckpointError(f"keep={keep}: at least the newest export has to stay")
    doomed = [version for version in versions(root)[:-keep] if version not in protect]
    for version in doomed:
        folder = export_path(root, version)
        hidden = folder.with_name(f".{folder.name}.deleted")
        shutil.rmtree(hidden, ignore_errors=True)
        folder.rename(hidden)
        shutil.rmtree(hidden)
    return doomed


def _data_files(base: Path) -> list[str]:
    """Files of a folder relative to it, sorted, manifest left out."""
    paths = (path.relative_to(base).as_posix() for path in base.rglob("*") if path.is_file())
    return sorted(name for name in paths if name != MANIFEST_NAME)
