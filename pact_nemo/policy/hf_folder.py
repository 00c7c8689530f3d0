"""Writing a Hugging Face model folder from a stream of weights, by several ranks at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pact_nemo.checkpoints.manifest import FileEntry
from pact_nemo.checkpoints.stream import SafetensorsWriter, WriterThread
from pact_nemo.errors import CheckpointError
from pact_nemo.files import write_json_atomic

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARD_BYTES = 4 << 30
WEIGHTS_NAME = "model.safetensors"
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


def export_order(name: str) -> list[tuple[int, int, str]]:
    """Sort key of about the order in which the bridge produces tensors: those outside of layers first, then layer by layer."""
    parts = [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]
    return [(int(".layers." in name), 0, ""), *parts]


@dataclass(frozen=True)
class ShardPlan:
    """Which file each tensor goes to, and which writer writes it. The same on every rank, known before the first tensor is there.

    Attributes:
        files: name of each shard -> its tensors, in order.
        writer: name of each shard -> writer, 0 .. writers - 1.
    """

    files: dict[str, list[str]]
    writer: dict[str, int]

    @classmethod
    def of(cls, sizes: dict[str, int], writers: int, shard_bytes: int) -> ShardPlan:
        """Cut tensors, in order, into shards of about equal size: one a writer, or more where one would exceed ``shard_bytes``.

        Args:
            sizes: name -> bytes, in the order in which they are produced.
        """
        total = sum(sizes.values())
        count = max(1, min(writers, len(sizes)))
        count *= -(-total // (count * shard_bytes)) or 1
        shards: list[list[str]] = [[]]
        limit, used = total / count, 0
        for name, size in sizes.items():
            if shards[-1] and len(shards) < count and used + size / 2 > limit * len(shards):
                shards.append([])
            shards[-1].append(name)
            used += size
        if len(shards) == 1:
            return cls({WEIGHTS_NAME: shards[0]}, {WEIGHTS_NAME: 0})
        names = [f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors" for index in range(len(shards))]
        return cls(dict(zip(names, shards, strict=True)), {name: index % writers for index, name in enumerate(names)})

    def write_index(self, folder: str | Path, total_bytes: int) -> None:
        """The index that loaders look for beside several shards."""
        if len(self.files) > 1:
            weight_map = {name: file for file, names in self.files.items() for name in names}
            write_json_atomic(Path(folder) / _INDEX_NAME, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})


def write_weights(
    weights: Iterable[tuple[str, torch.Tensor]], folder: str | Path, dtype: str, plan: ShardPlan, shapes: dict[str, tuple[int, ...]], writer: int
) -> tuple[dict[str, FileEntry], list[str]]:
    """Write this writer's shards while the tensors of the others go by; a few tensors are in memory at a time.

    Args:
        weights: names and tensors, consumed to the end on every rank, also after a failure (producing them is collective).
        folder: existing folder.
        dtype: one of ``DTYPES``.
        plan: the same on all ranks.
        shapes: name -> shape of every tensor.
        writer: which of its writers this is; none of them = consume only.

    Returns:
        the files written, and all names in the order in which they came (the order of a plan that needs no second reading).

    Raises:
        CheckpointError: a name came twice, tensors are not those of the plan, or a file can't be written.
    """
    shard_of = {name: file for file, names in plan.files.items() for name in names}
    own: dict[str, SafetensorsWriter] = {}
    seen: dict[str, None] = {}
    problem: str | None = None
    thread = WriterThread()
    for name, tensor in weights:
        if name in seen:
            problem = problem or f"weight {name} was produced twice"
        seen[name] = None
        file = shard_of.get(name)
        if problem or file is None or plan.writer[file] != writer:
            continue
        try:
            if file not in own:
                own[file] = SafetensorsWriter(Path(folder) / file, {each: shapes[each] for each in plan.files[file]}, DTYPES[dtype])
            thread.put(own[file], name, tensor)
        except OSError as error:
            problem = f"{Path(folder) / file} can't be written: {error}"
    thread.finish()
    problem = problem or thread.problem
    if not problem and seen.keys() != shard_of.keys():
        problem = f"exported weights differ from those planned: {sorted(seen.keys() ^ shard_of.keys())[:5]}"
    if problem:
        raise CheckpointError(problem)
    return thread.entries, list(seen)
