"""Headers of safetensors files, read and made: which tensors a folder holds, without touching their bytes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pact_nemo.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
_SINGLE_NAME = "model.safetensors"


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of a safetensors file: its dtype as the format spells it (``BF16``), its shape, its file's name and its bytes' place there."""

    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    end: int


def read_tensors(folder: str | Path) -> dict[str, TensorEntry]:
    """Every tensor of a Hugging Face folder, by file and then by place: those of the index where there is one, else of ``model.safetensors``,
    else of all safetensors files.

    Raises:
        CheckpointError: there are none, or a file is no safetensors file; the message names it.
    """
    base = Path(folder)
    found: dict[str, TensorEntry] = {}
    for path in _weight_files(base):
        try:
            with open(path, "rb") as handle:
                length = int.from_bytes(handle.read(8), "little")
                header: dict[str, Any] = json.loads(handle.read(length))
            rows = sorted(((e["data_offsets"], name, e) for name, e in header.items() if name != "__metadata__"), key=lambda row: row[:2])
            for (start, end), name, entry in rows:
                found[name] = TensorEntry(str(entry["dtype"]), tuple(entry["shape"]), path.name, 8 + length + start, 8 + length + end)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, MemoryError, OverflowError) as error:
            raise CheckpointError(f"{path} is no safetensors file ({error!r}); export it again") from error
    if not found:
        raise CheckpointError(f"{base} holds no *.safetensors file; weights are read in that format only")
    return found


def _weight_files(base: Path) -> list[Path]:
    index = base / INDEX_NAME
    if index.is_file():
        try:
            return [base / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} can't be read ({error!r}); export that folder again") from error
    if (base / _SINGLE_NAME).is_file():
        return [base / _SINGLE_NAME]
    return sorted(base.glob("*.safetensors"))


def make_header(tensors: list[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    """First bytes of a safetensors file whose tensors follow in this order: (name, dtype, shape, bytes)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape, size in tensors:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants its data aligned
    return len(text).to_bytes(8, "little") + text
