"""What can be known of a Megatron-Bridge checkpoint before a model is built: its settings, its index and its files.

Of its pickles only the index is read, after the names in it were looked through. Imports no megatron.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from pact_nemo.checkpoints.megatron_bridge.settings import check_run_config
from pact_nemo.checkpoints.pickles import METADATA, read_index
from pact_nemo.errors import CheckpointError
from pact_nemo.policy.architectures import Architecture
from pact_nemo.policy.model_source import ModelSource
from pact_nemo.runtime import strict_json

_FORMAT = "torch_dist"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_NOT_WEIGHTS = re.compile(r"(chained_\d+\.)?optimizer\.|rng_state|rerun_state")  #: tensors beside the model's
_BY_LAYER = re.compile(r"decoder\.layers\.\d+\.")
COPY_AGAIN = "copy that checkpoint again"


@dataclass(frozen=True)
class Stored:
    """What a checkpoint's index says of its weights.

    Attributes:
        save: the folder.
        tensors: name -> (whole shape, dtype), optimizer left out.
    """

    save: Path
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]

    @property
    def dtype(self) -> torch.dtype:
        """The widest dtype of the weights."""
        kinds = {dtype for _, dtype in self.tensors.values()}
        return torch.bfloat16 if kinds == {torch.bfloat16} else torch.float32

    @property
    def layer_by_layer(self) -> bool:
        """Whether each layer has tensors of its own."""
        return any(_BY_LAYER.match(name) for name in self.tensors)


def stored_weights(save: Path) -> Stored:
    """Read the index of a save, and compare the sizes of its files with it. On one rank.

    Raises:
        CheckpointError: it is in another format than ``torch_dist``, its index can't be read safely, or a file is
            missing or too short.
    """
    if not (save / "metadata.json").is_file():  # of Megatron-Bridge's formats, fsdp_dtensor has none
        raise CheckpointError(
            f"{save} has no metadata.json, so its format is not {_FORMAT}; save it again with"
            f" checkpoint.ckpt_format={_FORMAT}"
        )
    try:
        kind = strict_json.loads((save / "metadata.json").read_text(encoding="utf-8"))["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{save / 'metadata.json'} can't be read ({error!r}); {COPY_AGAIN}") from error
    if kind != _FORMAT:
        raise CheckpointError(
            f"{save}: checkpoint format {kind!r} is not read, {_FORMAT} is; save it again with"
            f" checkpoint.ckpt_format={_FORMAT}"
        )
    index = read_index(save)
    ends: dict[str, int] = {}
    for place in index.storage_data.values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    for name, end in sorted(ends.items()):
        if not (save / name).is_file():
            raise CheckpointError(f"{save / name} is missing: the checkpoint is incomplete; {COPY_AGAIN}")
        if (size := (save / name).stat().st_size) < end:
            raise CheckpointError(f"{save / name} has {size} bytes, {end} are needed; {COPY_AGAIN}")
    tensors = {
        name: (tuple(entry.size), entry.properties.dtype)
        for name, entry in index.state_dict_metadata.items()
        if hasattr(entry, "size") and not _NOT_WEIGHTS.match(name)
    }
    for name, (_, dtype) in tensors.items():
        if dtype not in _FLOATS:
            raise CheckpointError(
                f"{save / METADATA}: {name} is {dtype}, no floating-point weight; save the checkpoint in bfloat16"
            )
    return Stored(save, tensors)


def check_checkpoint(source: ModelSource, architecture: Architecture) -> Stored:
    """Refuse what can be known of a checkpoint before a model is built. On one rank.

    Raises:
        CheckpointError: its settings contradict ``config.json``, or its files are not whole.
        ConfigError: Megatron-Bridge can't compute this architecture.
    """
    assert source.checkpoint is not None
    check_run_config(source.checkpoint, architecture, source.described)
    return stored_weights(source.checkpoint)


def identity(source: ModelSource) -> str:
    """A digest of a checkpoint and of what describes it that takes no time: names, sizes and times of its files. It
    differs from machine to machine where the place does.
    """
    assert source.checkpoint is not None
    facts = []
    for folder in (source.checkpoint, source.described):
        files = sorted(path for path in folder.iterdir() if path.is_file())
        facts += [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
