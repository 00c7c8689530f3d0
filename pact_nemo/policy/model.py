"""The policy network: Megatron-core's GPT model on packed token trees.

Differences to ``GPTModel``: rotary angles come from each token's depth in its tree, core attention is
:class:`TreeCoreAttention`, and the last stage returns log-probabilities of the scored tokens instead of logits.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pact_nemo.errors import ConfigError
from pact_nemo.policy import fused
from pact_nemo.policy.architectures import Architecture
from pact_nemo.policy.attention import TreeBatch, TreeCoreAttention
from pact_nemo.policy.config import PolicyConfig
from pact_nemo.policy.device import local_device
from pact_nemo.policy.distributed import patience
from pact_nemo.policy.fp8 import HISTORY, emulate, number_format
from pact_nemo.policy.fused import SwiGLU
from pact_nemo.policy.heads import vocab_parallel_logprobs_and_entropies
from pact_nemo.policy.megatron_import import prepare_megatron

prepare_megatron()

from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import (  # noqa: E402
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.pipeline_parallel.utils import (  # noqa: E402
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.transformer.spec_utils import ModuleSpec  # noqa: E402
from megatron.core.transformer.transformer_block import (  # noqa: E402
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)


class PlainRMSNorm(torch.nn.Module):
    """Torch's RMSNorm for specs without Transformer Engine; unlike megatron's wrapper of it, it works under sequence
    parallelism.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # megatron sums the gradients of parameters so marked over the tensor-parallel ranks
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class RMSNorm(PlainRMSNorm):
    """The same in one autograd function."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return fused.rms_norm(x, self.weight, self.eps)


class PactGPTModel(GPTModel):
    """One pipeline stage of the policy. Call with ``packed_seq_params=TreeBatch``; the last stage returns [S_local]
    float32 log-probs.
    """

    logprob_chunk: int
    true_vocab_size: int
    rotates_itself: bool  #: core attention turns queries and keys, by angles that are computed once a micro-batch

    def _preprocess(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, decoder_input: Any = None, **kwargs: Any
    ) -> tuple[Any, ...]:
        """Embeddings on the first stage; rotary angles [T_local, 1, 1, d] of this micro-batch's positions on every
        stage.
        """
        batch: TreeBatch = kwargs["packed_seq_params"]
        if decoder_input is None and self.pre_process:
            decoder_input = self._embed(input_ids, position_ids)
        if not self.rotates_itself:
            return decoder_input, self._rotary(batch.position_ids), None, None, None, None
        angles = torch.outer(batch.position_ids.to(torch.float32), self.rotary_pos_emb.inv_freq)[:, None, None, :]
        batch.rotation = (angles.cos().to(self.config.params_dtype), angles.sin().to(self.config.params_dtype))
        return decoder_input, None, None, None, None, None

    def _embed(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        weight = self.embedding.word_embeddings.weight
        main_grad = getattr(weight, "main_grad", None)
        if not (
            self.rotates_itself
            and torch.is_grad_enabled()
            and main_grad is not None
            and self.pg_collection.tp.size() == 1
        ):
            return self.embedding(input_ids=input_ids, position_ids=position_ids)  # type: ignore[no-any-return]
        with torch.no_grad():
            rows = self.embedding(input_ids=input_ids, position_ids=position_ids)
        weight.grad_added_to_main_grad = True
        weight.zero_out_wgrad = False  # set for tied weights: megatron's hook would add the placeholder, too
        return fused.embedded(rows, weight, input_ids, main_grad)

    def _rotary(self, position_ids: torch.Tensor) -> torch.Tensor:
        """Angles [T, 1, 1, d] in float32, rotate-half layout."""
        frequencies = self.rotary_pos_emb.inv_freq
        angles = torch.outer(position_ids.to(frequencies.dtype), frequencies)
        return torch.cat([angles, angles], dim=-1)[:, None, None, :]

    def _postprocess(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Last stage: log-probs of the scored tokens, [S_local]; other stages: hidden states unchanged."""
        if not self.post_process:
            return hidden_states
        batch: TreeBatch = kwargs["packed_seq_params"]
        weight = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            hidden_states = tensor_parallel.gather_from_sequence_parallel_region(hidden_states, group=group)
            hidden_SH = hidden_states[:, 0].index_select(0, batch.source_index)
        else:
            hidden_SH = hidden_states[:, 0].index_select(0, batch.source_index)
            hidden_SH = tensor_parallel.copy_to_tensor_model_parallel_region(hidden_SH, group=group)
        logprobs, batch.entropy = vocab_parallel_logprobs_and_entropies(
            hidden_SH,
            weight,
            batch.target_ids,
            vocab_size=self.true_vocab_size,
            chunk=self.logprob_chunk,
            temperature=batch.temperature,
            group=group,
            entropy=batch.wants_entropy,
            overwrite_hidden=True,  # a gathered copy that nothing else keeps
            **self._weight_gradient(weight),
        )
        return logprobs

    def _weight_gradient(self, weight: torch.Tensor) -> dict[str, Any]:
        """Where the output matrix's gradient goes: straight into megatron's float32 buffer, if it can, without a copy
        of V x H elements.

        A tied matrix on a stage without the embedding (pipeline) takes autograd's way: megatron adds whatever autograd
        brings for it.
        """
        main_grad = getattr(weight, "main_grad", None)
        tied = self.share_embeddings_and_output_weights
        if main_grad is None or (tied and not self.pre_process):
            return {}
        if not tied:
            weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]  # or megatron's hook would add the placeholder
        return {
            "main_grad": main_grad,
            "placeholder": not tied,
        }  # tied: the embedding's gradient, which comes later, calls the hook


def layer_spec(
    provider: Any, architecture: Architecture, *, transformer_engine: bool, attention: str, fused_elementwise: bool
) -> ModuleSpec:
    """Layer spec with our core attention: Transformer Engine modules if asked for, local ones with our RMSNorm and
    activation otherwise.
    """
    moe = dict(
        num_experts=provider.num_moe_experts,
        moe_grouped_gemm=provider.moe_grouped_gemm,
        qk_layernorm=provider.qk_layernorm,
    )
    if transformer_engine:
        spec = get_gpt_layer_with_transformer_engine_spec(**moe)
    else:
        spec = get_gpt_layer_local_spec(**{**moe, "moe_grouped_gemm": False}, normalization=provider.normalization)
        norm = RMSNorm if fused_elementwise else PlainRMSNorm
        spec.submodules.input_layernorm = norm
        spec.submodules.pre_mlp_layernorm = norm
        if provider.qk_layernorm:
            _submodules(spec.submodules.self_attention).q_layernorm = norm
            _submodules(spec.submodules.self_attention).k_layernorm = norm
        if provider.use_te_activation_func:
            _set_activation(spec.submodules.mlp)
    if attention != "te":
        _submodules(spec.submodules.self_attention).core_attention = TreeCoreAttention
    if architecture.output_bias:
        inner = _submodules(spec.submodules.self_attention)
        inner.linear_proj = _with_bias(inner.linear_proj)
    if architecture.mlp_bias:
        inner = _submodules(spec.submodules.mlp)
        inner.linear_fc1, inner.linear_fc2 = _with_bias(inner.linear_fc1), _with_bias(inner.linear_fc2)
    return spec


def _with_bias(linear: Any) -> type:
    """A linear layer's class that has a bias whatever it is told: megatron has one flag for all of them, models have
    several.

    The class keeps its name, by which Megatron-Bridge knows how a layer is cut over ranks.

    Raises:
        ConfigError: this version of megatron-core builds linear layers from something else than classes.
    """
    if not isinstance(linear, type):
        raise ConfigError(
            f"this megatron-core builds linear layers from {type(linear).__name__}; use the versions of"
            " requirements.txt"
        )

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        linear.__init__(self, *args, **{**kwargs, "bias": True})  # type: ignore[misc]

    return type(linear.__name__, (linear,), {"__init__": __init__, "__module__": linear.__module__})


def _submodules(builder: Any) -> Any:
    """The submodules that a layer's part is built with: megatron-core says them in a ModuleSpec (0.16) or in a
    ``functools.partial`` (0.19).

    Raises:
        ConfigError: neither, so this version of megatron-core says them in a way that isn't known here.
    """
    found = (
        builder.keywords.get("submodules")
        if isinstance(builder, functools.partial)
        else getattr(builder, "submodules", None)
    )
    if found is None:
        raise ConfigError(
            f"this megatron-core describes a layer's parts by {type(builder).__name__}; use the versions of"
            " requirements.txt"
        )
    return found


def _set_activation(builder: Any) -> None:
    """Put our SwiGLU where MLPs look for an activation module: the dense one's, or that of routed and shared
    experts.
    """
    submodules = _submodules(builder)
    if hasattr(submodules, "activation_func"):
        submodules.activation_func = SwiGLU
        return
    for name in ("experts", "shared_experts"):
        inner = getattr(submodules, name, None)
        if inner is not None:
            _set_activation(inner)


def configure_provider(provider: Any, config: PolicyConfig, *, cuda: bool, fp8: str | None = None) -> None:
    """Write the parallel layout, precision and kernel choices into Megatron-Bridge's provider (a TransformerConfig),
    then finalize it.

    ``fp8`` is the FP8 recipe that runs, or None.

    Raises:
        ConfigError: the model can't be laid out this way (layers, heads).
    """
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
    bf16 = config.resolved_precision(cuda=cuda) == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    settings: dict[str, Any] = dict(
        tensor_model_parallel_size=config.tensor_parallel,
        pipeline_model_parallel_size=config.pipeline_parallel,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline,
        context_parallel_size=config.context_parallel,
        expert_model_parallel_size=config.expert_parallel,
        expert_tensor_parallel_size=1,
        sequence_parallel=config.sequence_parallel,
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
        attention_softmax_in_fp32=True,
        cross_entropy_loss_fusion=False,
        gradient_accumulation_fusion=False,
        deallocate_pipeline_outputs=cuda,
        batch_p2p_comm=config.virtual_pipeline is None,
        overlap_p2p_comm=config.virtual_pipeline is not None,
        # our rotary angles differ per token, and the fused kernels need CUDA
        apply_rope_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=cuda,
        bias_dropout_fusion=cuda,
        persist_layer_norm=False,
        moe_aux_loss_coeff=0.0,
        moe_token_dispatcher_type="alltoall",
        moe_permute_fusion=False,
    )
    if config.fused_elementwise and not cuda and provider.gated_linear_unit and provider.activation_func is F.silu:
        settings["use_te_activation_func"] = True  # megatron's name for "the activation is a module": ours (layer_spec)
    if fp8 is not None:
        settings.update(
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
        warnings.simplefilter(
            "ignore", UserWarning
        )  # about CUDA graphs and Transformer Engine's attention, neither in use
        provider.finalize()


def rotary_frequencies(architecture: Architecture) -> torch.Tensor:
    """[d / 2] float32 RoPE frequencies, by the function that transformers itself uses.

    Neither Megatron-Bridge 0.3 (which looks for ``rope_theta`` where transformers 5 no longer keeps it) nor
    megatron-core (which fixes three of the llama3 scaling parameters) can be relied on here.

    Raises:
        ConfigError: a scaling of attention.
    """
    parameters, dim = dict(architecture.rope), architecture.head_dim
    kind = parameters["rope_type"]
    if kind == "default":
        return 1.0 / (parameters["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.int64).to(torch.float32) / dim))
    one_head = LlamaConfig(
        hidden_size=dim,
        num_attention_heads=1,
        head_dim=dim,
        max_position_embeddings=architecture.positions,
        rope_parameters=parameters,
    )
    frequencies, attention_factor = ROPE_INIT_FUNCTIONS[kind](one_head, torch.device("cpu"))
    if attention_factor != 1.0:
        raise ConfigError(f"RoPE scaling {kind!r} with attention factor {attention_factor} is not supported")
    return frequencies


def build_chunks(provider: Any, architecture: Architecture, config: PolicyConfig, *, cuda: bool) -> list[PactGPTModel]:
    """This rank's model chunks (one per virtual pipeline stage) with uninitialised weights, on this rank's device."""
    groups = ProcessGroupCollection.use_mpu_process_groups()
    provider._pg_collection = groups
    virtual = config.virtual_pipeline
    transformer_engine = cuda and importlib.util.find_spec("transformer_engine") is not None
    spec = layer_spec(
        provider,
        architecture,
        transformer_engine=transformer_engine,
        attention=config.attention,
        fused_elementwise=config.fused_elementwise,
    )
    final_norm = spec.submodules.input_layernorm if not transformer_engine else None
    padded = provider.vocab_size + -provider.vocab_size % config.tensor_parallel
    chunks = []
    for stage in range(virtual or 1):
        vp_stage = stage if virtual else None
        first = is_vp_first_stage(vp_stage=vp_stage, vp_size=virtual) and is_pp_first_stage(groups.pp)
        last = is_vp_last_stage(vp_stage=vp_stage, vp_size=virtual) and is_pp_last_stage(groups.pp)
        block: Any = spec
        if final_norm is not None:
            layers = get_num_layers_to_build(provider, vp_stage=vp_stage)
            block = TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=final_norm)
        provider._vp_stage = vp_stage
        model = PactGPTModel(
            provider,
            transformer_layer_spec=block,
            vocab_size=padded,
            max_sequence_length=provider.seq_length,
            parallel_output=True,
            share_embeddings_and_output_weights=provider.share_embeddings_and_output_weights,
            position_embedding_type="rope",
            rotary_percent=provider.rotary_percent,
            rotary_base=provider.rotary_base,
            rope_scaling=provider.rope_scaling,
            rope_scaling_factor=provider.rope_scaling_factor,
            seq_len_interpolation_factor=provider.seq_len_interpolation_factor,
            pre_process=first,
            post_process=last,
            pg_collection=groups,
            vp_stage=vp_stage,
        )
        model.logprob_chunk = config.logprob_chunk
        model.true_vocab_size = provider.vocab_size
        model.rotates_itself = config.fused_elementwise and config.attention != "te"
        model.rotary_pos_emb.inv_freq = rotary_frequencies(architecture).to(local_device())
        model.to(local_device())
        _mark_tensor_parallel(model)
        if config.fp8_emulate and provider.fp8 is not None:
            emulate(model, model.config)
        chunks.append(model)
    return chunks


def _mark_tensor_parallel(model: torch.nn.Module) -> None:
    """Mark which parameters are shards: megatron does so only while it initialises weights, and needs it for gradient
    norms.
    """
    for module in model.modules():
        if isinstance(module, (tensor_parallel.ColumnParallelLinear, tensor_parallel.VocabParallelEmbedding)):
            dim = 0
        elif isinstance(module, tensor_parallel.RowParallelLinear):
            dim = 1
        else:
            continue
        weight = module.weight
        if weight is not None and not hasattr(weight, "tensor_model_parallel"):
            tensor_parallel.set_tensor_model_parallel_attributes(weight, True, dim, 1)
    for name, param in model.named_parameters():
        if ".experts." in name:
            # an expert is whole on its rank, so its gradient is a sum over tensor-parallel ranks too: megatron sees
            # that with expert parallelism only, and would leave each rank with the gradient of its own tokens without
            param.allreduce = False  # type: ignore[attr-defined]
        tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(param)


_layout: tuple[Any, ...] | None = None  # of the process groups that exist


def initialize_model_parallel(config: PolicyConfig, *, seed: int) -> None:
    """Create megatron's process groups for this layout and seed its generators. Groups of the same layout are used
    again: torch keeps every group, with its sockets, until the process ends or the group is destroyed by name."""
    global _layout
    layout = (
        dist.group.WORLD,
        config.tensor_parallel,
        config.pipeline_parallel,
        config.virtual_pipeline,
        config.context_parallel,
        config.expert_parallel,
    )
    if layout != _layout or not parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.tensor_parallel,
            pipeline_model_parallel_size=config.pipeline_parallel,
            virtual_pipeline_model_parallel_size=config.virtual_pipeline,
            context_parallel_size=config.context_parallel,
            expert_model_parallel_size=config.expert_parallel,
            expert_tensor_parallel_size=1,
            distributed_timeout_minutes=int(patience(config.init_timeout_s).total_seconds() // 60),
        )
        _layout = layout
    if config.virtual_pipeline is not None:
        parallel_state.set_virtual_pipeline_model_parallel_rank(0)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
