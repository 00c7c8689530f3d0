"""The policy network: Megatron-core's GPT model on packed token trees.

Differences to ``GPTModel``: rotary angles come from each token's depth in its tree; core attention is
:class:`~pact_nemo.policy.attention.TreeCoreAttention`; the last stage returns log-probabilities of the scored tokens
instead of logits.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pact_nemo.errors import ConfigError
from pact_nemo.policy import fused
from pact_nemo.policy.architectures import Architecture
from pact_nemo.policy.attention import TreeBatch
from pact_nemo.policy.config import PolicyConfig
from pact_nemo.policy.device import has_transformer_engine, local_device
from pact_nemo.policy.fp8 import emulate
from pact_nemo.policy.heads import vocab_parallel_logprobs_and_entropies
from pact_nemo.policy.layer_spec import layer_spec
from pact_nemo.policy.megatron_import import prepare_megatron

prepare_megatron()

from megatron.core import tensor_parallel  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.pipeline_parallel.utils import (  # noqa: E402
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.transformer.transformer_block import (  # noqa: E402
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)


class PactGPTModel(GPTModel):
    """One pipeline stage of the policy. Call with ``packed_seq_params=TreeBatch``; the last stage returns [S_local]
    float32 log-probs.
    """

    logprob_chunk: int
    true_vocab_size: int
    rotates_itself: bool  #: core attention turns queries and keys, by angles that are computed once a micro-batch
    base_is_frozen: bool = False  #: only adapters are trained

    def _preprocess(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, decoder_input: Any = None, **kwargs: Any
    ) -> tuple[Any, ...]:
        """Embeddings on the first stage; rotary angles [T_local, 1, 1, d] of this micro-batch's positions on every
        stage.
        """
        batch: TreeBatch = kwargs["packed_seq_params"]
        if decoder_input is None and self.pre_process:
            decoder_input = self._embed(input_ids, position_ids)
            if self.base_is_frozen and self.config.recompute_granularity == "full" and torch.is_grad_enabled():
                # a recomputed layer has a backward pass only where its input wants a gradient
                decoder_input = decoder_input.detach().requires_grad_()
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
    transformer_engine = cuda and has_transformer_engine()
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
        mark_tensor_parallel(model)
        if config.fp8_emulate and provider.fp8 is not None:
            emulate(model, model.config)
        chunks.append(model)
    return chunks


def mark_tensor_parallel(model: torch.nn.Module) -> None:
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
