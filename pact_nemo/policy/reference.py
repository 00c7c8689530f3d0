"""Frozen weights beside a policy's own: a copy on the host that takes their place for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pact_nemo.policy import bridge

Weights = list[dict[str, torch.Tensor]]  # of each model chunk: parameter -> its values


@torch.no_grad()
def read_weights(hf_path: str | Path, chunks: list[Any], device: torch.device) -> Weights:
    """The weights of a Hugging Face folder as these chunks hold them, on the host. The chunks' own are untouched.
    Collective.

    Args:
        hf_path: folder of a model of the same architecture.
        chunks: this rank's model chunks.
        device: that the chunks are on.

    Raises:
        ConfigError: the policy does not compute the folder's model.
        CheckpointError: its tensors are not those of the model, or not finite.
    """
    current = _own_weights(chunks)
    try:
        for chunk in chunks:
            for param in chunk.parameters():
                param.data = torch.empty_like(param.data)
        bridge.load_weights(bridge.load_bridge(hf_path), chunks)
        return [{name: param.data.cpu() for name, param in chunk.named_parameters()} for chunk in chunks]
    finally:
        _point_to(chunks, current, device)


@contextlib.contextmanager
def in_place_of_own(weights: Weights, chunks: list[Any], device: torch.device) -> Iterator[None]:
    """``weights`` in place of the chunks' own. Only pointers are exchanged, so these come back bit for bit."""
    current = _own_weights(chunks)
    try:
        _point_to(chunks, weights, device)
        yield
    finally:
        _point_to(chunks, current, device)


def _own_weights(chunks: list[Any]) -> Weights:
    return [{name: param.data for name, param in chunk.named_parameters()} for chunk in chunks]


def _point_to(chunks: list[Any], weights: Weights, device: torch.device) -> None:
    for chunk, values in zip(chunks, weights, strict=True):
        for name, param in chunk.named_parameters():
            param.data = values[name].to(device)
