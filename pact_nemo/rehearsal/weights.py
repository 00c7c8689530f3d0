"""Weights that nobody reads: a folder of which only the names are known, and the check that they go somewhere."""

from __future__ import annotations

from collections.abc import Iterator, KeysView, Mapping
from pathlib import Path
from typing import Any

import torch

from pact_nemo.errors import CheckpointError
from pact_nemo.policy.architectures import check_architecture
from pact_nemo.policy.bridge import quiet
from pact_nemo.policy.bridge_extensions import extend_bridge
from pact_nemo.policy.expected_weights import Shapes, expected_weights
from pact_nemo.policy.megatron_import import prepare_megatron

prepare_megatron()

from megatron.bridge import AutoBridge  # noqa: E402


class Names(Mapping[str, torch.Tensor]):
    """In place of ``bridge.FolderState``: the names of the weights that a folder of this model has."""

    def __init__(self, expected: Shapes):
        self.expected, self.source = expected, self

    def get_all_keys(self) -> KeysView[str]:
        return self.expected.keys()

    def __getitem__(self, name: str) -> torch.Tensor:
        raise CheckpointError(f"{name} was read: a rehearsal has no weights")

    def __contains__(self, name: object) -> bool:
        return name in self.expected

    def __iter__(self) -> Iterator[str]:
        return iter(self.expected)

    def __len__(self) -> int:
        return len(self.expected)

    def digest(self) -> str:
        return "none: a rehearsal has no weights"


def bridge_of_config(folder: str | Path, *, with_weights: bool = True) -> Any:
    """In place of ``bridge.load_bridge``, which reads the headers of a folder's weights; here it has none."""
    with quiet():
        found = AutoBridge.from_hf_pretrained(str(folder))
    found.hf_pretrained._state_dict_accessor = Names(expected_weights(check_architecture(folder)))
    extend_bridge(type(found._model_bridge))
    return found


def check_names(bridge: Any, chunks: list[Any]) -> None:
    """In place of ``bridge.load_weights``: a weight of the folder goes into every parameter of this rank.

    Raises:
        CheckpointError: names a parameter that would stay empty, or a weight that the model doesn't have.
    """
    expected = bridge.hf_pretrained.state.expected
    filled: set[int] = set()
    for task in bridge.get_conversion_tasks(chunks):
        if task is None:
            continue
        source = task.mapping.hf_param
        for name in [source] if isinstance(source, str) else source.values():
            if name not in expected:
                raise CheckpointError(f"{task.param_name} would be filled from {name}, which the model doesn't have")
        if task.param_weight is not None:
            filled.add(id(task.param_weight))
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if id(parameter) not in filled:
                raise CheckpointError(f"no weight of the folder would go into the parameter {name}")
