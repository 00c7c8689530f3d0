"""Weights between Hugging Face folders and the policy's model chunks, through Megatron-Bridge.

The bridge reads weights from a folder that was checked (:mod:`pact_nemo.policy.model_folder`), and afterwards every
parameter of every rank is known to have been filled: the bridge itself passes over what it can't find, and leaves
uninitialised memory. A model's settings come from its architecture alone (:mod:`pact_nemo.policy.provider`): the
bridge's own readers differ from version to version. What else it lacks is in
:mod:`pact_nemo.policy.bridge_extensions`.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
from collections.abc import Iterator, KeysView, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from pact_nemo.errors import CheckpointError, ConfigError
from pact_nemo.policy.bridge_extensions import VOCAB_PARAMETERS, extend_bridge
from pact_nemo.policy.megatron_import import prepare_megatron
from pact_nemo.policy.model_folder import ModelFolder, WeightReader, check_model_folder, described_folder
from pact_nemo.runtime.collective import raise_together
from pact_nemo.runtime.tensor_files import quick_digest

prepare_megatron()

from megatron.bridge import AutoBridge  # noqa: E402

if TYPE_CHECKING:
    from pact_nemo.policy.lora import Adapters

_EXPERT_NUMBER = re.compile(r"\.experts\.\d+\.")


class Weights(Protocol):
    """Weights from elsewhere than a Hugging Face folder."""

    def fill(self, chunks: list[Any]) -> None:
        """Fill the parameters of a rank's chunks, in their dtype; collective."""


def load_bridge(hf_path: str | Path, *, with_weights: bool = True) -> AutoBridge:
    """Megatron-Bridge for a local Hugging Face folder, with our additions to its name mappings.

    Args:
        hf_path: the folder.
        with_weights: False: its weights are not looked at, for others take their place.

    Raises:
        ConfigError: the folder is absent or the policy does not compute its architecture or one of its settings; on all
            ranks.
        CheckpointError: its tensors are not those of the model; on all ranks.
    """
    folder, problem = None, None
    try:
        folder = check_model_folder(hf_path) if with_weights else described_folder(hf_path)
    except (ConfigError, CheckpointError) as error:
        problem = error
    raise_together(problem)
    assert folder is not None
    try:
        with quiet():
            bridge = AutoBridge.from_hf_pretrained(str(hf_path))
    except ValueError as error:
        raise ConfigError(f"{hf_path}: {error}") from error
    bridge.hf_pretrained._state_dict_accessor = FolderState(folder)
    extend_bridge(type(bridge._model_bridge))
    return bridge


def folder_of(bridge: AutoBridge) -> ModelFolder:
    """The folder that a bridge of :func:`load_bridge` reads."""
    return bridge.hf_pretrained.state.folder  # type: ignore[no-any-return]


class FolderState(Mapping[str, torch.Tensor]):
    """A checked folder as the bridge reads it. A weight that can't be read, or is not finite, is remembered as
    ``fault`` and the load goes on: other ranks wait for its collectives."""

    def __init__(self, folder: ModelFolder):
        self.folder, self.source = folder, self
        self.fault: CheckpointError | None = None
        self._reader = WeightReader(folder)

    def get_all_keys(self) -> KeysView[str]:
        return self.folder.entries.keys()

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.folder.entries:
            raise KeyError(name)
        try:
            return self._reader.read(name)
        except CheckpointError as error:
            self.fault = self.fault or error
            return torch.full(self.folder.entries[name].shape, torch.nan)

    def __contains__(self, name: object) -> bool:
        return name in self.folder.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.folder.entries)

    def __len__(self) -> int:
        return len(self.folder.entries)

    def close(self) -> None:
        self._reader.close()

    def digest(self) -> str:
        """A digest of the folder that takes no time; see :func:`pact_nemo.runtime.tensor_files.quick_digest`."""
        return quick_digest(self.folder.path, self.folder.entries)


@torch.no_grad()
def load_weights(bridge: AutoBridge, chunks: list[Any]) -> None:
    """Fill the chunks' parameters from the bridge's folder, in their dtype; collective.

    Raises:
        CheckpointError: on all ranks: a weight of the folder can't be read, is not finite or has no parameter, or a
            parameter got no weight.
    """
    state: FolderState = bridge.hf_pretrained.state
    raise_together(_unplaced(bridge, chunks, state.folder))
    for chunk in chunks:
        for param in chunk.parameters():
            param.fill_(torch.nan)
    try:
        with quiet():
            bridge.load_hf_weights(chunks)
    finally:
        state.close()
    unfilled = (
        name for chunk in chunks for name, param in chunk.named_parameters() if not bool(torch.isfinite(param).all())
    )
    name = next(unfilled, None) if state.fault is None else None
    raise_together(
        state.fault
        or (CheckpointError(f"{state.folder.path}: no weight of it went into the parameter {name}") if name else None)
    )


def _unplaced(bridge: AutoBridge, chunks: list[Any], folder: ModelFolder) -> CheckpointError | None:
    """What is wrong where the bridge's mappings and the folder's weights are not the same; experts count as one, a rank
    knows its own only.
    """
    placed: set[str] = set()
    for task in bridge.get_conversion_tasks(chunks):
        if task is not None:
            source = task.mapping.hf_param
            placed |= {
                _EXPERT_NUMBER.sub(".experts.*.", name)
                for name in ([source] if isinstance(source, str) else source.values())
            }
    left = next((name for name in folder.entries if _EXPERT_NUMBER.sub(".experts.*.", name) not in placed), None)
    if left is None:
        return None
    return CheckpointError(
        f"{folder.path / folder.entries[left].file}: {left} would not be loaded: the policy's model has no parameter"
        " for it"
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the bridge's progress bar and its remarks on fusions and dtypes, which are as asked for."""
    loggers = [logging.getLogger(name) for name in ("megatron.bridge", "transformers")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def conversion_tasks(bridge: AutoBridge, chunks: list[Any]) -> list[Any]:
    """The bridge's conversion tasks of the chunks as they were when they were first asked for; collective then."""
    # walks over all modules for each layer: a third of the time of an export of a small model
    if not hasattr(bridge, "_tasks_of_pact"):
        bridge._tasks_of_pact = bridge.get_conversion_tasks(chunks)
    return bridge._tasks_of_pact  # type: ignore[no-any-return]


def export_weights(
    bridge: AutoBridge, chunks: list[Any], adapters: Adapters | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Hugging Face names and full tensors, gathered over TP and PP one at a time; collective, every rank gets every
    tensor, on its own device. They may share memory with the parameters.

    Args:
        bridge: of :func:`load_bridge`.
        chunks: this rank's model chunks.
        adapters: what is added to their weights; those tensors are float32.
    """
    vocab_size = chunks[0].true_vocab_size
    vocab_names = {
        mapping.hf_param
        for mapping in bridge._model_bridge.mapping_registry().mappings
        if mapping.megatron_param in VOCAB_PARAMETERS
    } | {"lm_head.weight"}
    tasks = conversion_tasks(bridge, chunks)
    for name, tensor in bridge.export_hf_weights(
        chunks,
        cpu=False,
        show_progress=False,
        conversion_tasks=tasks if adapters is None else adapters.merged(tasks),
        merge_adapter_weights=False,  # the bridge's own way rounds to the weight's dtype in between
    ):
        yield name, tensor[:vocab_size] if name in vocab_names else tensor
