"""Which models the policy computes: what a folder's ``config.json`` asks for, with every default filled in.

A setting is *computed* (any value that passes its check is honoured), *harmless* (it changes no log-probability),
or accepted with *some values only*. Everything else is refused before weights are read. Defaults of absent keys are
those of the transformers configuration class, because that class decides what the folder means.

No Megatron and no weights here: :func:`check_architecture` reads ``config.json`` alone.
:mod:`pact_nemo.policy.families` has the supported architectures and their settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pact_nemo.errors import ConfigError
from pact_nemo.policy.families import MODEL_TYPES, Family
from pact_nemo.policy.hf_config import family_of, read_config, resolve, unsupported
from pact_nemo.policy.hf_settings import among, name_layers, positive, refusal, show

FULL, SLIDING = "full_attention", "sliding_attention"  # transformers' names of layer types

#: keys of a rope parameter set, by type; types that depend on the length of a sequence or scale attention are refused
_ROPE_KEYS = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
}
_ROPE_COMMON = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})


@dataclass(frozen=True)
class Architecture:
    """What the policy computes, with every default filled in. Two folders with equal ones differ in their weights only.

    Attributes:
        family: name of the architecture.
        windows: of each layer, the number of positions that a token sees, itself included; None = all earlier ones.
        qkv_bias: queries, keys and values have biases.
        output_bias: attention's output projection has a bias.
        mlp_bias: the feed-forward matrices have biases.
        qk_norm: queries and keys are normalised per head.
        experts: routed experts a layer; 0 = dense.
        normalise_top_k: a token's routing weights are divided by their sum.
        rope: rotary parameters as transformers has them after its own reading.
    """

    family: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    positions: int
    eps: float
    tied: bool
    windows: tuple[int | None, ...]
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    experts: int
    experts_per_token: int
    expert_intermediate: int
    normalise_top_k: bool
    rope: tuple[tuple[str, Any], ...]

    @property
    def window(self) -> int | None:
        """The one window size of the layers that have one; None = no layer has one."""
        return next((window for window in self.windows if window is not None), None)


def check_architecture(source: Mapping[str, Any] | str | Path, *, attention: str = "auto") -> Architecture:
    """Read a ``config.json`` and refuse what the policy does not compute.

    Args:
        source: a model folder, its ``config.json``, or the file's contents.
        attention: ``policy.attention``; Transformer Engine's kernels are not given sliding windows.

    Raises:
        ConfigError: the file can't be read, or names an architecture or a setting that is not computed. The message has
            the file, key, value, layers and remedy.
    """
    raw, where = read_config(source)
    family = family_of(raw, where)
    resolved = resolve(family, raw, where)
    return _describe(family, raw, resolved, where, attention)


def resolve_sizes(config: Mapping[str, Any]) -> Architecture:
    """Like :func:`check_architecture`, of a configuration that may lack ``architectures``: sizes of a model that is
    planned, not loaded.
    """
    family = MODEL_TYPES.get(str(config.get("model_type")))
    if family is None:
        raise unsupported("config.json", "model_type", config.get("model_type"))
    return check_architecture({**config, "architectures": [family.architecture]})


def _describe(family: Family, raw: dict[str, Any], config: Any, where: str, attention: str) -> Architecture:
    """Check every value of a resolved configuration, and what they say together."""
    layers = _value(config, "num_hidden_layers")
    everywhere = name_layers(range(layers)) if isinstance(layers, int) else "all layers"
    _check_values(family, raw, config, where, everywhere)
    head_dim = _head_dim(raw, config, where, everywhere)
    experts, per_token = _experts(family, config, where, everywhere)
    windows = _windows(family, config, where)
    if attention == "te" and any(windows):
        raise ConfigError(
            f"{where}: sliding_window={show(config.sliding_window)}"
            f" ({name_layers([i for i, window in enumerate(windows) if window])}): Transformer Engine's attention is"
            " not given windows here; set policy.attention=tree_sdpa"
        )
    bias = bool(getattr(config, "attention_bias", False)) if "attention_bias" in family.settings else False
    return Architecture(
        family=family.architecture,
        layers=layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        vocab=config.vocab_size,
        positions=config.max_position_embeddings,
        eps=float(config.rms_norm_eps),
        tied=config.tie_word_embeddings,
        windows=windows,
        qkv_bias=bias or family.model_type == "qwen2",  # Qwen2 has these biases without a setting
        output_bias=bias,
        mlp_bias=config.mlp_bias if "mlp_bias" in family.settings else False,
        qk_norm=family.qk_norm,
        experts=experts,
        experts_per_token=per_token,
        expert_intermediate=config.moe_intermediate_size if experts else 0,
        normalise_top_k=config.norm_topk_prob if experts else False,
        rope=_rope(raw, config.rope_parameters, where, everywhere),
    )


def _check_values(family: Family, raw: dict[str, Any], config: Any, where: str, everywhere: str) -> None:
    """Each setting of the family by itself."""
    layers = _value(config, "num_hidden_layers")
    for key, setting in family.settings.items():
        value = _value(config, key)
        # Qwen2 and Qwen3-MoE don't declare it, and read it if it is there
        if key == "head_dim" and value is None and "head_dim" not in raw:
            value = config.hidden_size // config.num_attention_heads
        if problem := setting.problem(value):
            concerned = everywhere
            if key == "mlp_only_layers" and isinstance(value, list):
                concerned = name_layers(value)
            elif key == "decoder_sparse_step" and isinstance(value, int) and value > 0:
                concerned = name_layers([layer for layer in range(layers) if (layer + 1) % value])
            raise refusal(where, key, value, f"({concerned}) {problem}")


def _head_dim(raw: dict[str, Any], config: Any, where: str, everywhere: str) -> int:
    """Numbers of one attention head, checked together with the counts of heads."""
    heads, kv_heads, hidden = config.num_attention_heads, config.num_key_value_heads, config.hidden_size
    head_dim: int = getattr(config, "head_dim", None) or hidden // heads
    if heads % kv_heads:
        raise refusal(
            where, "num_key_value_heads", kv_heads, f"({everywhere}) num_attention_heads={heads} is no multiple of it"
        )
    if head_dim < 2 or head_dim % 2:
        found = "" if "head_dim" in raw else f"it is hidden_size={hidden} over num_attention_heads={heads}; "
        raise refusal(where, "head_dim", head_dim, f"({everywhere}) {found}rotary embeddings need an even number")
    return head_dim


def _experts(family: Family, config: Any, where: str, everywhere: str) -> tuple[int, int]:
    """(routed experts of a layer, experts of a token); zeros for a dense model."""
    experts = _value(config, "num_experts") if "num_experts" in family.settings else 0
    per_token = config.num_experts_per_tok if experts else 0
    if per_token > experts:
        raise refusal(where, "num_experts_per_tok", per_token, f"({everywhere}) there are num_experts={experts}")
    # megatron has no such router: its weights are all 1, and it learns nothing
    if per_token == 1 and config.norm_topk_prob:
        raise refusal(
            where,
            "num_experts_per_tok",
            1,
            f"({everywhere}) with norm_topk_prob=true a single expert's weight is always 1",
        )
    return experts, per_token


def _windows(family: Family, config: Any, where: str) -> tuple[int | None, ...]:
    """The window of each layer, as transformers' masks have it."""
    layers: int = config.num_hidden_layers
    window = config.sliding_window if "sliding_window" in family.settings else None
    if "layer_types" not in family.settings:  # Mistral, Qwen3-MoE: all layers or none
        return (window,) * layers
    types = config.layer_types
    if not isinstance(types, list) or len(types) != layers:
        raise refusal(where, "layer_types", types, f"one type for each of {layers} layers is needed")
    strange = [index for index, kind in enumerate(types) if kind not in (FULL, SLIDING)]
    if strange:
        raise refusal(where, "layer_types", types, f"({name_layers(strange)}) only {FULL} and {SLIDING} are computed")
    sliding = [index for index, kind in enumerate(types) if kind == SLIDING]
    if sliding and window is None:
        raise refusal(
            where,
            "layer_types",
            types,
            f"({name_layers(sliding)}) {SLIDING} needs use_sliding_window=true and a sliding_window",
        )
    return tuple(window if kind == SLIDING else None for kind in types)


def _rope(raw: dict[str, Any], parameters: Any, where: str, layers: str) -> tuple[tuple[str, Any], ...]:
    """The rotary parameters after transformers' reading, which has made one of the file's two spellings."""
    key = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    if not isinstance(parameters, dict):
        raise refusal(where, key, parameters, f"({layers}) rotary parameters are needed")
    kind = parameters.get("rope_type", "default")
    if kind not in _ROPE_KEYS:
        supported = ", ".join(_ROPE_KEYS)
        raise refusal(
            where,
            key,
            parameters,
            f"({layers}) rope_type (RoPE scaling) {show(kind)} is not supported; supported are {supported}",
        )
    strange = sorted(set(parameters) - _ROPE_COMMON - _ROPE_KEYS[kind])
    if strange:
        raise refusal(where, key, parameters, f"({layers}) {', '.join(strange)} of rope_type {kind!r} is not computed")
    if not among(parameters.get("partial_rotary_factor"), (None, 1.0)):
        raise refusal(where, key, parameters, f"({layers}) partial_rotary_factor: only 1.0 is computed")
    for name in ("rope_theta", *sorted(_ROPE_KEYS[kind])):
        if problem := positive(parameters.get(name)):
            raise refusal(where, key, parameters, f"({layers}) {name}: {problem}")
    return tuple(
        sorted((name, value) for name, value in parameters.items() if name not in ("type", "partial_rotary_factor"))
    )


def _value(config: Any, key: str) -> Any:
    return getattr(config, key, None)
