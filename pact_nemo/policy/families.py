"""The supported architectures: each field of their configuration classes, and what other keys may say.

``docs/reference/models.md`` has the table in words, ``docs/extend/model.md`` says how to add a family.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

from pact_nemo.policy.hf_settings import HARMLESS, Setting, computed, flag, only, positive, whole, window_size

#: keys of every supported configuration class
_COMMON: dict[str, Setting] = {
    "vocab_size": computed(whole),
    "hidden_size": computed(whole),
    "intermediate_size": computed(whole),
    "num_hidden_layers": computed(whole),
    "num_attention_heads": computed(whole),
    "num_key_value_heads": computed(whole),
    "head_dim": computed(whole),
    "max_position_embeddings": computed(whole),
    "rms_norm_eps": computed(positive),
    "rope_parameters": computed(),  # see architectures._rope
    "tie_word_embeddings": computed(flag),
    "hidden_act": only("silu"),
    "attention_dropout": only(0.0, note="the policy has no dropout"),
    "is_encoder_decoder": only(False),
    "return_dict": only(True, note="transformers itself can't run the model with it"),
    "architectures": computed(),  # see hf_config.family_of
    # what other heads, printing, generation and initialisation use
    "transformers_version": HARMLESS,
    "output_hidden_states": HARMLESS,
    "dtype": HARMLESS,  # of the file; the policy computes in policy.precision
    "chunk_size_feed_forward": HARMLESS,
    "id2label": HARMLESS,
    "label2id": HARMLESS,
    "problem_type": HARMLESS,
    "initializer_range": HARMLESS,
    "use_cache": HARMLESS,
    "pad_token_id": HARMLESS,
    "bos_token_id": HARMLESS,
    "eos_token_id": HARMLESS,
}
_LAYER_WINDOWS: dict[str, Setting] = {
    "use_sliding_window": computed(flag),
    "sliding_window": computed(window_size),
    "max_window_layers": computed(),
    "layer_types": computed(),
}
_EXPERTS: dict[str, Setting] = {
    "attention_bias": computed(flag),
    "use_sliding_window": computed(flag),
    "sliding_window": computed(window_size),
    "moe_intermediate_size": computed(whole),
    "num_experts": computed(whole),
    "num_experts_per_tok": computed(whole),
    "norm_topk_prob": computed(flag),
    "decoder_sparse_step": only(1, note="a model that mixes dense and expert layers is not supported"),
    "mlp_only_layers": only([], note="a model that mixes dense and expert layers is not supported"),
    # of transformers' own auxiliary loss, which is no part of the objective
    "output_router_logits": HARMLESS,
    "router_aux_loss_coef": HARMLESS,
}


@dataclass(frozen=True)
class Family:
    """A supported architecture.

    Attributes:
        architecture: its name in ``architectures``.
        model_type: its name in ``model_type``; also transformers' module.
        config_name: transformers' configuration class.
        settings: each field of that class, and the keys that its model reads without declaring them.
        qk_norm: queries and keys are normalised.
    """

    architecture: str
    model_type: str
    config_name: str
    settings: dict[str, Setting] = field(repr=False)
    qk_norm: bool = False

    @property
    def config_class(self) -> Any:
        module = importlib.import_module(f"transformers.models.{self.model_type}.configuration_{self.model_type}")
        return getattr(module, self.config_name)


FAMILIES = {
    family.architecture: family
    for family in (
        Family(
            "LlamaForCausalLM",
            "llama",
            "LlamaConfig",
            _COMMON | {"attention_bias": computed(flag), "mlp_bias": computed(flag), "pretraining_tp": HARMLESS},
        ),
        Family("MistralForCausalLM", "mistral", "MistralConfig", _COMMON | {"sliding_window": computed(window_size)}),
        Family("Qwen2ForCausalLM", "qwen2", "Qwen2Config", _COMMON | _LAYER_WINDOWS),
        Family(
            "Qwen3ForCausalLM",
            "qwen3",
            "Qwen3Config",
            _COMMON | _LAYER_WINDOWS | {"attention_bias": computed(flag)},
            qk_norm=True,
        ),
        Family("Qwen3MoeForCausalLM", "qwen3_moe", "Qwen3MoeConfig", _COMMON | _EXPERTS, qk_norm=True),
    )
}
MODEL_TYPES = {family.model_type: family for family in FAMILIES.values()}

#: keys outside of a configuration class that change no log-probability, whatever they say
_HARMLESS_KEYS = frozenset(
    """
    model_type torch_dtype _name_or_path name_or_path _commit_hash num_labels output_attentions tokenizer_class
    prefix sep_token_id cls_token_id
    mask_token_id unk_token_id decoder_start_token_id task_specific_params finetuning_task torchscript use_bfloat16
    tf_legacy_loss
    _attn_implementation attn_implementation _attn_implementation_autoset _attn_implementation_internal
    _experts_implementation
    experts_implementation _experts_implementation_internal use_flash_attn _flash_attn_2_enabled
    gradient_checkpointing is_decoder max_sequence_length
    model_max_length tie_last_hidden_states unsloth_version unsloth_fixed is_llama_config transformers.js_config
    keys_to_ignore_at_inference
    router_jitter_noise_eval license language tags base_model model_name generation_config
    rope_theta rope_scaling max_window_layers quantization_config
    """.split()
)  # the last line: read by the configuration class, superseded by its model, or checked with the tensors

#: keys outside of a configuration class, and what they say when they describe the model that is computed anyway
_NEUTRAL_KEYS: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "first_k_dense_replace": (0,),
    "n_group": (1,),
    "n_shared_experts": (0,),
    "routed_scaling_factor": (1.0,),
    "router_jitter_noise": (0.0,),
    "scoring_func": ("softmax",),
    "shared_expert_intermediate_size": (0,),
    "topk_group": (1,),
    "attention_bias": (False,),
    "attn_output_gate": (False,),
    "embd_pdrop": (0.0,),
    "embedding_multiplier": (1.0,),
    "hidden_dropout": (0.0,),
    "is_causal": (True,),
    "logit_scale": (1.0,),
    "logits_scaling": (1.0,),
    "mlp_bias": (False,),
    "num_nextn_predict_layers": (0,),
    "partial_rotary_factor": (1.0,),
    "per_layer_config": ({},),
    "pruned_heads": ({},),
    "resid_pdrop": (0.0,),
    "residual_multiplier": (1.0,),
    "rope_interleaved": (False,),
    "scale_embeddings": (False,),
    "tie_encoder_decoder": (False,),
    "use_bidirectional_attention": (False,),
    "use_mrope": (False,),
    "use_parallel_residual": (False,),
    "use_sliding_window": (False,),
}


def neutral_values(family: Family, key: str) -> tuple[Any, ...]:
    """What a key outside of the family's class may say; some depend on what the family computes without being told."""
    own = {
        "qkv_bias": family.model_type == "qwen2",
        "use_qk_norm": family.qk_norm,
        "qk_norm": family.qk_norm,
        "qk_layernorm": family.qk_norm,
    }
    return (own[key],) if key in own else _NEUTRAL_KEYS.get(key, ())


def harmless_keys() -> frozenset[str]:
    """Keys outside of a configuration class that change no log-probability, whatever they say. Among them are sampling
    settings that older folders keep in ``config.json``; transformers takes them out.
    """
    from transformers import GenerationConfig

    return _HARMLESS_KEYS | frozenset(GenerationConfig._get_default_generation_params())
