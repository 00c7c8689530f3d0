"""The tensors of a model folder: every one is used, harmless or refused by name, and no parameter is left without one.

The property, for each mutation of each tensor of each family: the policy computes what transformers computes with that
very folder (to 1e-4), or refuses the folder in one line that names the tensor. Nothing else.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pact_nemo.errors import CheckpointError, DataError
from pact_nemo.policy.architectures import check_architecture
from pact_nemo.policy.expected_weights import expected_weights
from pact_nemo.policy.model_folder import check_model_folder
from pact_nemo.policy.trees import Segment, TokenTree
from tests.workers.folder_kit import Weights, build, copy, drop, models, ours, shard, theirs, write_shards
from tests.workers.policy_kit import VOCAB, launch

from pact_nemo.policy import bridge as bridges  # isort: skip

__all__ = ["models"]  # the fixture
FAMILIES = (
    "llama",
    "llama3",
    "llama_biases",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3_window",
    "qwen3_moe",
    "qwen3_moe_window",
)


# --------------------------------------------------------------------------------------------------- what a model has


@pytest.mark.parametrize("family", FAMILIES)
def test_the_expected_weights_are_those_that_transformers_saves(family: str, models: Callable[[str], Path]) -> None:
    saved = {name: tuple(tensor.shape) for name, tensor in load_file(models(family) / "model.safetensors").items()}
    assert expected_weights(check_architecture(models(family))) == saved


FLAGS: list[tuple[str, dict[str, Any]]] = [
    ("Llama", {"attention_bias": True}),
    ("Llama", {"mlp_bias": True, "tie_word_embeddings": True, "head_dim": 8}),
    ("Llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    ("Mistral", {"sliding_window": None, "head_dim": 24}),
    ("Qwen2", {"tie_word_embeddings": True}),
    ("Qwen3", {"attention_bias": True, "head_dim": 24}),
    (
        "Qwen3Moe",
        {
            "attention_bias": True,
            "head_dim": 24,
            "num_experts": 3,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 40,
        },
    ),
]


@pytest.mark.parametrize(("family", "flags"), FLAGS)
def test_the_expected_weights_follow_the_configuration(family: str, flags: dict[str, Any], tmp_path: Path) -> None:
    import transformers

    common = dict(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
    )
    model = getattr(transformers, f"{family}ForCausalLM")(
        getattr(transformers, f"{family}Config")(**{**common, **flags})
    )
    model.save_pretrained(tmp_path)
    saved = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    assert expected_weights(check_architecture(tmp_path)) == saved
    assert check_model_folder(tmp_path).shapes == saved


# ------------------------------------------------------------------------------------- every tensor, every mutation


def _renamed(new: Callable[[str], str]) -> Callable[[Weights, str], Weights]:
    return lambda weights, name: {new(key) if key == name else key: tensor for key, tensor in weights.items()}


def _changed(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Weights, str], Weights]:
    return lambda weights, name: {key: change(tensor) if key == name else tensor for key, tensor in weights.items()}


def _added(new: Callable[[str], str]) -> Callable[[Weights, str], Weights]:
    return lambda weights, name: weights | {new(name): weights[name].clone()}


MUTATIONS: dict[str, Callable[[Weights, str], Weights]] = {
    "drop": drop,
    "rename": _renamed(
        lambda name: name.replace("model.", "backbone.", 1) if name.startswith("model.") else f"x.{name}"
    ),
    "lose the prefix": _renamed(
        lambda name: name.removeprefix("model.") if name.startswith("model.") else f"model.{name}"
    ),
    "double the prefix": _renamed(lambda name: f"model.{name}"),
    "wrap": _renamed(lambda name: f"_orig_mod.{name}"),
    "add a bias": _added(lambda name: name.replace(".weight", ".bias") if name.endswith(".weight") else f"{name}.bias"),
    "add an adapter": _added(
        lambda name: name.replace(".weight", ".lora_A.weight") if name.endswith(".weight") else f"{name}.lora_A.weight"
    ),
    "add a layer": _added(
        lambda name: f"model.layers.2.{name.rpartition('.layers.')[2].partition('.')[2] or 'eh_proj.weight'}"
    ),
    "add packed parts": _added(
        lambda name: name.replace("weight", "qweight") if "weight" in name else f"{name}.qweight"
    ),
    "add scales": _added(lambda name: f"{name}_scale_inv"),
    "empty": _changed(lambda tensor: tensor.new_zeros(0)),
    "no rows": _changed(lambda tensor: tensor[:0]),
    "flatten": _changed(lambda tensor: tensor.flatten()[:-1]),
    "one row more": _changed(lambda tensor: torch.cat([tensor, tensor[:1]])),
    "integers": _changed(lambda tensor: tensor.to(torch.int8)),
    "fp8 without scales": _changed(lambda tensor: tensor.to(torch.float8_e4m3fn)),
    "other floats": _changed(lambda tensor: tensor.to(torch.float64)),
    "half floats": _changed(lambda tensor: tensor.to(torch.bfloat16)),
}
#: they leave the numbers as they are, or change them for transformers and the policy alike
HARMLESS = {"other floats", "half floats"}


@pytest.fixture(scope="module")
def tally() -> Iterator[dict[str, int]]:
    counts = {"tried": 0, "equal": 0, "refused": 0}
    yield counts
    print(f"\nmutated tensors: {counts}")


def _mutate(
    family: str,
    mutation: str,
    names: list[str],
    models: Callable[[str], Path],
    tmp_path: Path,
    tally: dict[str, int],
    computed: int,
) -> None:
    """Check the property for these tensors, in one file and in shards by turns; compute at most ``computed`` of the
    accepted folders.
    """
    source = load_file(models(family) / "model.safetensors")
    for number, name in enumerate(names):
        weights = MUTATIONS[mutation](source, name)
        folder = write_shards(weights, tmp_path) if number % 2 else copy(models(family), tmp_path, weights)
        tally["tried"] += 1
        try:
            check_model_folder(folder)
        except CheckpointError as error:
            text = str(error)
            assert mutation not in HARMLESS, text
            concerned = {
                name,
                *(key for key in weights.keys() | source.keys() if weights.get(key) is not source.get(key)),
            }
            assert "\n" not in text and str(folder) in text and any(tensor in text for tensor in concerned), text
            tally["refused"] += 1
        else:
            assert mutation in HARMLESS, f"{name} was accepted"
            if number < computed:
                torch.testing.assert_close(ours(folder), theirs(folder), rtol=0, atol=1e-4, msg=name)
                tally["equal"] += 1
        for path in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
            path.unlink()


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_mutated_tensor_is_refused_by_name_or_changes_nothing(
    family: str, mutation: str, models: Callable[[str], Path], tmp_path: Path, tally: dict[str, int]
) -> None:
    """Three tensors of each family and mutation; the slow test takes all of them."""
    copy(models(family), tmp_path)
    names = list(load_file(models(family) / "model.safetensors"))
    drawn = random.Random(f"{family} {mutation}").sample(names, 3)
    _mutate(family, mutation, drawn, models, tmp_path, tally, computed=1)


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_mutated_tensor_is_refused_by_name_or_changes_nothing(
    family: str, mutation: str, models: Callable[[str], Path], tmp_path: Path, tally: dict[str, int]
) -> None:
    copy(models(family), tmp_path)
    names = list(load_file(models(family) / "model.safetensors"))
    _mutate(family, mutation, names, models, tmp_path, tally, computed=len(names))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_value_that_is_not_finite_is_refused_with_the_weights_name(
    family: str, value: float, models: Callable[[str], Path], tmp_path: Path, tally: dict[str, int]
) -> None:
    """Each tensor in turn, as the load reads it; one of them through the whole load."""
    source = load_file(models(family) / "model.safetensors")
    copy(models(family), tmp_path, source)
    folder = check_model_folder(tmp_path)
    for name in source:
        weights = dict(source)
        weights[name] = source[name].clone()
        weights[name].view(-1)[-1] = value
        save_file(weights, tmp_path / "model.safetensors")
        state = bridges.FolderState(folder)
        for key in source:
            state[key]
        state.close()
        assert state.fault is not None and f"model.safetensors: {name} holds NaN or Inf" in str(state.fault)
        tally["tried"] += 1
        tally["refused"] += 1
    if value == torch.inf:
        with pytest.raises(CheckpointError, match="holds NaN or Inf"):
            build(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_parameter_is_left_without_a_weight(
    family: str, models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the check of the folder: a weight that disappears there, and one that no mapping asks for, are found at
    the load.
    """
    bridge = bridges.load_bridge(models(family))
    folder = bridges.folder_of(bridge)
    chunks = build(models(family)).chunks
    lost = next(name for name in folder.entries if "layers.1" in name and "down_proj" in name)
    entry = folder.entries.pop(lost)
    with pytest.raises(CheckpointError, match=r"no weight of it went into the parameter decoder\.layers\.1\."):
        bridges.load_weights(bridge, chunks)
    folder.entries.update({lost: entry, "model.layers.1.mlp.fourth_proj.weight": entry})
    with pytest.raises(CheckpointError, match=r"fourth_proj\.weight would not be loaded"):
        bridges.load_weights(bridge, chunks)
    del folder.entries["model.layers.1.mlp.fourth_proj.weight"]
    bridges.load_weights(bridge, chunks)
    assert all(torch.isfinite(param).all() for param in chunks[0].parameters())


def test_token_ids_without_a_row_are_refused(models: Callable[[str], Path]) -> None:
    policy = build(models("llama"))
    for token in (VOCAB, -1):
        with pytest.raises(
            DataError, match=f"tree 1: the model has no row for token id {token}, only for 0 to {VOCAB - 1}"
        ):
            policy.logprobs(
                [
                    TokenTree([Segment([1, VOCAB - 1], -1, [False, True])]),
                    TokenTree([Segment([1, token], -1, [False, True])]),
                ]
            )


# ------------------------------------------------------------------------------------------------------ layouts


LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "tp2": ("llama3", {"tensor_parallel": 2}),
    "pp2": ("qwen3", {"pipeline_parallel": 2}),
    "tied_pp2": ("llama", {"pipeline_parallel": 2}),
    "ep2": ("qwen3_moe", {"expert_parallel": 2}),
}


def test_every_rank_refuses_what_a_single_stage_or_expert_sees(models: Callable[[str], Path], tmp_path: Path) -> None:
    """A weight of the last layer (and of the last expert) that is missing, not finite, or lost behind the check."""
    jobs, named = [], {}
    for layout, (family, config) in LAYOUTS.items():
        source = load_file(models(family) / "model.safetensors")
        name = [key for key in source if "layers.1" in key and "down_proj" in key][-1]
        broken = {key: tensor.clone() for key, tensor in source.items()}
        broken[name][-1, -1] = torch.nan
        folders = {"missing": drop(source, name), "nan": broken, "lost": source}
        for fault, weights in folders.items():
            folder = shard(
                copy(models(family), tmp_path / f"{layout}-{fault}", weights), tmp_path / f"{layout}-{fault}-sharded"
            )
            jobs.append(
                {
                    "name": f"{layout}-{fault}",
                    "hf_path": str(folder),
                    "config": config,
                    "refused": name if fault == "lost" else "",
                }
            )
            named[f"{layout}-{fault}"] = name
    answers = launch(2, jobs, tmp_path)
    for job, name in named.items():
        kinds, texts = zip(*answers[job], strict=True)
        assert kinds == ("CheckpointError",) * 2, answers[job]
        if job.endswith("lost"):
            assert all("no weight of it went into the parameter" in text for text in texts), texts
        else:
            assert all(name in text for text in texts), texts
