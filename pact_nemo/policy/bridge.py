"""Weights between Hugging Face folders and the policy's model chunks, through Megatron-Bridge and what it lacks (0.3).

The bridge reads weights from a folder that was checked (:mod:`pact_nemo.policy.model_folder`), and afterwards every
parameter of every rank is known to have been filled: the bridge itself passes over what it can't find, and leaves
uninitialised memory.

It lacks, and gets here: norm names of layer specs without Transformer Engine in the Qwen mappings; names of biases;
a model's settings from its architecture alone (its own readers differ from version to version); vocabularies that don't
divide by the tensor-parallel size; tied embeddings under virtual pipeline stages; expert parallelism over experts that
are separate modules (it loads every rank's experts from the first rank's, silently).
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import re
from collections.abc import Iterator, KeysView, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from pact_nemo.errors import CheckpointError, ConfigError
from pact_nemo.policy.architectures import Architecture
from pact_nemo.policy.megatron_import import prepare_megatron
from pact_nemo.policy.model_folder import ModelFolder, WeightReader, check_model_folder
from pact_nemo.runtime.collective import raise_together

prepare_megatron()

from megatron.bridge import AutoBridge  # noqa: E402
from megatron.bridge.models.conversion import model_bridge, param_mapping  # noqa: E402
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry  # noqa: E402
from megatron.bridge.models.conversion.param_mapping import (  # noqa: E402
    AutoMapping,
    ColumnParallelMapping,
    GatedMLPMapping,
    MegatronParamMapping,
    QKVMapping,
)
from megatron.bridge.models.gpt_provider import GPTModelProvider  # noqa: E402
from megatron.core import parallel_state  # noqa: E402

LOCAL_NORM_NAMES = {
    "decoder.layers.*.input_layernorm.weight": "model.layers.*.input_layernorm.weight",
    "decoder.layers.*.pre_mlp_layernorm.weight": "model.layers.*.post_attention_layernorm.weight",
}
_ATTENTION, _MLP = "decoder.layers.*.self_attention", "decoder.layers.*.mlp"
_HF_ATTENTION, _HF_MLP = "model.layers.*.self_attn", "model.layers.*.mlp"
VOCAB_PARAMETERS = ("embedding.word_embeddings.weight", "output_layer.weight")
LOCAL_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")
_EXPERT_NUMBER = re.compile(r"\.experts\.\d+\.")


def load_bridge(hf_path: str | Path) -> AutoBridge:
    """Megatron-Bridge for a local Hugging Face folder, with our additions to its name mappings.

    Raises:
        ConfigError: the folder is absent or the policy does not compute its architecture or one of its settings; on all
            ranks.
        CheckpointError: its tensors are not those of the model; on all ranks.
    """
    folder, problem = None, None
    try:
        folder = check_model_folder(hf_path)
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
    _extend_mappings(type(bridge._model_bridge))
    _extend_expert_names()
    _speed_up_export()
    return bridge


def build_provider(architecture: Architecture) -> GPTModelProvider:
    """Megatron's configuration of a model, before layout and precision (``model.configure_provider``).

    Every field that changes a number is written here, from what ``check_architecture`` read. ``provider_bridge`` of
    Megatron-Bridge is not asked: it drops or invents settings, others in each version.
    """
    settings: dict[str, Any] = dict(
        num_layers=architecture.layers,
        hidden_size=architecture.hidden,
        ffn_hidden_size=architecture.intermediate,
        num_attention_heads=architecture.heads,
        num_query_groups=architecture.kv_heads,
        kv_channels=architecture.head_dim,
        vocab_size=architecture.vocab,
        seq_length=architecture.positions,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.eps,
        qk_layernorm=architecture.qk_norm,
        gated_linear_unit=True,
        activation_func=F.silu,
        position_embedding_type="rope",  # the frequencies themselves are model.rotary_frequencies
        share_embeddings_and_output_weights=architecture.tied,
        add_qkv_bias=architecture.qkv_bias,
        # one flag for all other matrices in megatron; model.layer_spec adds those that are there
        add_bias_linear=False,
    )
    if (
        architecture.window is not None
    ):  # read by our attention, in megatron's own words: tokens to the left and to the right
        settings["window_size"] = (architecture.window - 1, 0)
        settings["window_attn_skip_freq"] = [int(window is not None) for window in architecture.windows]
    if architecture.experts:
        settings.update(
            num_moe_experts=architecture.experts,
            moe_router_topk=architecture.experts_per_token,
            moe_ffn_hidden_size=architecture.expert_intermediate,
            # softmax before the choice leaves the weights as they are; after it they sum to one
            moe_router_pre_softmax=not architecture.normalise_top_k,
            moe_grouped_gemm=True,
            moe_router_load_balancing_type="aux_loss",
        )
    return GPTModelProvider(**settings)


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


class PaddedVocabMapping(ColumnParallelMapping):
    """Embedding or output matrix whose rows are padded with zeros to a multiple of the tensor-parallel size (the bridge
    refuses those).
    """

    def hf_to_megatron(self, hf_weights: torch.Tensor, megatron_module: torch.nn.Module) -> torch.Tensor:
        if hf_weights is not None:
            hf_weights = F.pad(hf_weights, (0, 0, 0, -hf_weights.shape[0] % self.tp_size))
        return super().hf_to_megatron(hf_weights, megatron_module)


def _extend_mappings(cls: Any) -> None:
    """Add to a bridge class, once, what it lacks: padded vocabularies, names of biases and of norms without Transformer
    Engine.
    """
    if getattr(cls, "_extended_by_pact", False):
        return
    original = cls.mapping_registry

    def mapping_registry(self: Any) -> MegatronMappingRegistry:
        mappings = original(self).mappings
        known = {mapping.megatron_param for mapping in mappings}
        mappings = [
            (
                PaddedVocabMapping(mapping.megatron_param, mapping.hf_param)
                if mapping.megatron_param in VOCAB_PARAMETERS
                else mapping
            )
            for mapping in mappings
        ]
        more = [
            AutoMapping(megatron_param=ours, hf_param=theirs) for ours, theirs in LOCAL_NORM_NAMES.items()
        ] + _bias_mappings()
        return MegatronMappingRegistry(*mappings, *(mapping for mapping in more if mapping.megatron_param not in known))

    def broadcast_shared_embeddings(self: Any, chunks: list[Any]) -> None:
        """Copy tied embeddings from the first pipeline stage to the last (the bridge looks for them in the first chunk
        of each rank only).
        """
        if (
            not chunks[0].share_embeddings_and_output_weights
            or parallel_state.get_pipeline_model_parallel_world_size() == 1
        ):
            return
        group = parallel_state.get_embedding_group(check_initialized=False)
        ranks = dist.get_process_group_ranks(group) if group is not None else []
        if dist.get_rank() in ranks:
            chunk = chunks[0] if dist.get_rank() == ranks[0] else chunks[-1]
            dist.broadcast(chunk.shared_embedding_or_output_weight().data, src=ranks[0], group=group)

    cls.mapping_registry, cls._extended_by_pact = mapping_registry, True
    cls._broadcast_shared_embeddings = broadcast_shared_embeddings


def _bias_mappings() -> list[MegatronParamMapping]:
    """Names of all biases that a supported architecture can have; those that a model lacks are not asked for."""
    return [
        QKVMapping(f"{_ATTENTION}.linear_qkv.bias", *(f"{_HF_ATTENTION}.{name}_proj.bias" for name in "qkv")),
        AutoMapping(megatron_param=f"{_ATTENTION}.linear_proj.bias", hf_param=f"{_HF_ATTENTION}.o_proj.bias"),
        GatedMLPMapping(f"{_MLP}.linear_fc1.bias", gate=f"{_HF_MLP}.gate_proj.bias", up=f"{_HF_MLP}.up_proj.bias"),
        AutoMapping(megatron_param=f"{_MLP}.linear_fc2.bias", hf_param=f"{_HF_MLP}.down_proj.bias"),
    ]


def _extend_expert_names() -> None:
    """Number the experts of ``local_experts`` (separate modules, without Transformer Engine) over the expert-parallel
    ranks.
    """
    if getattr(model_bridge, "_extended_by_pact", False):
        return
    original_name, original_gather = (
        model_bridge._megatron_local_name_to_global,
        MegatronParamMapping.gather_from_ep_ranks,
    )

    def local_name_to_global(models: Any, config: Any, name: str, *args: Any, **kwargs: Any) -> str:
        local = LOCAL_EXPERT.search(name)
        name = original_name(models, config, name, *args, **kwargs)
        found = LOCAL_EXPERT.search(name)
        if (
            found is None or local is None or found[1] != local[1]
        ):  # no separate expert, or numbered by the bridge itself (from 0.6 on)
            return name
        size, rank = (
            parallel_state.get_expert_model_parallel_world_size(),
            parallel_state.get_expert_model_parallel_rank(),
        )
        first = rank * (config.num_moe_experts or 0) // size
        return LOCAL_EXPERT.sub(lambda match: f".local_experts.{int(match[1]) + first}.", name)

    def gather_from_ep_ranks(self: Any, weights: Any, module: Any, hf_param: Any) -> Any:
        match = LOCAL_EXPERT.search(self.megatron_param)
        if match:  # the original reads the expert's number behind the parameter's name, as grouped experts have it
            self = copy.copy(self)
            self.megatron_param = f"experts.weight{match[1]}"
        return original_gather(self, weights, module, hf_param)

    model_bridge._megatron_local_name_to_global = local_name_to_global
    MegatronParamMapping.gather_from_ep_ranks = gather_from_ep_ranks
    model_bridge._extended_by_pact = True


def _speed_up_export() -> None:
    """Split q, k and v by strides and clean the configuration once a model.

    The bridge gathers their rows by index, which torch does element by element on the CPU, and copies the configuration
    anew for each layer: together most of an export's time.
    """
    if getattr(param_mapping, "_extended_by_pact", False):
        return
    original_split, original_clean = param_mapping.split_qkv_weights, param_mapping.remove_non_pickleables
    cleaned: list[tuple[Any, int, Any]] = []  # the latest configuration, the depth, its cleaned copy

    def split_qkv_weights(provider: Any, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if qkv.ndim != 2 or getattr(provider, "attention_output_gate", False):
            return original_split(provider, qkv)
        groups, hidden = provider.num_query_groups, qkv.shape[1]
        each = provider.num_attention_heads // groups
        heads = qkv.view(groups, each + 2, -1, hidden)  # of a group: its query heads, then a key and a value head
        return tuple(part.reshape(-1, hidden) for part in (heads[:, :each], heads[:, each], heads[:, each + 1]))  # type: ignore[return-value]

    def remove_non_pickleables(config: Any, max_depth: int = 3, **kwargs: Any) -> Any:
        if not cleaned or cleaned[0][0] is not config or cleaned[0][1] != max_depth:
            cleaned[:] = [(config, max_depth, original_clean(config, max_depth=max_depth, **kwargs))]
        return cleaned[0][2]

    param_mapping.split_qkv_weights, param_mapping.remove_non_pickleables = split_qkv_weights, remove_non_pickleables
    param_mapping._extended_by_pact = True


def export_weights(bridge: AutoBridge, chunks: list[Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Hugging Face names and full tensors, gathered over TP and PP one at a time; collective, every rank gets every
    tensor, on its own device. They may share memory with the parameters."""
    vocab_size = chunks[0].true_vocab_size
    vocab_names = {
        mapping.hf_param
        for mapping in bridge._model_bridge.mapping_registry().mappings
        if mapping.megatron_param in VOCAB_PARAMETERS
    } | {"lm_head.weight"}
    if not hasattr(
        bridge, "_tasks_of_pact"
    ):  # walks over all modules for each layer: a third of the time of an export of a small model
        bridge._tasks_of_pact = bridge.get_conversion_tasks(chunks)
    for name, tensor in bridge.export_hf_weights(
        chunks, cpu=False, show_progress=False, conversion_tasks=bridge._tasks_of_pact
    ):
        yield name, tensor[:vocab_size] if name in vocab_names else tensor
