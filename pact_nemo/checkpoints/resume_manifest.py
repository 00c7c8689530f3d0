"""What says that a checkpoint is whole: a manifest with the size and digest of every file in it."""

from __future__ import annotations

from pathlib import Path

from pact_nemo.checkpoints.pickles import METADATA, check_weights
from pact_nemo.errors import CheckpointError
from pact_nemo.runtime import strict_json
from pact_nemo.runtime.files import sha256_file, stays_inside, write_json_atomic

MANIFEST_NAME = "manifest.json"
SCHEMA = 1
#: of a larger checkpoint, files above HASH_LIMIT are checked by size only: a resume must not read terabytes twice
HASH_TOTAL = 8 << 30
HASH_LIMIT = 16 << 20


def verify(folder: str | Path) -> None:
    """Check a checkpoint against its manifest.

    Raises:
        CheckpointError: names the file concerned and the remedy.
    """
    base = Path(folder)
    remedy = "resume from an older checkpoint (checkpoints.resume_folders.latest_complete finds it)"
    try:
        row = strict_json.loads((base / MANIFEST_NAME).read_bytes().decode("utf-8"))
        if row["schema"] != SCHEMA:
            raise CheckpointError(
                f"{base / MANIFEST_NAME}: schema {row['schema']!r}, this version reads {SCHEMA}; {remedy}"
            )
        files = {name: (int(entry["size"]), entry["sha256"]) for name, entry in row["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointError(
            f"{base / MANIFEST_NAME} is missing or unreadable ({error}): the checkpoint is incomplete; {remedy}"
        ) from error
    for name, (expected, digest) in files.items():
        if not stays_inside(base, name):
            raise CheckpointError(f"{base / MANIFEST_NAME} names {name!r}, which is not in that folder; {remedy}")
        path = base / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; {remedy}")
        size = path.stat().st_size
        if size != expected:
            raise CheckpointError(f"{path} has {size} bytes, the manifest says {expected}; {remedy}")
        if digest is not None and sha256_file(path) != digest:
            raise CheckpointError(f"{path} is corrupt: its SHA-256 differs from the manifest's; {remedy}")
    strays = sorted(
        {path.relative_to(base).as_posix() for path in base.rglob("*") if path.is_file()} - {*files, MANIFEST_NAME}
    )
    if strays:
        raise CheckpointError(
            f"{base / strays[0]} is not in the manifest: nothing unchecked is read; remove it, or {remedy}"
        )
    if (base / "weights" / METADATA).is_file():
        check_weights(base / "weights")


def write_manifest(base: Path) -> None:
    """Write the manifest of a folder that is complete but for it. Of a checkpoint of more than :data:`HASH_TOTAL`
    bytes, files above :data:`HASH_LIMIT` get no digest.
    """
    sizes = {path: path.stat().st_size for path in sorted(base.rglob("*")) if path.is_file()}
    limit = HASH_TOTAL if sum(sizes.values()) <= HASH_TOTAL else HASH_LIMIT
    files = {
        path.relative_to(base).as_posix(): {"size": size, "sha256": sha256_file(path) if size <= limit else None}
        for path, size in sizes.items()
    }
    write_json_atomic(base / MANIFEST_NAME, {"schema": SCHEMA, "files": files})
