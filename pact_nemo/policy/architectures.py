"""Which models the policy computes: supported architectures, and every setting of their ``config.json``.

A setting is *computed* (any value that passes its check is honoured), *harmless* (it changes no log-probability),
or accepted with *some values only*. Everything else is refused before weights are read. Defaults of absent keys are
those of the transformers configuration class, because that class decides what the folder means.

No Megatron and no weights here: :func:`check_architecture` reads ``config.json`` alone. ``docs/reference/models.md``
has the table in words, and ``docs/extend/model.md`` says how to add a family.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pact_nemo.errors import ConfigError
from pact_nemo.runtime import strict_json

REMEDY = "use another model, or a folder with a supported value (docs/reference/models.md lists them)"
FULL, SLIDING = "full_attention", "sliding_attention"  # transformers' names of layer types

Check = Callable[[Any], str | None]  # of a resolved value: what is wrong with it, or None


def _whole(value: Any) -> str | None:
    """A size or a count."""
    return (
        None
        if isinstance(value, int) and not isinstance(value, bool) and value >= 1
        else "a whole number of at least 1 is needed"
    )


def _flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else "true or false is needed"


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _positive(value: Any) -> str | None:
    return None if _number(value) and value > 0 else "a positive number is needed"


def _window(value: Any) -> str | None:
    return None if value is None else _whole(value)


@dataclass(frozen=True)
class Setting:
    """How the policy treats one key of a configuration class.

    Attributes:
        kind: ``computed``, ``harmless`` or ``only``.
        check: of a computed key: what is wrong with its value.
        values: of an ``only`` key: what is accepted.
        note: what a refused value would need.
    """

    kind: str
    check: Check | None = None
    values: tuple[Any, ...] = ()
    note: str = ""

    def problem(self, value: Any) -> str | None:
        """Why the policy does not compute this value; None if it does."""
        if self.kind == "computed":
            return self.check(value) if self.check is not None else None
        if self.kind == "only" and not _among(value, self.values):
            accepted = " or ".join(json.dumps(known) for known in self.values)
            return f"only {accepted} is computed" + (f"; {self.note}" if self.note else "")
        return None


def _among(value: Any, values: tuple[Any, ...]) -> bool:
    """Equality in which 0 is not False and 1 is not True."""
    return any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in values)


def computed(check: Check | None = None) -> Setting:
    return Setting("computed", check)


def only(*values: Any, note: str = "") -> Setting:
    return Setting("only", values=values, note=note)


HARMLESS = Setting("harmless")

#: keys of every supported configuration class
_COMMON: dict[str, Setting] = {
    "vocab_size": computed(_whole),
    "hidden_size": computed(_whole),
    "intermediate_size": computed(_whole),
    "num_hidden_layers": computed(_whole),
    "num_attention_heads": computed(_whole),
    "num_key_value_heads": computed(_whole),
    "head_dim": computed(_whole),
    "max_position_embeddings": computed(_whole),
    "rms_norm_eps": computed(_positive),
    "rope_parameters": computed(),  # see _check_rope
    "tie_word_embeddings": computed(_flag),
    "hidden_act": only("silu"),
    "attention_dropout": only(0.0, note="the policy has no dropout"),
    "is_encoder_decoder": only(False),
    "return_dict": only(True, note="transformers itself can't run the model with it"),
    "architectures": computed(),  # see family_of
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
    "use_sliding_window": computed(_flag),
    "sliding_window": computed(_window),
    "max_window_layers": computed(),
    "layer_types": computed(),
}
_EXPERTS: dict[str, Setting] = {
    "attention_bias": computed(_flag),
    "use_sliding_window": computed(_flag),
    "sliding_window": computed(_window),
    "moe_intermediate_size": computed(_whole),
    "num_experts": computed(_whole),
    "num_experts_per_tok": computed(_whole),
    "norm_topk_prob": computed(_flag),
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
            _COMMON | {"attention_bias": computed(_flag), "mlp_bias": computed(_flag), "pretraining_tp": HARMLESS},
        ),
        Family("MistralForCausalLM", "mistral", "MistralConfig", _COMMON | {"sliding_window": computed(_window)}),
        Family("Qwen2ForCausalLM", "qwen2", "Qwen2Config", _COMMON | _LAYER_WINDOWS),
        Family(
            "Qwen3ForCausalLM",
            "qwen3",
            "Qwen3Config",
            _COMMON | _LAYER_WINDOWS | {"attention_bias": computed(_flag)},
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


def _neutral_values(family: Family, key: str) -> tuple[Any, ...]:
    """What a key outside of the family's class may say; some depend on what the family computes without being told."""
    own = {
        "qkv_bias": family.model_type == "qwen2",
        "use_qk_norm": family.qk_norm,
        "qk_norm": family.qk_norm,
        "qk_layernorm": family.qk_norm,
    }
    return (own[key],) if key in own else _NEUTRAL_KEYS.get(key, ())


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
    raw, where = _read(source)
    family = _family_of(raw, where)
    resolved = _resolve(family, raw, where)
    return _describe(family, raw, resolved, where, attention)


def resolve_sizes(config: Mapping[str, Any]) -> Architecture:
    """Like :func:`check_architecture`, of a configuration that may lack ``architectures``: sizes of a model that is
    planned, not loaded.
    """
    family = MODEL_TYPES.get(str(config.get("model_type")))
    if family is None:
        raise _unsupported("config.json", "model_type", config.get("model_type"))
    return check_architecture({**config, "architectures": [family.architecture]})


def _read(source: Mapping[str, Any] | str | Path) -> tuple[dict[str, Any], str]:
    if isinstance(source, Mapping):
        return dict(source), "config.json"
    path = Path(source)
    path = path / "config.json" if path.name != "config.json" else path
    if not path.is_file():
        raise ConfigError(f"{path.parent} holds no config.json; policy weights must be a local Hugging Face folder")
    try:
        text = path.read_text(encoding="utf-8")
        if text.startswith("\ufeff"):  # read here, and refused by transformers and by servers
            raise ValueError("it begins with a byte-order mark; save it without one")
        raw = strict_json.loads(text)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: not a readable Hugging Face decoder config ({type(error).__name__}: {error})"
        ) from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: not a readable Hugging Face decoder config (a JSON object is needed)")
    return raw, str(path)


def _unsupported(where: str, key: str, value: Any) -> ConfigError:
    known = ", ".join(f"{family.architecture} ({family.model_type})" for family in FAMILIES.values())
    return ConfigError(
        f"{where}: {key}={_show(value)}: the policy does not compute this architecture; supported are {known}; use one"
        " of them"
    )


def _family_of(raw: dict[str, Any], where: str) -> Family:
    names = raw.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str) or names[0] not in FAMILIES:
        raise _unsupported(where, "architectures", names)
    family = FAMILIES[names[0]]
    if raw.get("model_type") != family.model_type:
        raise ConfigError(
            f"{where}: model_type={_show(raw.get('model_type'))}: {family.architecture} has {family.model_type!r};"
            f" {REMEDY}"
        )
    return family


def _resolve(family: Family, raw: dict[str, Any], where: str) -> Any:
    """Transformers' configuration object of ``raw``, after the keys were checked that it would take without a word."""
    if "auto_map" in raw:
        raise ConfigError(
            f"{where}: auto_map={_show(raw['auto_map'])}: the folder brings its own model code, which is not run; "
            f"if it computes what {family.architecture} computes, remove auto_map, else use another model"
        )
    if "num_local_experts" in raw and raw.get("num_experts", raw["num_local_experts"]) != raw["num_local_experts"]:
        raise ConfigError(
            f"{where}: num_experts={_show(raw['num_experts'])} contradicts"
            f" num_local_experts={_show(raw['num_local_experts'])}"
        )
    declared = set(family.settings) | set(getattr(family.config_class, "attribute_map", {}).values())
    harmless = _HARMLESS_KEYS | _generation_keys()
    for key, value in raw.items():
        if key in declared or key in harmless or value is None or _among(value, _neutral_values(family, key)):
            continue
        raise ConfigError(
            f"{where}: {key}={_show(value)}: {family.config_name} has no such setting, and it may change what the model"
            f" computes; if {family.architecture} computes the model without it, remove the key, else use another model"
        )
    # a copy, because transformers completes rope parameters in place
    values = {
        key: copy.deepcopy(value) for key, value in raw.items() if key not in ("model_type", "quantization_config")
    }
    for key in ("num_attention_heads", "hidden_size", "num_hidden_layers"):
        if key in values and (problem := _whole(values[key])):
            raise _refusal(where, key, values[key], problem)
    heads, hidden = values.get("num_attention_heads"), values.get("hidden_size")
    if family.model_type == "llama" and heads and hidden and hidden % heads:
        raise _refusal(where, "hidden_size", hidden, f"it is no multiple of num_attention_heads={heads}")
    try:
        with silent():
            return family.config_class.from_dict(values)
    except Exception as error:  # its validation raises types of several packages
        text = " ".join(str(error).split())
        said = _named_by(text, values)
        named = "" if said is None else f"{said}={_show(values[said])}: "
        raise ConfigError(
            f"{where}: {named}transformers refuses this {family.config_name}: {text}; {REMEDY}"
        ) from error


def _named_by(text: str, values: Mapping[str, Any]) -> str | None:
    """The key that an error of transformers is about: its name stands there, that of its other spelling, or its
    value.
    """
    longest = sorted(values, key=len, reverse=True)
    if "rope_parameters" in text and values.get("rope_scaling"):
        return "rope_scaling"
    said = next((name for name in longest if name in text), None)
    return said or next(
        (name for name in longest if isinstance(values[name], str) and values[name] and values[name] in text), None
    )


def _describe(family: Family, raw: dict[str, Any], config: Any, where: str, attention: str) -> Architecture:
    """Check every value of a resolved configuration, and what they say together."""
    layers = _value(config, "num_hidden_layers")
    everywhere = _layers(range(layers)) if isinstance(layers, int) else "all layers"
    for key, setting in family.settings.items():
        value = _value(config, key)
        if (
            key == "head_dim" and value is None and "head_dim" not in raw
        ):  # Qwen2 and Qwen3-MoE don't declare it, and read it if it is there
            value = config.hidden_size // config.num_attention_heads
        if problem := setting.problem(value):
            concerned = everywhere
            if key == "mlp_only_layers" and isinstance(value, list):
                concerned = _layers(value)
            elif key == "decoder_sparse_step" and isinstance(value, int) and value > 0:
                concerned = _layers([layer for layer in range(layers) if (layer + 1) % value])
            raise _refusal(where, key, value, f"({concerned}) {problem}")
    heads, kv_heads, hidden = config.num_attention_heads, config.num_key_value_heads, config.hidden_size
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    if heads % kv_heads:
        raise _refusal(
            where, "num_key_value_heads", kv_heads, f"({everywhere}) num_attention_heads={heads} is no multiple of it"
        )
    if head_dim < 2 or head_dim % 2:
        found = "" if "head_dim" in raw else f"it is hidden_size={hidden} over num_attention_heads={heads}; "
        raise _refusal(where, "head_dim", head_dim, f"({everywhere}) {found}rotary embeddings need an even number")
    experts = _value(config, "num_experts") if "num_experts" in family.settings else 0
    per_token = config.num_experts_per_tok if experts else 0
    if per_token > experts:
        raise _refusal(where, "num_experts_per_tok", per_token, f"({everywhere}) there are num_experts={experts}")
    if (
        per_token == 1 and config.norm_topk_prob
    ):  # megatron has no such router: its weights are all 1, and it learns nothing
        raise _refusal(
            where,
            "num_experts_per_tok",
            1,
            f"({everywhere}) with norm_topk_prob=true a single expert's weight is always 1",
        )
    windows = _windows(family, config, where)
    if attention == "te" and any(windows):
        raise ConfigError(
            f"{where}: sliding_window={_show(config.sliding_window)}"
            f" ({_layers([i for i, window in enumerate(windows) if window])}): Transformer Engine's attention is not"
            " given windows here; set policy.attention=tree_sdpa"
        )
    bias = bool(getattr(config, "attention_bias", False)) if "attention_bias" in family.settings else False
    return Architecture(
        family=family.architecture,
        layers=layers,
        hidden=hidden,
        intermediate=config.intermediate_size,
        heads=heads,
        kv_heads=kv_heads,
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
        rope=_check_rope(raw, config.rope_parameters, where, everywhere),
    )


def _windows(family: Family, config: Any, where: str) -> tuple[int | None, ...]:
    """The window of each layer, as transformers' masks have it."""
    layers: int = config.num_hidden_layers
    window = config.sliding_window if "sliding_window" in family.settings else None
    if "layer_types" not in family.settings:  # Mistral, Qwen3-MoE: all layers or none
        return (window,) * layers
    types = config.layer_types
    if not isinstance(types, list) or len(types) != layers:
        raise _refusal(where, "layer_types", types, f"one type for each of {layers} layers is needed")
    strange = [index for index, kind in enumerate(types) if kind not in (FULL, SLIDING)]
    if strange:
        raise _refusal(where, "layer_types", types, f"({_layers(strange)}) only {FULL} and {SLIDING} are computed")
    sliding = [index for index, kind in enumerate(types) if kind == SLIDING]
    if sliding and window is None:
        raise _refusal(
            where,
            "layer_types",
            types,
            f"({_layers(sliding)}) {SLIDING} needs use_sliding_window=true and a sliding_window",
        )
    return tuple(window if kind == SLIDING else None for kind in types)


def _check_rope(raw: dict[str, Any], parameters: Any, where: str, layers: str) -> tuple[tuple[str, Any], ...]:
    """The rotary parameters after transformers' reading, which has made one of the file's two spellings."""
    key = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    if not isinstance(parameters, dict):
        raise _refusal(where, key, parameters, f"({layers}) rotary parameters are needed")
    kind = parameters.get("rope_type", "default")
    if kind not in _ROPE_KEYS:
        supported = ", ".join(_ROPE_KEYS)
        raise _refusal(
            where,
            key,
            parameters,
            f"({layers}) rope_type (RoPE scaling) {_show(kind)} is not supported; supported are {supported}",
        )
    strange = sorted(set(parameters) - _ROPE_COMMON - _ROPE_KEYS[kind])
    if strange:
        raise _refusal(where, key, parameters, f"({layers}) {', '.join(strange)} of rope_type {kind!r} is not computed")
    if not _among(parameters.get("partial_rotary_factor"), (None, 1.0)):
        raise _refusal(where, key, parameters, f"({layers}) partial_rotary_factor: only 1.0 is computed")
    for name in ("rope_theta", *sorted(_ROPE_KEYS[kind])):
        if problem := _positive(parameters.get(name)):
            raise _refusal(where, key, parameters, f"({layers}) {name}: {problem}")
    return tuple(
        sorted((name, value) for name, value in parameters.items() if name not in ("type", "partial_rotary_factor"))
    )


def _refusal(where: str, key: str, value: Any, problem: str) -> ConfigError:
    return ConfigError(f"{where}: {key}={_show(value)}: {problem}; {REMEDY}")


def _value(config: Any, key: str) -> Any:
    return getattr(config, key, None)


def _show(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _layers(indices: Any) -> str:
    """ "layer 0" or "layers 1-3, 7", numbered as in Hugging Face names."""
    runs: list[list[Any]] = []
    for index in indices:
        if runs and isinstance(index, int) and runs[-1][1] == index - 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"layer {text}" if len(runs) == 1 and runs[0][0] == runs[0][1] else f"layers {text}"


def _generation_keys() -> frozenset[str]:
    """Sampling settings that older folders keep in ``config.json``; transformers takes them out."""
    from transformers import GenerationConfig

    return frozenset(GenerationConfig._get_default_generation_params())


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Without transformers' remarks on configurations: what matters of them is refused here."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
