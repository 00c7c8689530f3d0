"""``run_config.yaml`` of a Megatron-Bridge checkpoint: what its ``model`` section says of the numbers.

Megatron-Bridge builds its model from that section alone (``_target_`` names the class to call). Here it is data: it is
read without calling anything, and compared with the ``config.json`` that describes the model. Imports no megatron.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from pact_nemo.errors import CheckpointError, ConfigError
from pact_nemo.policy.architectures import Architecture
from pact_nemo.policy.model_source import RUN_CONFIG

#: what megatron-core fixes of Llama 3's scaled RoPE; only the factor is a setting
_LLAMA3_FIXED = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
#: settings that compute something else than the policy does, with their values that don't; absent ones came later
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "normalization": ("RMSNorm",),
    "gated_linear_unit": (True,),
    "position_embedding_type": ("rope",),
    "rotary_percent": (1.0,),
    "rotary_interleaved": (False,),
    "layernorm_zero_centered_gamma": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "multi_latent_attention": (False,),
    "attention_output_gate": (False,),
    "qk_l2_norm": (False,),
    "softmax_scale": (None,),
    "softmax_type": ("vanilla",),
    "no_rope_freq": (None,),
    "activation_func_clamp_value": (None,),
    "glu_linear_offset": (0.0,),
    "linear_attention_freq": (None,),
    "experimental_attention_variant": (None,),
    "heterogeneous_block_specs": (False,),
    "mtp_num_layers": (None, 0),
    "moe_layer_freq": (1,),
    "moe_shared_expert_intermediate_size": (None, 0),
    "moe_router_score_function": ("softmax",),
    "moe_router_num_groups": (None,),
    "moe_router_enable_expert_bias": (False,),
    "moe_router_topk_scaling_factor": (None,),
    "moe_latent_size": (None,),
    "moe_apply_probs_on_input": (False,),
    "restore_modelopt_state": (False,),
    "is_hybrid_model": (False,),
}


def read_run_config(save: Path) -> dict[str, Any]:
    """The file as plain data; nothing that it names is imported.

    Raises:
        CheckpointError: it can't be read, or has no ``model`` section.
    """
    path = save / RUN_CONFIG
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        text = " ".join(str(error).split())
        raise CheckpointError(f"{path} can't be read ({text}); copy that checkpoint again") from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise CheckpointError(f"{path} has no section model; take a checkpoint that Megatron-Bridge wrote")
    return content


def check_run_config(save: Path, architecture: Architecture, described: Path) -> None:
    """Refuse a checkpoint whose model is not the one of ``config.json``.

    Args:
        save: one save.
        architecture: what ``config.json`` asks for.
        described: the folder that it is in.

    Raises:
        CheckpointError: a setting contradicts ``config.json``, or the checkpoint is of adapters or of another kind.
        ConfigError: Megatron-Bridge can't compute this architecture, so no checkpoint of its own can be it.
    """
    content = read_run_config(save)
    model, where = content["model"], save / RUN_CONFIG
    if content.get("peft") is not None:
        raise CheckpointError(
            f"{where}: peft is set, so the checkpoint holds adapters; merge them with Megatron-Bridge's PEFT tools, and"
            " give the merged checkpoint"
        )
    for key, wanted in bridge_settings(architecture).items():
        found = _found(model, key)
        if not _same(found, wanted):
            raise CheckpointError(
                f"{where}: model.{key} is {found!r}, {described / 'config.json'} asks for {wanted!r}; give"
                " model.hf_config the folder of the checkpoint's own model"
            )
    for key, values in _NEUTRAL.items():
        if key in model and not any(_same(model[key], value) for value in values):
            raise CheckpointError(
                f"{where}: model.{key} is {model[key]!r}, and the policy computes only"
                f" {' or '.join(map(repr, values))}; take a checkpoint of {architecture.family} as it was published"
            )


def bridge_settings(model: Architecture) -> dict[str, Any]:
    """Settings of the ``model`` section, as an architecture needs them: plain data, functions by their names.

    Raises:
        ConfigError: megatron-core has no setting for a part of it, so Megatron-Bridge can't compute it.
    """
    wanted: dict[str, Any] = {
        "num_layers": model.layers,
        "hidden_size": model.hidden,
        "num_attention_heads": model.heads,
        "num_query_groups": model.kv_heads,
        "kv_channels": model.head_dim,
        "vocab_size": model.vocab,
        "layernorm_epsilon": model.eps,
        "share_embeddings_and_output_weights": model.tied,
        "qk_layernorm": model.qk_norm,
        "activation_func": "torch.nn.functional.silu",
        "num_moe_experts": model.experts or None,
        "window_size": None if model.window is None else [model.window - 1, 0],
        **_biases(model),
        **_rope(model),
    }
    if model.window is not None:
        wanted["window_attn_skip_freq"] = [int(window is not None) for window in model.windows]
    if not model.experts:
        return wanted | {"ffn_hidden_size": model.intermediate}
    return wanted | {
        "moe_ffn_hidden_size": model.expert_intermediate,
        "moe_router_topk": model.experts_per_token,
        "moe_router_pre_softmax": not model.normalise_top_k,
    }


def model_section(model: Architecture, dtype: str) -> dict[str, Any]:
    """The ``model`` section that Megatron-Bridge builds an architecture from, for one rank and with its own layers.

    What is not said is the default of its class, so that versions with other settings read it.

    Args:
        dtype: of the weights, ``float32`` or ``bfloat16``.

    Raises:
        ConfigError: see :func:`bridge_settings`.
    """
    kind = {"_target_": f"torch.{dtype}", "_call_": False}
    settings = bridge_settings(model)
    settings["activation_func"] = {"_target_": settings["activation_func"], "_call_": False}
    if model.experts:
        settings |= {"moe_grouped_gemm": True, "moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.0}
    return {
        "_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider",
        **settings,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "position_embedding_type": "rope",
        "seq_length": model.positions,
        "should_pad_vocab": True,
        "make_vocab_size_divisible_by": 1,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "bf16": dtype == "bfloat16",
        **dict.fromkeys(("params_dtype", "pipeline_dtype", "autocast_dtype"), kind),
        **dict.fromkeys(("tensor_model_parallel_size", "pipeline_model_parallel_size"), 1),
    }


def _biases(model: Architecture) -> dict[str, bool]:
    """megatron has one flag for the biases of all matrices, and one for queries, keys and values alone."""
    if model.output_bias != model.mlp_bias:
        raise ConfigError(
            f"{model.family} with a bias in attention's output (attention_bias={model.output_bias}) and"
            f" mlp_bias={model.mlp_bias} has no Megatron-Bridge checkpoint: Megatron-Bridge has one flag for both; use"
            " Hugging Face folders"
        )
    return {"add_bias_linear": model.mlp_bias, "add_qkv_bias": model.qkv_bias and not model.mlp_bias}


def _rope(model: Architecture) -> dict[str, Any]:
    """Rotary embeddings in megatron-core's words."""
    parameters = dict(model.rope)
    kind = parameters["rope_type"]
    wanted: dict[str, Any] = {
        "rotary_base": parameters["rope_theta"],
        "rope_scaling": kind == "llama3",
        "seq_len_interpolation_factor": parameters["factor"] if kind == "linear" else None,
    }
    if kind == "llama3":
        other = {key: parameters[key] for key, value in _LLAMA3_FIXED.items() if not _same(parameters[key], value)}
        if other:
            raise ConfigError(
                f"RoPE scaling llama3 with {other} has no Megatron-Bridge checkpoint: megatron-core fixes"
                f" {_LLAMA3_FIXED}; use Hugging Face folders"
            )
        wanted["rope_scaling_factor"] = parameters["factor"]
    return wanted


def _found(model: dict[str, Any], key: str) -> Any:
    """A setting of the ``model`` section, with megatron's meaning of an absent one."""
    value = model.get(key)
    if isinstance(value, dict) and isinstance(value.get("_target_"), str):  # a function, as Megatron-Bridge writes one
        return value["_target_"]
    if key == "num_query_groups" and value is None:
        return model.get("num_attention_heads")
    if key == "kv_channels" and value is None:
        hidden, heads = model.get("hidden_size"), model.get("num_attention_heads")
        return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads > 0 else None
    if key == "add_qkv_bias":
        return bool(value) and not model.get("add_bias_linear")
    return value


def _same(found: Any, wanted: Any) -> bool:
    if isinstance(found, bool) or isinstance(wanted, bool):
        return found is wanted
    if isinstance(found, list | tuple) and isinstance(wanted, list | tuple):
        return list(found) == list(wanted)
    return bool(found == wanted)
