"""megatron's configuration of a model (a provider of Megatron-Bridge): the architecture, then layout, precision and
kernels.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F

from pact_nemo.errors import ConfigError
from pact_nemo.policy.architectures import Architecture
from pact_nemo.policy.config import PolicyConfig
from pact_nemo.policy.fp8 import HISTORY, number_format
from pact_nemo.policy.megatron_import import prepare_megatron

prepare_megatron()

from megatron.bridge.models.gpt_provider import GPTModelProvider  # noqa: E402


def build_provider(architecture: Architecture) -> GPTModelProvider:
    """Megatron's configuration of a model, before layout and precision (:func:`configure_provider`).

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
        # one flag for all other matrices in megatron; layer_spec.layer_spec adds those that are there
        add_bias_linear=False,
    )
    # read by our attention, in megatron's own words: tokens to the left and to the right
    if architecture.window is not None:
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


def configure_provider(provider: Any, config: PolicyConfig, *, cuda: bool, fp8: str | None = None) -> None:
    """Write the parallel layout, precision and kernel choices into Megatron-Bridge's provider (a TransformerConfig),
    then finalize it.

    Args:
        provider: as :func:`build_provider` makes it.
        config: layout, precision and kernels.
        cuda: the policy runs on GPUs.
        fp8: the FP8 recipe that runs, or None.

    Raises:
        ConfigError: the model can't be laid out this way (layers, heads).
    """
    _check_layout(provider, config, fp8)
    settings = _layout_settings(config) | _number_settings(config, cuda=cuda) | _kernel_settings(config, cuda=cuda)
    if config.fused_elementwise and not cuda and provider.gated_linear_unit and provider.activation_func is F.silu:
        settings["use_te_activation_func"] = True  # megatron's name for "the activation is a module": ours (layer_spec)
    if fp8 is not None:
        settings.update(_fp8_settings(provider, config, fp8))
    if config.recompute == "full":
        settings.update(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    elif config.recompute == "selective":
        settings.update(recompute_granularity="selective", recompute_modules=["core_attn"])
    for name, value in settings.items():
        if not hasattr(provider, name):
            raise ConfigError(
                f"this megatron version's TransformerConfig has no field {name}; use the versions of requirements.txt"
            )
        setattr(provider, name, value)
    with warnings.catch_warnings():
        # about CUDA graphs and Transformer Engine's attention, neither in use
        warnings.simplefilter("ignore", UserWarning)
        provider.finalize()


def _check_layout(provider: Any, config: PolicyConfig, fp8: str | None) -> None:
    """Whether layers, heads and experts can be cut as the layout asks."""
    chunks = config.pipeline_parallel * (config.virtual_pipeline or 1)
    if fp8 is not None and 2 * config.fp8_bf16_layers >= provider.num_layers:
        raise ConfigError(
            f"policy.fp8_bf16_layers={config.fp8_bf16_layers} at each end leaves none of {provider.num_layers} layers"
            " in FP8"
        )
    if provider.num_layers % chunks:
        raise ConfigError(
            f"{provider.num_layers} layers can't be cut into pipeline_parallel x virtual_pipeline = {chunks} equal"
            " parts"
        )
    if provider.num_attention_heads % config.tensor_parallel:
        raise ConfigError(
            f"{provider.num_attention_heads} attention heads can't be split over tensor_parallel ="
            f" {config.tensor_parallel}"
        )
    experts = provider.num_moe_experts or 1
    if experts % config.expert_parallel:
        raise ConfigError(
            f"{experts} expert(s) can't be split over expert_parallel = {config.expert_parallel}; dense models need 1"
        )
    if provider.num_moe_experts and config.tensor_parallel > 1 and not config.sequence_parallel:
        raise ConfigError("a mixture of experts under policy.tensor_parallel > 1 needs policy.sequence_parallel=true")


def _layout_settings(config: PolicyConfig) -> dict[str, Any]:
    """How the model is cut over ranks."""
    return dict(
        tensor_model_parallel_size=config.tensor_parallel,
        pipeline_model_parallel_size=config.pipeline_parallel,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline,
        context_parallel_size=config.context_parallel,
        expert_model_parallel_size=config.expert_parallel,
        expert_tensor_parallel_size=1,
        sequence_parallel=config.sequence_parallel,
    )


def _number_settings(config: PolicyConfig, *, cuda: bool) -> dict[str, Any]:
    """Precision, initialisation and what a gradient is a sum of."""
    bf16 = config.resolved_precision(cuda=cuda) == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    return dict(
        params_dtype=dtype,
        pipeline_dtype=dtype,
        autocast_dtype=dtype,
        bf16=bf16,
        fp16=False,
        # gradients are plain sums over tokens: no division by micro-batches, ranks or token counts anywhere
        calculate_per_token_loss=True,
        # packed rows differ in length from micro-batch to micro-batch
        variable_seq_lengths=config.pipeline_parallel > 1,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        should_pad_vocab=True,
        make_vocab_size_divisible_by=1,
        use_cpu_initialization=not cuda,
        perform_initialization=False,
    )


def _kernel_settings(config: PolicyConfig, *, cuda: bool) -> dict[str, Any]:
    """Fusions, communication and routing."""
    return dict(
        attention_softmax_in_fp32=True,
        cross_entropy_loss_fusion=False,
        # needs apex's kernel, or Transformer Engine's in every layer; what it would save: docs/cluster/performance.md
        gradient_accumulation_fusion=False,
        deallocate_pipeline_outputs=cuda,
        batch_p2p_comm=config.virtual_pipeline is None,
        overlap_p2p_comm=config.virtual_pipeline is not None,
        # our rotary angles differ per token, and the fused kernels need CUDA
        apply_rope_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=cuda,
        # compiled apart for scoring and for the update: where only one of them compiles, first ratios aren't 1
        bias_dropout_fusion=False,
        persist_layer_norm=False,
        moe_aux_loss_coeff=0.0,
        moe_token_dispatcher_type="alltoall",
        moe_permute_fusion=False,
    )


def _fp8_settings(provider: Any, config: PolicyConfig, fp8: str) -> dict[str, Any]:
    """The FP8 recipe, and which layers keep out of it."""
    settings: dict[str, Any] = dict(
        fp8=number_format(fp8),
        fp8_recipe=fp8,
        fp8_amax_history_len=HISTORY,
        fp8_amax_compute_algo="max",
        first_last_layers_bf16=config.fp8_bf16_layers > 0,
        num_layers_at_start_in_bf16=config.fp8_bf16_layers,
        num_layers_at_end_in_bf16=config.fp8_bf16_layers,
    )
    if provider.num_moe_experts and not config.fp8_emulate:
        # each expert's share of the tokens, too, to what its product needs
        settings["moe_router_padding_for_quantization"] = True
    return settings
