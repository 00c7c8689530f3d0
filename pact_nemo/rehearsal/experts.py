"""Routing of a mixture of experts in a rehearsal: how many tokens go where depends on numbers that fake tensors don't
have, so every expert gets as many as every other.

Whatever the dispatcher counts (tokens sent to each rank, received from each, for each expert) adds up to the same
then: the copies of this rank's tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from pact_nemo.rehearsal import observed


def route_evenly() -> None:
    """For the all-to-all dispatcher, which is the one that the policy uses. Once megatron-core is imported."""
    from megatron.core.transformer.moe import token_dispatcher

    dispatcher = token_dispatcher.MoEAlltoAllTokenDispatcher
    make, count = dispatcher.__init__, dispatcher.preprocess

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        with unset_fake_temporarily():  # orders of chunks, on the host: they are known
            make(self, *args, **kwargs)

    def preprocess(self: Any, routing_map: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        observed.SELECTED.clear()
        observed.SELECTED.append(routing_map.shape[0] * self.config.moe_router_topk)
        return count(self, routing_map, *args, **kwargs)

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        """In place of ``maybe_move_tensor_to_cpu``."""
        if not torch.is_tensor(tensor) or not tensor.is_cuda:
            return tensor
        observed.READS[observed.asking_line()] += 1
        with unset_fake_temporarily():
            found = observed.even_counts(tuple(tensor.shape))
            return found.numpy() if as_numpy else found

    dispatcher.__init__, dispatcher.preprocess = __init__, preprocess
    token_dispatcher.maybe_move_tensor_to_cpu = to_host
