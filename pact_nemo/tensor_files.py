"""Headers of safetensors files, read and made: which tensors a folder holds, without touching their bytes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pact_nemo import strict_json
from pact_nemo.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
_SINGLE_NAME = "model.safetensors"
_LONGEST_HEADER = 100 << 20  # bytes; the format's own limit
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")  # formats of weights that are read by running what they say


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
            size = path.stat().st_size
            with open(path, "rb") as handle:
                length = int.from_bytes(handle.read(8), "little")
                if length > min(size - 8, _LONGEST_HEADER):  # before anything of that length is asked for
                    raise ValueError(f"its header would have {length} bytes, the file has {size}")
                header: dict[str, Any] = strict_json.loads(handle.read(length).decode("utf-8"))
            rows = sorted(((e["data_offsets"], name, e) for name, e in header.items() if name != "__metadata__"), key=lambda row: row[:2])
            for (start, end), name, entry in rows:
                if not (isinstance(start, int) and isinstance(end, int) and 0 <= start <= end <= size - 8 - length):
                    raise ValueError(f"the bytes of {name} lie outside the file")
                if not all(isinstance(length, int) and length >= 0 for length in entry["shape"]):
                    raise ValueError(f"the shape of {name} is none")
                found[name] = TensorEntry(str(entry["dtype"]), tuple(entry["shape"]), path.name, 8 + length + start, 8 + length + end)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, MemoryError, OverflowError) as error:
            raise CheckpointError(f"{path} is no safetensors file ({error!r}); export it again") from error
    if not found:
        others = sorted(path.name for pattern in _PICKLED for path in base.glob(pattern))
        seen = f" but {', '.join(others[:3])}: such files can run code when they are read; convert them" if others else ""
        raise CheckpointError(f"{base} holds no *.safetensors file{seen}; weights are read in that format only, give a folder of them")
    return found


def _weight_files(base: Path) -> list[Path]:
    index = base / INDEX_NAME
    if index.is_file():
        try:
            names = sorted(set(strict_json.loads(index.read_bytes().decode("utf-8"))["weight_map"].values()))
            for name in names:
                if Path(name).name != name or not name.endswith(".safetensors"):
                    raise ValueError(f"{name!r} is no safetensors file of this folder")
            return [base / name for name in names]
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
