"""Weights and optimizer of a rank as megatron's sharded state dict, which another layout can load."""

from __future__ import annotations

from typing import Any


def sharded_state(chunks: list[Any], optimizer: Any, *, is_loading: bool) -> dict[str, Any]:
    """Weights, moments, main weights and Adam's step counters of this rank's chunks; collective.

    Args:
        chunks: this rank's model chunks.
        optimizer: megatron's optimizer over them.
        is_loading: the tensors are placeholders that are loaded into.
    """
    metadata = {"distrib_optim_sharding_type": "fully_reshardable"}
    state: dict[str, Any] = {
        name: chunk.sharded_state_dict(metadata=metadata) for name, chunk in zip(_names(chunks), chunks, strict=True)
    }
    state["optimizer"] = optimizer.sharded_state_dict(dict(state), is_loading=is_loading, metadata=metadata)
    return state


def load_sharded_state(chunks: list[Any], optimizer: Any, state: dict[str, Any]) -> None:
    """Take over a state of :func:`sharded_state` whose tensors were loaded."""
    for name, chunk in zip(_names(chunks), chunks, strict=True):
        chunk.load_state_dict(state[name], strict=True)
    optimizer.load_state_dict(state["optimizer"])


def _names(chunks: list[Any]) -> list[str]:
    return ["model"] if len(chunks) == 1 else [f"model{index}" for index in range(len(chunks))]
