"""Writing a Hugging Face model folder from a stream of weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pact_nemo.errors import CheckpointError, ConfigError
from pact_nemo.files import write_json_atomic

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARD_BYTES = 4 << 30
_INDEX_NAME = "model.safetensors.index.json"
_ARTIFACTS = (
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*",
    "*.jinja", "*.model", "*.tiktoken", "*.py", "LICENSE*",
)  # fmt: skip


def copy_artifacts(source: str | Path, folder: str | Path, dtype: str) -> None:
    """Copy configuration, tokenizer, chat template, generation settings, custom code and licence.

    Args:
        source: Hugging Face folder.
        folder: existing folder to copy into.
        dtype: written into ``config.json`` as the dtype of the weights.

    Raises:
        CheckpointError: ``source`` has no ``config.json``.
    """
    config_path = Path(source) / "config.json"
    if not config_path.is_file():
        raise CheckpointError(f"{config_path} is missing: not a Hugging Face model folder")
    for path in sorted({path for pattern in _ARTIFACTS for path in Path(source).glob(pattern)}):
        if path.is_file():
            shutil.copyfile(path, Path(folder) / path.name)
    config: dict[str, Any] = json.loads(config_path.read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = dtype
    write_json_atomic(Path(folder) / "config.json", config)


def write_weights(
    weights: Iterable[tuple[str, torch.Tensor]], folder: str | Path | None, dtype: str, *, shard_bytes: int = SHARD_BYTES
) -> list[str]:
    """Write ``model.safetensors``, or numbered shards with an index when larger than ``shard_bytes``.

    Args:
        weights: names and tensors, consumed to the end on every rank (producing them is collective).
        folder: existing folder; None = consume only (ranks that don't write).
        dtype: one of ``DTYPES``.
        shard_bytes: bytes per file.

    Returns:
        names of the tensors, in order.

    Raises:
        ConfigError: unknown dtype.
        CheckpointError: a name came twice, or there were no weights.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"export dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    names: list[str] = []
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    pending_bytes = total_bytes = 0

    def flush() -> None:
        nonlocal pending, pending_bytes
        if pending and folder is not None:
            save_file(pending, Path(folder) / f"shard-{len(shards):05d}.safetensors", metadata={"format": "pt"})
            shards.append(list(pending))
        pending, pending_bytes = {}, 0

    for name, tensor in weights:
        if name in names:
            raise CheckpointError(f"weight {name} was produced twice")
        names.append(name)
        if folder is None:
            continue
        # a copy even if the dtype fits: the tensor may be a view of a live parameter
        value = tensor.detach().to(device="cpu", dtype=DTYPES[dtype], copy=True).contiguous()
        size = value.numel() * value.element_size()
        if pending and pending_bytes + size > shard_bytes:
            flush()
        pending[name] = value
        pending_bytes += size
        total_bytes += size
    flush()
    if not names:
        raise CheckpointError("there are no weights to write")
    if folder is not None:
        _name_shards(Path(folder), shards, total_bytes)
    return names


def _name_shards(folder: Path, shards: list[list[str]], total_bytes: int) -> None:
    """Give the shard files the names that loaders look for, now that their number is known."""
    if len(shards) == 1:
        (folder / "shard-00000.safetensors").rename(folder / "model.safetensors")
        return
    weight_map = {}
    for index, names in enumerate(shards):
        final = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{index:05d}.safetensors").rename(folder / final)
        weight_map.update({name: final for name in names})
    write_json_atomic(folder / _INDEX_NAME, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
