"""Versioned HF export folders and the manifest that says a folder is whole.

An export root holds ``v000000``, ``v000001``, …: one Hugging Face model folder a version. A folder is written under a
temporary name and becomes visible in one rename, with ``manifest.json`` as the last file in it: size and BLAKE3 digests
of every other file. A reader verifies the manifest before it lets the weights near a server or a trainer, so a torn,
truncated or bit-flipped export is refused with the file's name.

Schema 2 digests a file in parts (:mod:`pact_nemo.runtime.digests`); schema 1, one SHA-256 a file, is still read.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pact_nemo.checkpoints.failures import delete_folder
from pact_nemo.errors import CheckpointError
from pact_nemo.runtime import strict_json
from pact_nemo.runtime.digests import FileEntry, check_files, file_entries
from pact_nemo.runtime.files import new_directory, stays_inside, write_text_atomic

logger = logging.getLogger(__name__)

MANIFEST_NAME = "manifest.json"
MANIFEST_SCHEMA = 2
_SHA256_SCHEMA = 1
_VERSION_FOLDER = re.compile(r"v(\d{6,})")
_LEFTOVER = re.compile(r"\.v\d{6,}\.(\d+\.tmp|deleted)")
_REMEDY = "delete the folder and export that version again (or point at an intact one)"


@dataclass(frozen=True)
class Manifest:
    """What an export folder must contain.

    Attributes:
        version: weight version, a non-negative integer that grows by one with each export (the optimizer step in
            training).
        files: path relative to the folder (forward slashes) -> entry; every file of the folder but the manifest.
        extra: free facts of the writer (step, dtype, source), JSON values.
    """

    version: int
    files: dict[str, FileEntry]
    extra: dict[str, Any] = field(default_factory=dict)

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
    """All visible export versions under ``root``, ascending; empty when the root does not exist. Temporary folders
    don't count.
    """
    folder = Path(root)
    if not folder.is_dir():
        return []
    matches = (_VERSION_FOLDER.fullmatch(path.name) for path in folder.iterdir() if path.is_dir())
    return sorted(int(match.group(1)) for match in matches if match)


def write_manifest(
    folder: str | Path, version: int, extra: dict[str, Any] | None = None, *, known: dict[str, FileEntry] | None = None
) -> Manifest:
    """Digest every file of ``folder`` and write ``manifest.json``; to be called last, before the folder becomes
    visible.

    Args:
        known: digests that the writers of these files know from memory; the others are read.

    Raises:
        CheckpointError: the folder holds no weights, or a known file is absent or has another size.
    """
    base, known = Path(folder), known or {}
    names = _data_files(base)
    if not any(name.endswith((".safetensors", ".distcp")) for name in names):
        raise CheckpointError(f"{base} holds no *.safetensors or *.distcp file; write the weights before the manifest")
    for name, entry in known.items():
        if name not in names or (base / name).stat().st_size != entry.size:
            raise CheckpointError(
                f"{base / name} is not the file of {entry.size} bytes that was written there; export again"
            )
    rest = [name for name in names if name not in known]
    files = known | dict(zip(rest, file_entries(base / name for name in rest), strict=True))
    manifest = Manifest(version, {name: files[name] for name in names}, dict(extra or {}))
    rows = {
        name: {"size": entry.size, "blake3": [list(part) for part in entry.parts]}
        for name, entry in manifest.files.items()
    }
    # without indentation: a large model has thousands of parts
    row = {"schema": MANIFEST_SCHEMA, "version": version, "extra": manifest.extra, "files": rows}
    write_text_atomic(base / MANIFEST_NAME, json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
    return manifest


def read_manifest(folder: str | Path) -> Manifest:
    """Parse ``manifest.json`` without looking at the other files.

    Raises:
        CheckpointError: the manifest is absent, unreadable, or of another schema.
    """
    path = Path(folder) / MANIFEST_NAME
    try:
        row = strict_json.loads(path.read_bytes().decode("utf-8"))
        if row["schema"] not in (MANIFEST_SCHEMA, _SHA256_SCHEMA):
            raise CheckpointError(
                f"{path}: schema {row['schema']!r}, this version reads {_SHA256_SCHEMA} and {MANIFEST_SCHEMA}; export"
                " again"
            )
        files = {str(name): _file_entry(entry, row["schema"]) for name, entry in row["files"].items()}
        return Manifest(int(row["version"]), files, dict(row["extra"]))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the export is incomplete; {_REMEDY}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{path} can't be read ({error!r}); {_REMEDY}") from error


def _file_entry(row: dict[str, Any], schema: int) -> FileEntry:
    size = int(row["size"])
    if schema == _SHA256_SCHEMA:
        return FileEntry(size, ((size, str(row["sha256"])),), "sha256")
    return FileEntry(size, tuple((int(end), str(digest)) for end, digest in row["blake3"]))


def verify_manifest(folder: str | Path, *, expect_version: int | None = None, digests: bool = True) -> Manifest:
    """Check every file of an export against its manifest.

    Sizes are compared first (cheap: a torn copy is found without hashing), then digests, part by part on several
    threads. A ``*.safetensors`` file that the manifest doesn't list is refused as well, because weight loaders glob for
    them.

    Args:
        expect_version: refuse a folder whose manifest says another version.
        digests: False: sizes only, where the digests were checked a moment ago.

    Raises:
        CheckpointError: names the file concerned and the remedy.
    """
    base = Path(folder)
    if not base.is_dir():
        raise CheckpointError(f"{base} is not a folder; give the path of an export")
    manifest = read_manifest(base)
    if expect_version is not None and manifest.version != expect_version:
        raise CheckpointError(
            f"{base / MANIFEST_NAME} says version {manifest.version}, expected {expect_version}; give the folder of"
            " that version"
        )
    for name, entry in manifest.files.items():
        if not stays_inside(base, name):
            raise CheckpointError(f"{base / MANIFEST_NAME} names {name!r}, which is not in that folder; {_REMEDY}")
        path = base / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; {_REMEDY}")
        size = path.stat().st_size
        if size != entry.size:
            raise CheckpointError(f"{path} has {size} bytes, the manifest says {entry.size}; {_REMEDY}")
    strays = [name for name in _data_files(base) if name.endswith(".safetensors") and name not in manifest.files]
    if strays:
        raise CheckpointError(
            f"{base / strays[0]} is not in the manifest, yet a weight loader would read it; remove it"
        )
    if digests:
        check_files(base, manifest.files, _REMEDY)
    return manifest


@contextmanager
def new_export(root: str | Path, version: int, extra: dict[str, Any] | None = None) -> Iterator[Path]:
    """Yield a temporary folder to write an HF model into; on a clean exit it gets its manifest and becomes
    ``<root>/v{version:06d}``.

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
    """Delete old export versions; the ``keep`` newest and the ``protect`` ones stay. Returns the versions deleted,
    ascending.

    Each folder is renamed out of sight before it is deleted, so no reader finds a half-deleted version. What a killed
    process left half written or half deleted goes too: to be called by the one process that exports there, between two
    exports.
    """
    if keep < 1:
        raise CheckpointError(f"keep={keep}: at least the newest export has to stay")
    if Path(root).is_dir():
        for path in [path for path in Path(root).iterdir() if _LEFTOVER.fullmatch(path.name)]:
            shutil.rmtree(path, ignore_errors=True)
    doomed = [version for version in versions(root)[:-keep] if version not in protect]
    for version in doomed:
        delete_folder(export_path(root, version), "newer exports are whole")
    return doomed


def is_current(folder: Path, version: int) -> bool:
    """Whether the export there is of this version. One of another (the run was resumed with more steps) is kept under a
    name that says so.
    """
    if not folder.exists():
        return False
    try:
        found = verify_manifest(folder).version
    except CheckpointError:
        found = None
    if found == version:
        return True
    aside = folder.with_name(f"{folder.name}-v{found:06d}" if found is not None else f"{folder.name}-damaged")
    shutil.rmtree(aside, ignore_errors=True)  # the same version of the same run, or damaged too
    folder.rename(aside)
    logger.warning("%s held another version of the weights and is now %s", folder, aside.name)
    return False


def _data_files(base: Path) -> list[str]:
    """Files of a folder relative to it, sorted, manifest left out."""
    paths = (path.relative_to(base).as_posix() for path in base.rglob("*") if path.is_file())
    return sorted(name for name in paths if name != MANIFEST_NAME)
