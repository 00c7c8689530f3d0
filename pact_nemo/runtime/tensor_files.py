"""Headers of safetensors files, read and made: which tensors a folder holds, without touching their bytes."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pact_nemo.errors import CheckpointError
from pact_nemo.runtime import strict_json

INDEX_NAME = "model.safetensors.index.json"
_SINGLE_NAME = "model.safetensors"
_LONGEST_HEADER = 100 << 20  # bytes; the format's own limit
_DIGESTED = 1 << 20  #: bytes of each tensor that a quick digest reads
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")  # formats of weights that are read by running what they say
#: bits of an element of each dtype that the format knows
_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "U16": 16,
    "I16": 16,
    "U32": 32,
    "I32": 32,
    "U64": 64,
    "I64": 64,
    "F16": 16,
    "BF16": 16,
    "F32": 32,
    "F64": 64,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
    "C64": 64,
}
#: buffers that older checkpoints hold and every reader computes anew from the configuration
_DERIVED = re.compile(r"(?:^|\.)rotary_emb\.(?:inv_freq|cos_cached|sin_cached)")


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of a safetensors file: its dtype as the format spells it (``BF16``), its shape, its file's name and its
    bytes' place there.
    """

    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    end: int


def is_derived(name: str) -> bool:
    """Whether a tensor is a rotary buffer, which is computed from the configuration and holds nothing of its own."""
    return _DERIVED.search(name) is not None


def read_tensors(folder: str | Path) -> dict[str, TensorEntry]:
    """Every tensor of a Hugging Face folder, by file and then by place.

    The files are those of the index where there is one, else ``model.safetensors``, else all safetensors files.

    Raises:
        CheckpointError: there are none, a file is no safetensors file or is cut off, two files hold a tensor of one
            name, or the index and its files disagree; the message names the file and the tensor.
    """
    base = Path(folder)
    mapped = _index(base)
    found: dict[str, TensorEntry] = {}
    for path in _weight_files(base, mapped):
        for name, entry in _header(path).items():
            if name in found:
                raise CheckpointError(
                    f"{path} and {found[name].file} both hold {name}: which one is meant can't be told; remove the file"
                    " that doesn't belong there"
                )
            found[name] = entry
    if mapped is not None:
        _check_index(base / INDEX_NAME, mapped, found)
    if not found:
        others = sorted(path.name for pattern in _PICKLED for path in base.glob(pattern))
        seen = (
            f" but {', '.join(others[:3])}: such files can run code when they are read; convert them to safetensors"
            if others
            else ""
        )
        raise CheckpointError(
            f"{base} holds no *.safetensors file{seen}; weights are read in that format only, give a folder of them"
        )
    return found


def quick_digest(folder: str | Path, tensors: Mapping[str, TensorEntry]) -> str:
    """A digest of weights that takes no time: names, types, shapes and the first MiB of each.

    Args:
        folder: that holds them.
        tensors: those that count.
    """
    digest = hashlib.sha256()
    for name, entry in sorted(tensors.items()):
        digest.update(json.dumps([name, entry.dtype, list(entry.shape)]).encode())
        with (Path(folder) / entry.file).open("rb") as file:
            file.seek(entry.start)
            digest.update(file.read(min(entry.end - entry.start, _DIGESTED)))
    return digest.hexdigest()


def _header(path: Path) -> dict[str, TensorEntry]:
    found: dict[str, TensorEntry] = {}
    try:
        size = path.stat().st_size
        with open(path, "rb") as handle:
            first = handle.read(8)
            if first == b"version ":
                raise CheckpointError(
                    f"{path} is a pointer of Git LFS and not the file itself; fetch it with git lfs pull"
                )
            length = int.from_bytes(first, "little")
            if length > min(size - 8, _LONGEST_HEADER):  # before anything of that length is asked for
                raise ValueError(f"its header would have {length} bytes, the file has {size}")
            header: dict[str, Any] = strict_json.loads(handle.read(length).decode("utf-8"))
        rows = sorted(
            ((e["data_offsets"], name, e) for name, e in header.items() if name != "__metadata__"),
            key=lambda row: row[:2],
        )
        for (start, end), name, entry in rows:
            if not (isinstance(start, int) and isinstance(end, int) and 0 <= start <= end <= size - 8 - length):
                raise ValueError(f"the bytes of {name} lie outside the file")
            if not all(isinstance(length, int) and length >= 0 for length in entry["shape"]):
                raise ValueError(f"the shape of {name} is none")
            dtype, shape = str(entry["dtype"]), tuple(entry["shape"])
            if dtype in _BITS and math.prod(shape) * _BITS[dtype] != 8 * (end - start):
                raise ValueError(f"{name} has {end - start} bytes, which are not {list(shape)} of {dtype}")
            found[name] = TensorEntry(dtype, shape, path.name, 8 + length + start, 8 + length + end)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; export that folder again or copy all of its files") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, MemoryError, OverflowError) as error:
        raise CheckpointError(f"{path} is no safetensors file ({error!r}); export it again") from error
    return found


def _index(base: Path) -> dict[str, str] | None:
    """The index's map tensor -> file; None where there is no index."""
    index = base / INDEX_NAME
    if not index.is_file():
        return None
    try:
        mapped = dict(strict_json.loads(index.read_bytes().decode("utf-8"))["weight_map"])
        for name in mapped.values():
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"{name!r} is no safetensors file of this folder")
        if not mapped:
            raise ValueError("it names no tensor")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} can't be read ({error!r}); export that folder again") from error
    return mapped


def _weight_files(base: Path, mapped: dict[str, str] | None) -> list[Path]:
    """The files to read. Where there is no index every loader takes other files: one that would be passed over here is
    an error.
    """
    single = base / _SINGLE_NAME
    if mapped is not None:
        if single.is_file() and _SINGLE_NAME not in mapped.values():
            raise CheckpointError(
                f"{single} stands beside {INDEX_NAME}, which names other files: loaders differ in which they read;"
                " remove what is out of date"
            )
        return [base / name for name in sorted(set(mapped.values()))]
    files = sorted(base.glob("*.safetensors"))
    if single.is_file() and len(files) > 1:
        other = next(path for path in files if path != single)
        raise CheckpointError(
            f"{other} stands beside {_SINGLE_NAME} without an index that names both: some loaders read it too; remove"
            " it from the folder"
        )
    return files


def _check_index(index: Path, mapped: dict[str, str], found: dict[str, TensorEntry]) -> None:
    for name, entry in found.items():
        if name not in mapped:
            raise CheckpointError(
                f"{index} doesn't name {name}, which {entry.file} holds; export that folder again, or make its index"
                " anew"
            )
    for name, file in mapped.items():
        if name not in found:
            raise CheckpointError(f"{index} says that {file} holds {name}, which it doesn't; export that folder again")
        if found[name].file != file:
            raise CheckpointError(
                f"{index} says that {file} holds {name}, which is in {found[name].file}; export that folder again"
            )


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
