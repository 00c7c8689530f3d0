"""What a folder's safetensors files hold, from their headers alone."""

from __future__ import annotations

import json
from pathlib import Path

from pact_nemo.errors import CheckpointError


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in a folder's safetensors files, from their headers alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with open(path, "rb") as handle:
                header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
            shapes |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is no safetensors file ({error!r}); export it again") from error
    if not shapes:
        raise CheckpointError(f"{folder} holds no *.safetensors file")
    return shapes
