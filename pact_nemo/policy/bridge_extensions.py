"""What Megatron-Bridge (0.3) lacks, added to it once a process.

Names of norms of layer specs without Transformer Engine and names of biases; vocabularies that don't divide by the
tensor-parallel size; tied embeddings under virtual pipeline stages; expert parallelism over experts that are separate
modules (it loads every rank's experts from the first rank's, silently); an export that isn't slow.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from pact_nemo.policy.megatron_import import prepare_megatron

prepare_megatron()

from megatron.bridge.models.conversion import model_bridge, param_mapping  # noqa: E402
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry  # noqa: E402
from megatron.bridge.models.conversion.param_mapping import (  # noqa: E402
    AutoMapping,
    ColumnParallelMapping,
    GatedMLPMapping,
    MegatronParamMapping,
    QKVMapping,
)
from megatron.core import parallel_state  # noqa: E402

LOCAL_NORM_NAMES = {
    "decoder.layers.*.input_layernorm.weight": "model.layers.*.input_layernorm.weight",
    "decoder.layers.*.pre_mlp_layernorm.weight": "model.layers.*.post_attention_layernorm.weight",
}
_ATTENTION, _MLP = "decoder.layers.*.self_attention", "decoder.layers.*.mlp"
_HF_ATTENTION, _HF_MLP = "model.layers.*.self_attn", "model.layers.*.mlp"
VOCAB_PARAMETERS = ("embedding.word_embeddings.weight", "output_layer.weight")
LOCAL_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")


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
        # no separate expert, or numbered by the bridge itself (from 0.6 on)
        if found is None or local is None or found[1] != local[1]:
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


def extend_bridge(bridge_class: Any) -> None:
    """Add what is missing to a bridge class and to the functions that all of them share. Idempotent."""
    _extend_mappings(bridge_class)
    _extend_expert_names()
    _speed_up_export()
