"""Every setting of every supported configuration class: computed as transformers computes it, or refused by name.

For each class, each field is changed in turn, on models with and without biases and windows, and so are keys that the
class lacks. ``make test`` runs a sample, ``make test-slow`` all of them and prints the counts of
docs/cluster/reliability.md.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pact_nemo.errors import ConfigError
from pact_nemo.planning.shape import ModelShape
from pact_nemo.policy.architectures import check_architecture, resolve_sizes
from pact_nemo.policy.families import FAMILIES, MODEL_TYPES
from pact_nemo.policy.trees import Segment, TokenTree
from tests.workers.architecture_kit import EXPERTS, MODELS, SIZES, build, config_of, few_threads, wanted, write_model  # noqa: F401 - a fixture
from tests.workers.policy_kit import LLAMA3_ROPE, VOCAB

LENGTH = 40
IDS = torch.randint(0, VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(3)).tolist()
SAMPLE = 2  #: computed changes of each model that `make test` runs; refusals cost nothing and all run

#: values beyond the generated ones, of keys of the classes
MORE: dict[str, list[Any]] = {
    "hidden_act": ["gelu", "gelu_pytorch_tanh", "relu", "swish"],
    "rope_parameters": [
        {"rope_type": "default", "rope_theta": 500.0},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
        LLAMA3_ROPE,
        {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
        {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 16},
        {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "factor": 2.0,
            "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4,
        },
        {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        {"full_attention": {"rope_type": "default", "rope_theta": 500.0}},
    ],
    "layer_types": [
        ["sliding_attention"] * 3,
        ["full_attention"] * 3,
        ["full_attention", "sliding_attention", "full_attention"],
        ["chunked_attention"] * 3,
        ["linear_attention", "full_attention", "full_attention"],
        ["full_attention"],
    ],
    "sliding_window": [1, 8, 0, 600],
    "max_window_layers": [0, 2, 3],
    "mlp_only_layers": [[0], [0, 2]],
    "decoder_sparse_step": [2],
    "num_experts_per_tok": [1, 4, 5],
    "num_key_value_heads": [1, 4, 3],
    "num_attention_heads": [8, 2],
    "attention_dropout": [0.1],
    "architectures": [["LlamaForSequenceClassification"], ["GemmaForCausalLM"], ["LlamaModel"], []],
    "dtype": ["bfloat16", "float16"],
}
#: keys that the classes lack, with values that would change numbers if they were read, and spellings of older folders
UNKNOWN: dict[str, list[Any]] = {
    "attention_multiplier": [0.5],
    "attn_logit_softcapping": [50.0],
    "attn_output_gate": [True],
    "auto_map": [{"AutoModelForCausalLM": "modeling.Model"}],
    "embedding_multiplier": [2.0],
    "final_logit_softcapping": [30.0],
    "is_causal": [False, True],
    "logit_scale": [0.5],
    "logits_scaling": [8.0],
    "mup_scale": [2.0],
    "num_nextn_predict_layers": [1],
    "partial_rotary_factor": [0.5, 1.0],
    "per_layer_config": [{"0": {"sliding_window": 4}}],
    "qk_layernorm": [True],
    "qkv_bias": [True],
    "query_pre_attn_scalar": [64],
    "residual_multiplier": [0.5],
    "rope_interleaved": [True, False],
    "scale_embeddings": [True],
    "scoring_func": ["sigmoid"],
    "text_config": [{"hidden_size": 8}],
    "use_bidirectional_attention": [True],
    "use_mrope": [False, True],
    "rope_theta": [500.0],
    "rope_scaling": [{"type": "linear", "factor": 2.0}, {"type": "dynamic", "factor": 2.0}],
    "torch_dtype": ["bfloat16"],
    "temperature": [0.6],
    "tokenizer_class": ["PreTrainedTokenizerFast"],
    "_name_or_path": ["somewhere"],
}
CLASS_KEYS_ELSEWHERE = (
    "attention_bias",
    "mlp_bias",
    "use_sliding_window",
    "sliding_window",
    "layer_types",
    "norm_topk_prob",
    "head_dim",
)


def other_values(key: str, value: Any, kind: Any) -> list[Any]:
    """Values of the same type that are not ``value``; of a type that ``kind`` allows, if it is None."""
    if key == "rope_parameters":
        return []
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return sorted({value + 1, 2 * value + 2})
    if isinstance(value, float):
        return [2 * value] if value else [0.5]
    if isinstance(value, str):
        return ["other"]
    if isinstance(value, (list, dict)):
        return [None]
    text = str(kind)  # some annotations are text
    made = {"dict": {"0": "other"}, "list": [0], "int": 3, "float": 0.5}
    return [next((value for name, value in made.items() if name in text), "other")]


def changes(name: str) -> list[tuple[str, Any]]:
    """(key, value) of every change of one model's configuration."""
    config = config_of(name)
    family = MODEL_TYPES[config["model_type"]]
    resolved = family.config_class(**{key: value for key, value in config.items() if key != "model_type"})
    found: list[tuple[str, Any]] = []
    for field in dataclasses.fields(family.config_class):
        present = getattr(resolved, field.name)
        values = [
            value
            for value in MORE.get(field.name, [])
            if value != present or isinstance(value, bool) != isinstance(present, bool)
        ]
        if field.name not in ("dtype", "architectures", "layer_types"):
            values += other_values(field.name, present, field.type)
        found += [(field.name, value) for index, value in enumerate(values) if value not in values[:index]]
        if present is not None:
            found.append((field.name, None))
    fields = {field.name for field in dataclasses.fields(family.config_class)}
    for key in CLASS_KEYS_ELSEWHERE:
        if key not in fields:
            found += [(key, value) for value in MORE.get(key, [True, False])]
    if "head_dim" not in fields:
        found += [("head_dim", 16), ("head_dim", 7)]
    if family.model_type == "qwen3_moe":
        found.append(("num_local_experts", 8))
    return found + [(key, value) for key, values in UNKNOWN.items() for value in values]


def chain(ids: list[int]) -> TokenTree:
    return TokenTree([Segment(ids, -1, [False] + [True] * (len(ids) - 1))])


def outcome(config: dict[str, Any], key: str, folder: Path) -> str:
    """``refused`` or ``equal``; fails on anything else."""
    try:
        check_architecture(config)
    except ConfigError as error:
        assert key in str(error), f"{key} is not named: {error}"
        return "refused"
    write_model(folder, config)
    want = wanted(folder, IDS)
    (got,) = build(folder).logprobs([chain(IDS)])
    assert (got - want).abs().max() < 1e-4, f"{key}={config[key]}: off by {(got - want).abs().max():.3g} nats"
    return "equal"


def run(name: str, chosen: list[tuple[str, Any]], base: Path) -> Counter[str]:
    counts: Counter[str] = Counter()
    failures = []
    for index, (key, value) in enumerate(chosen):
        try:
            counts[outcome({**config_of(name), key: value}, key, base / str(index))] += 1
        except Exception as error:
            failures.append(f"{key}={value}: {type(error).__name__}: {error}"[:600])
    assert not failures, f"{name}: {len(failures)} of {len(chosen)}:\n" + "\n".join(failures)
    return counts


@pytest.mark.parametrize("name", MODELS)
def test_a_model_and_a_sample_of_its_changed_settings_are_computed_or_refused(name: str, tmp_path: Path) -> None:
    draw = random.Random(name)
    everything = changes(name)

    def refused(key: str, value: Any) -> bool:
        try:
            check_architecture({**config_of(name), key: value})
        except ConfigError:
            return True
        return False

    no, yes = [], []
    for change in everything:
        (no if refused(*change) else yes).append(change)
    assert len(no) > 20 and len(yes) > 20
    sample = [("model_type", MODELS[name]["model_type"]), *draw.sample(yes, SAMPLE), *no]
    counts = run(name, sample, tmp_path)
    assert counts == {"equal": SAMPLE + 1, "refused": len(no)}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_changed_setting_is_computed_or_refused(name: str, tmp_path: Path) -> None:
    chosen = changes(name)
    counts = run(name, chosen, tmp_path)
    print(
        f"\n{name}: {len(chosen)} changes of {len({key for key, _ in chosen})} keys, {counts['equal']} equal,"
        f" {counts['refused']} refused"
    )


def test_every_field_of_every_supported_class_is_classified() -> None:
    """A transformers version with a new field fails here, before anyone trains with it."""
    for family in FAMILIES.values():
        fields = {field.name for field in dataclasses.fields(family.config_class)}
        assert fields - family.settings.keys() == set(), family
        assert family.settings.keys() - fields <= {"head_dim"}, "what a class lacks is read by its model"


@pytest.mark.parametrize("name", MODELS)
def test_weights_go_in_and_out_bit_for_bit_and_are_counted(name: str, tmp_path: Path) -> None:
    write_model(tmp_path / "in", config_of(name))
    policy = build(tmp_path / "in")
    policy.export_hf(tmp_path / "out", dtype="float32")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("in", "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert ModelShape.from_hf(config_of(name)).parameters == sum(tensor.numel() for tensor in before.values())


def test_defaults_of_absent_keys_are_those_of_the_class() -> None:
    moe = check_architecture({"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", **SIZES, **EXPERTS})
    assert not moe.normalise_top_k and not moe.tied and moe.windows == (None,) * 3 and moe.head_dim == 8
    mistral = check_architecture({"architectures": ["MistralForCausalLM"], "model_type": "mistral"})
    assert mistral.windows == (4096,) * 32 and mistral.kv_heads == 8
    assert check_architecture({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **SIZES}).head_dim == 128


def test_keys_that_say_what_the_family_computes_anyway_are_accepted_and_no_other_values() -> None:
    said: dict[str, dict[str, Any]] = {
        "qwen3_moe": {
            "use_qk_norm": True,
            "qkv_bias": False,
            "shared_expert_intermediate_size": 0,
            "scoring_func": "softmax",
            "n_group": 1,
        },
        "qwen2": {"qkv_bias": True, "use_qk_norm": False},
        "llama": {"qkv_bias": False, "qk_norm": False, "routed_scaling_factor": 1.0},
    }
    for name, keys in said.items():
        assert check_architecture(config_of(name) | keys) == check_architecture(config_of(name))
        for key, value in keys.items():
            other = not value if isinstance(value, bool) else "sigmoid" if isinstance(value, str) else value + 2
            with pytest.raises(ConfigError, match=f"{key}={json.dumps(other)}"):
                check_architecture(config_of(name) | {key: other})


def test_refusals_name_file_key_value_layers_and_what_is_supported(tmp_path: Path) -> None:
    def refusal(config: dict[str, Any], **settings: Any) -> str:
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ConfigError) as caught:
            check_architecture(tmp_path, **settings)
        assert str(tmp_path / "config.json") in str(caught.value)
        return str(caught.value)

    gemma = refusal({**config_of("llama"), "architectures": ["GemmaForCausalLM"], "model_type": "gemma"})
    assert "GemmaForCausalLM" in gemma and all(name in gemma for name in FAMILIES)
    assert "model_type" in refusal({**config_of("llama"), "model_type": "gemma"})
    mixed = refusal({**config_of("qwen3_moe"), "mlp_only_layers": [0, 2]})
    assert "mlp_only_layers=[0, 2]" in mixed and "layers 0, 2" in mixed and "docs/reference/models.md" in mixed
    assert "layer 1" in refusal({**config_of("qwen3_moe"), "decoder_sparse_step": 2}).replace("layers 0, 2", "layer 1")
    assert "layers 1-2" in refusal(config_of("qwen2, window"), attention="te")
    assert "contradicts" in refusal({**config_of("qwen3_moe"), "num_local_experts": 8})
    assert "architectures" in refusal({**config_of("llama"), "architectures": [["LlamaForCausalLM"]]})
    assert 'dtype="nonsense"' in refusal({**config_of("llama"), "dtype": "nonsense"})
    assert 'rope_scaling="linear"' in refusal({**config_of("llama"), "rope_scaling": "linear"})
    for text in ("{", "\ufeff" + json.dumps(config_of("llama"))):  # transformers refuses a byte-order mark, too
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match="config.json: not a readable"):
            check_architecture(tmp_path / "config.json")
    with pytest.raises(ConfigError, match="gemma"):
        resolve_sizes({"model_type": "gemma"})
    with pytest.raises(ConfigError, match="GemmaForCausalLM"):
        check_architecture({"architectures": ["GemmaForCausalLM"]})


def test_a_reference_of_another_architecture_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "policy", config_of("mistral"))
    write_model(tmp_path / "reference", config_of("mistral, window"))
    policy = build(tmp_path / "policy")
    with pytest.raises(ConfigError, match="another model"):
        policy.load_reference(tmp_path / "reference")
