"""The weights of a Megatron-Bridge checkpoint into a policy's own chunks, under any layout.

Of its pickles only the index is read, after the names in it were looked through. ``common.pt``, ``train_state.pt``,
optimizer, generators and Transformer Engine's scales are not read at all. Every weight is known to be there, of the
right shape and finite, and no weight of the checkpoint is left over.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from pact_nemo.checkpoints.megatron_bridge.index import COPY_AGAIN, Stored, check_checkpoint
from pact_nemo.checkpoints.pickles import METADATA
from pact_nemo.errors import CheckpointError
from pact_nemo.policy.architectures import check_architecture
from pact_nemo.policy.bridge_extensions import VOCAB_PARAMETERS
from pact_nemo.policy.megatron_import import prepare_megatron
from pact_nemo.policy.model_source import ModelSource
from pact_nemo.policy.sharded_state import load_sharded_weights, sharded_weights
from pact_nemo.runtime.collective import gather, raise_together

prepare_megatron()

from megatron.core.dist_checkpointing.core import CheckpointingException  # noqa: E402
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, merge, nested_values  # noqa: E402
from megatron.core.dist_checkpointing.mapping import (  # noqa: E402
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    apply_factory_merges,
)
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess  # noqa: E402
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy  # noqa: E402


class CheckpointWeights:
    """Fills a policy's chunks from a checkpoint; what :class:`~pact_nemo.policy.policy.MegatronPolicy` takes."""

    def __init__(self, source: ModelSource):
        self.source = source

    @torch.no_grad()
    def fill(self, chunks: list[Any]) -> None:
        """Fill the chunks' parameters, in their dtype. Collective; every rank sees the folder.

        Raises:
            CheckpointError: on all ranks: the checkpoint is not of this model, not whole or not finite.
            ConfigError: on all ranks: Megatron-Bridge can't compute this architecture.
        """
        stored, problem = None, None
        try:
            stored = check_checkpoint(self.source, check_architecture(self.source.described))
        except Exception as error:  # the same on all ranks, or some don't see the folder
            problem = error
        raise_together(problem)
        assert stored is not None
        vocab: int = chunks[0].true_vocab_size
        state, _ = extract_matching_values(
            sharded_weights(chunks, layer_by_layer=stored.layer_by_layer),
            lambda value: not isinstance(value, ShardedObject),
        )
        _compare(stored, _asked(state), vocab)
        for chunk in chunks:
            for param in chunk.parameters():
                param.fill_(torch.nan)
        problem = None
        try:
            load_sharded_weights(chunks, _load(stored.save, state))
        except (Exception, CheckpointException) as error:  # whatever a torn file makes torch and megatron raise
            problem = CheckpointError(f"{stored.save} can't be read ({_reason(error)}); {COPY_AGAIN}")
        raise_together(problem)
        raise_together(_unfilled(stored.save, chunks, vocab))


def _asked(state: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Of each tensor that this rank asks for: (whole shape, whether it has rows of padding)."""
    found: dict[str, tuple[tuple[int, ...], bool]] = {}
    for value in nested_values(state):
        parts = nested_values(value.build()) if isinstance(value, ShardedTensorFactory) else [value]
        for part in parts:
            if isinstance(part, ShardedTensor):
                found[part.key] = tuple(part.global_shape), part.key in VOCAB_PARAMETERS
    return found


def _compare(stored: Stored, mine: dict[str, tuple[tuple[int, ...], bool]], vocab: int) -> None:
    """Refuse a checkpoint whose tensors are not those that all ranks ask for; collective."""
    asked = {name: fact for part in gather(mine) for name, fact in part.items()}
    index, problem = stored.save / METADATA, None
    for name, (shape, padded) in sorted(asked.items()):
        if name not in stored.tensors:
            problem = f"{index}: there is no {name}, which the model of config.json has"
            break
        found = stored.tensors[name][0]
        fits = found[1:] == shape[1:] and found[0] >= vocab if padded else found == shape
        if not fits:
            rows = f"at least {vocab}" if padded else shape[0]
            problem = f"{index}: {name} has shape {list(found)}, the model of config.json [{rows}, …] of {list(shape)}"
            break
    left = sorted(stored.tensors.keys() - asked.keys())
    if problem is None and left:
        problem = f"{index}: {left[0]} would not be loaded: the model of config.json has no such weight"
    if problem is not None:
        raise CheckpointError(f"{problem}; give model.hf_config the folder of the checkpoint's own model")


def _load(save: Path, state: dict[str, Any]) -> dict[str, Any]:
    """What ``dist_checkpointing.load`` does with tensors; that reads ``common.pt`` too, a pickle that isn't needed."""
    asked, loaded, factories = load_preprocess(state)
    merge(loaded, TorchDistLoadShardedStrategy().load(asked, save))
    merged: dict[str, Any] = apply_factory_merges(loaded, factories)
    return merged


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointingException):
        return str(error)
    return (str(error).strip().splitlines() or [repr(error)])[-1]


def _unfilled(save: Path, chunks: list[Any], vocab: int) -> CheckpointError | None:
    """What is wrong where a parameter got no weight, or one that is not finite. Rows of padding become zeros, as the
    bridge leaves them.
    """
    for chunk in chunks:
        for name, param in chunk.named_parameters():
            if name in VOCAB_PARAMETERS:
                rows = param.shape[0]
                first = rows * chunk.pg_collection.tp.rank()
                param[max(0, min(rows, vocab - first)) :] = 0
            if not bool(torch.isfinite(param).all()):
                return CheckpointError(
                    f"{save}: {name} got no weight, or one that is NaN or Inf; take an intact checkpoint"
                )
    return None
