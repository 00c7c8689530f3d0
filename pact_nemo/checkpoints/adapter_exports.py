"""Exports that hold adapters alone, in PEFT format: what a manifest says of them, and the base that they belong to."""

from __future__ import annotations

import functools
import json
from pathlib import Path

from pact_nemo.checkpoints.manifest import MANIFEST_NAME, Manifest, read_manifest
from pact_nemo.errors import CheckpointError
from pact_nemo.runtime.tensor_files import TensorEntry, is_derived, quick_digest, read_tensors

LM_HEAD = "lm_head.weight"
BASE_KEY = "base"  #: of a manifest's ``extra``: digest of the base that an adapter, or a copy of a model, is of
_FORMAT_KEY, _PEFT = "format", "peft"
PEFT_FACTS = {_FORMAT_KEY: _PEFT}  #: of every adapter's manifest
_PREFIX, _INNER, _OUTER = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


def is_adapter(manifest: Manifest) -> bool:
    """Whether the folder holds adapters alone, and no model."""
    return manifest.extra.get(_FORMAT_KEY) == _PEFT


def adapted_matrices(tensors: dict[str, TensorEntry]) -> dict[str, tuple[int, int, int]]:
    """Of an adapter's tensors: weight of the model -> (rows, columns, rank).

    Raises:
        CheckpointError: a tensor is none of an adapter's, or one of a pair is missing or has another rank.
    """
    inner = {_weight_of(name, _INNER): entry.shape for name, entry in tensors.items() if name.endswith(_INNER)}
    outer = {_weight_of(name, _OUTER): entry.shape for name, entry in tensors.items() if name.endswith(_OUTER)}
    odd = sorted(inner.keys() ^ outer.keys())
    if odd or len(inner) + len(outer) != len(tensors) or not inner:
        raise CheckpointError(
            f"{len(tensors)} tensors are no pairs of lora_A and lora_B{f', {odd[0]} lacks one' if odd else ''}; export"
            " the adapter again"
        )
    found = {}
    for name, (rank, columns) in inner.items():
        rows, other = outer[name]
        if other != rank:
            raise CheckpointError(f"{name}: lora_A has rank {rank}, lora_B has rank {other}; export the adapter again")
        found[name] = (rows, columns, rank)
    return found


def _weight_of(name: str, ending: str) -> str:
    return name.removeprefix(_PREFIX).removesuffix(ending) + ".weight"


def check_fits(export: Path, like: Path) -> None:
    """Refuse an adapter that belongs to another model than a folder's.

    Args:
        export: the adapter.
        like: the model folder that its servers were started from.

    Raises:
        CheckpointError: it was trained on another base, or on matrices that the folder hasn't, or not of that shape.
    """
    check_base(read_manifest(export), export, like)
    held = {name: entry.shape for name, entry in read_tensors(like).items()}
    for name, (rows, columns, _) in adapted_matrices(read_tensors(export)).items():
        if held.get(name) != (rows, columns):
            raise CheckpointError(
                f"{export} adapts {name} of shape {[rows, columns]}, {like} has"
                f" {list(held[name]) if name in held else 'no such weight'}; export an adapter of the same model"
            )


def check_base(manifest: Manifest, export: Path, like: Path) -> None:
    """Refuse an adapter whose base is not the model of a folder.

    Raises:
        CheckpointError: names both folders.
    """
    if manifest.extra.get(BASE_KEY) != base_digest(like):
        raise CheckpointError(
            f"{export} was trained on another base than {like}: the manifest's {BASE_KEY} is not that folder's digest;"
            " start the server from the run's own model.path"
        )


def base_digest(folder: str | Path) -> str:
    """Digest of the base that a model folder is: its own, or that of the folder that it is a copy of.

    Raises:
        CheckpointError: it holds no weights that can be read.
    """
    base = Path(folder).resolve()
    if (base / MANIFEST_NAME).is_file() and (said := read_manifest(base).extra.get(BASE_KEY)) is not None:
        return str(said)
    entries = {name: entry for name, entry in read_tensors(base).items() if not is_derived(name)}
    if is_tied(base):
        entries.pop(LM_HEAD, None)
    files = sorted({entry.file for entry in entries.values()})
    state = tuple((name, (base / name).stat().st_size, (base / name).stat().st_mtime_ns) for name in files)
    return _digest_of(base, tuple(entries.items()), state)


@functools.lru_cache(maxsize=4)
def _digest_of(
    base: Path, entries: tuple[tuple[str, TensorEntry], ...], state: tuple[tuple[str, int, int], ...]
) -> str:
    """Read once while the files are what ``state`` says: each refit asks."""
    return quick_digest(base, dict(entries))


def is_tied(folder: Path) -> bool:
    """Whether a model folder's output matrix is its embedding."""
    try:
        return bool(json.loads((folder / "config.json").read_text(encoding="utf-8"))["tie_word_embeddings"])
    except (OSError, ValueError, KeyError):
        return False
