"""Frozen weights beside a policy's own: a copy on the host that takes their place for a while."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pact_nemo.errors import ConfigError
from pact_nemo.policy import bridge
from pact_nemo.policy.architectures import Architecture, check_architecture

if TYPE_CHECKING:
    from pact_nemo.policy.lora import Adapters

logger = logging.getLogger(__name__)

Reference = Callable[[], contextlib.AbstractContextManager[None]]  # in which a policy's passes see the reference
Weights = list[dict[str, torch.Tensor]]  # of each model chunk: parameter -> its values


def reference_for(
    hf_path: str | Path,
    own_path: Path,
    own: Architecture,
    chunks: list[Any],
    device: torch.device,
    adapters: Adapters | None,
) -> Reference:
    """The frozen weights of a folder for these chunks. Collective.

    Args:
        hf_path: folder of the reference.
        own_path: folder that the policy began with.
        own: its architecture.
        chunks: this rank's model chunks.
        device: that they are on.
        adapters: theirs, if they have some. Their base is the reference then, and nothing is copied.

    Raises:
        ConfigError: the folder's model is another one, or not the adapters' base.
        CheckpointError: its tensors are not those of the model, or not finite.
    """
    if adapters is not None:
        if Path(hf_path).resolve() != own_path.resolve():
            raise ConfigError(
                f"policy.lora has its base for a reference, {own_path}, and can't take {hf_path}; set"
                " objective.kl_coef=0, or train all weights: policy.lora.rank=0"
            )
        return adapters.switched_off
    if check_architecture(hf_path) != own:
        raise ConfigError(
            f"{Path(hf_path) / 'config.json'} describes another model than {own_path / 'config.json'}; take a"
            " reference of the same architecture"
        )
    return partial(in_place_of_own, read_weights(hf_path, chunks, device), chunks, device)


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
        return [{name: _on_host(param.data) for name, param in chunk.named_parameters()} for chunk in chunks]
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


def _on_host(values: torch.Tensor) -> torch.Tensor:
    """A copy in the host's memory, page-locked where it has to go back to a GPU: from there it is seven times as
    fast.
    """
    if not values.is_cuda:
        return values.cpu()
    try:
        return torch.empty_like(values, device="cpu", pin_memory=True).copy_(values)
    except RuntimeError as error:  # the system allows no more locked memory
        logger.warning("reference weights are in pageable memory, and slower to fetch: %s", error)
        return values.cpu()


def _own_weights(chunks: list[Any]) -> Weights:
    return [{name: param.data for name, param in chunk.named_parameters()} for chunk in chunks]


def _point_to(chunks: list[Any], weights: Weights, device: torch.device) -> None:
    for chunk, values in zip(chunks, weights, strict=True):
        for name, param in chunk.named_parameters():
            param.data = values[name].to(device, non_blocking=True)
