"""The tensors of a model folder: every one is used, harmless or refused by name, and no parameter is left without one.

The property, for each mutation of each tensor of each family: the policy computes what transformers computes with that
very folder (to 1e-4), or refuses the folder in one line that names the tensor. Nothing else.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pact_nemo.checkpoints.manifest import verify_manifest
from pact_nemo.checkpoints.quantised import materialise
from pact_nemo.errors import CheckpointError, ConfigError, DataError
from pact_nemo.policy.architectures import check_architecture
from pact_nemo.policy.config import OptimizerConfig, PolicyConfig
from pact_nemo.policy.expected_weights import EMBEDDING, HEAD, expected_weights
from pact_nemo.policy.export import fp8_block
from pact_nemo.policy.model_folder import check_model_folder, check_values
from pact_nemo.policy.policy import MegatronPolicy
from pact_nemo.policy.trees import Segment, TokenTree
from pact_nemo.runtime.tensor_files import INDEX_NAME
from pact_nemo.serving.refit import check_same_tensors
from tests.workers.policy_kit import VOCAB, launch, make_model

from pact_nemo.policy import bridge as bridges  # isort: skip

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
IDS = torch.randint(0, VOCAB, (48,), generator=torch.Generator().manual_seed(3)).tolist()
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = make_model(tmp_path_factory.mktemp(family), family, layers=2)
        return made[family]

    return get


def build(path: Path) -> MegatronPolicy:
    settings = PolicyConfig(precision="fp32", micro_batch_tokens=96, logprob_chunk=16)
    return MegatronPolicy(settings, OptimizerConfig(lr=1e-3), path, seed=1, total_steps=1, trainable=False)


def ours(path: Path) -> torch.Tensor:
    """Log-probs of :data:`IDS`, [47] float32, by the policy."""
    return build(path).logprobs([TokenTree([Segment(IDS, -1, [False] + [True] * (len(IDS) - 1))])])[0]


def theirs(path: Path, **settings: Any) -> torch.Tensor:
    """The same by transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", **settings
    ).eval()
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0, :-1].log_softmax(-1).gather(1, torch.tensor(IDS[1:])[:, None])[:, 0]


def copy(source: Path, target: Path, weights: Weights | None = None, **config: Any) -> Path:
    """A copy of a folder with other weights and keys of ``config.json``."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"), dirs_exist_ok=True)
    if config:
        row = json.loads((target / "config.json").read_text()) | config
        (target / "config.json").write_text(json.dumps({key: value for key, value in row.items() if value is not ...}))
    if weights is not None:
        save_file(
            {name: tensor.contiguous() for name, tensor in weights.items()},
            target / "model.safetensors",
            metadata={"format": "pt"},
        )
    return target


def shard(source: Path, target: Path, *, files: int = 3) -> Path:
    """The same weights dealt out to several files with an index, scales away from their weights."""
    weights = load_file(source / "model.safetensors")
    return write_shards(weights, copy(source, target), files=files)


def write_shards(weights: Weights, target: Path, *, files: int = 3) -> Path:
    index: dict[str, str] = {}
    for number in range(files):
        name = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        part = {key: weights[key].contiguous() for key in list(weights)[number::files]}
        save_file(part, target / name)
        index |= dict.fromkeys(part, name)
    (target / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return target


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


# ------------------------------------------------------------------------------------------- every tensor, every
# mutation


def _drop(weights: Weights, name: str) -> Weights:
    return {key: tensor for key, tensor in weights.items() if key != name}


def _renamed(new: Callable[[str], str]) -> Callable[[Weights, str], Weights]:
    return lambda weights, name: {new(key) if key == name else key: tensor for key, tensor in weights.items()}


def _changed(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Weights, str], Weights]:
    return lambda weights, name: {key: change(tensor) if key == name else tensor for key, tensor in weights.items()}


def _added(new: Callable[[str], str]) -> Callable[[Weights, str], Weights]:
    return lambda weights, name: weights | {new(name): weights[name].clone()}


MUTATIONS: dict[str, Callable[[Weights, str], Weights]] = {
    "drop": _drop,
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
        folders = {"missing": _drop(source, name), "nan": broken, "lost": source}
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


# ------------------------------------------------------------------------------------------------ names, files, heads


@pytest.mark.parametrize(
    "prefix",
    ["", "model.model.", "module.model.", "_orig_mod.model.", "base_model.model.model.", "language_model.model."],
)
def test_a_folder_whose_names_are_all_prefixed_otherwise_is_refused_by_name(
    prefix: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    source = load_file(models("qwen3") / "model.safetensors")
    weights = {
        name.replace("model.", prefix, 1) if name.startswith("model.") else name: tensor
        for name, tensor in source.items()
    }
    folder = copy(models("qwen3"), tmp_path, weights)
    with pytest.raises(
        CheckpointError,
        match=rf"model\.safetensors: {prefix}embed_tokens\.weight should be model\.embed_tokens\.weight.*; .*save",
    ):
        check_model_folder(folder)


def test_rotary_buffers_are_passed_over_and_not_exported(models: Callable[[str], Path], tmp_path: Path) -> None:
    weights = load_file(models("llama3") / "model.safetensors")
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.rand(4) for i in range(2)} | {
        "model.rotary_emb.inv_freq": torch.rand(4)
    }
    folder = copy(models("llama3"), tmp_path / "old", weights | buffers)
    policy = build(folder)
    torch.testing.assert_close(ours(folder), theirs(folder), rtol=0, atol=1e-4)
    policy.export_hf(tmp_path / "new", dtype="float32")
    assert load_file(tmp_path / "new" / "model.safetensors").keys() == weights.keys()
    check_same_tensors(tmp_path / "new", folder)  # a server that was started from the old folder takes the export


def test_a_tied_head_of_its_own_is_refused_unless_it_is_the_embedding(
    models: Callable[[str], Path], tmp_path: Path
) -> None:
    weights = load_file(models("llama") / "model.safetensors")
    same = copy(models("llama"), tmp_path / "same", weights | {HEAD: weights[EMBEDDING].clone()})
    torch.testing.assert_close(ours(same), theirs(same), rtol=0, atol=1e-4)
    build(same).export_hf(tmp_path / "out", dtype="float32")
    assert HEAD not in load_file(tmp_path / "out" / "model.safetensors")
    check_same_tensors(tmp_path / "out", same)
    other = weights[EMBEDDING].clone()
    other[-1, -1] += 1e-3
    with pytest.raises(
        CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight, yet .*tie_word_embeddings"
    ):
        check_model_folder(copy(models("llama"), tmp_path / "other", weights | {HEAD: other}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is no weight .*tie_word_embeddings"):
        check_model_folder(copy(models("llama"), tmp_path / "short", weights | {HEAD: other[:-1]}))
    with pytest.raises(CheckpointError, match=r"lacks lm_head\.weight \[131, 64\].*tie_word_embeddings"):
        check_model_folder(copy(models("llama"), tmp_path / "flag", weights, tie_word_embeddings=False))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


FIRST, LAST = "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"
NORM = "model.norm.weight"
#: message -> what is done to a folder of three files, given it and the map of its index
CONTRADICTIONS: dict[str, Callable[[Path, dict[str, str]], Any]] = {
    f"{LAST} is missing": lambda folder, index: (folder / LAST).unlink(),
    "model-00002-of-00003.safetensors is no safetensors file": lambda folder, index: _cut(
        folder / "model-00002-of-00003.safetensors"
    ),
    f"{LAST} is a pointer of Git LFS": (
        lambda folder, index: (folder / LAST).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    ),
    f"says that {FIRST} holds ghost, which it doesn't": lambda folder, index: index.update(ghost=FIRST),
    f"says that {LAST} holds {NORM}, which is in {FIRST}": lambda folder, index: index.update({NORM: LAST}),
    f"doesn't name {NORM}, which {FIRST} holds": lambda folder, index: index.pop(NORM),
    f"{LAST} and {FIRST} both hold {NORM}": lambda folder, index: save_file(
        load_file(folder / LAST) | {NORM: load_file(folder / FIRST)[NORM]}, folder / LAST
    ),
    f"model.safetensors stands beside {INDEX_NAME}": lambda folder, index: save_file(
        {"a": torch.ones(1)}, folder / "model.safetensors"
    ),
    "adapter_model.safetensors stands beside model.safetensors without an index": lambda folder, index: _without_index(
        folder
    ),
    "adapter_config.json: the folder is a PEFT adapter": (
        lambda folder, index: (folder / "adapter_config.json").write_text("{}")
    ),
}


def _without_index(folder: Path) -> None:
    (folder / INDEX_NAME).unlink()
    (folder / FIRST).rename(folder / "model.safetensors")
    (folder / LAST).rename(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("message", CONTRADICTIONS)
def test_files_that_contradict_each_other_are_refused_by_name(
    message: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    source = load_file(models("qwen2") / "model.safetensors")
    ordered = {NORM: source[NORM], **source}  # in the first file
    folder = write_shards(ordered, copy(models("qwen2"), tmp_path))
    index = json.loads((folder / INDEX_NAME).read_text())
    CONTRADICTIONS[message](folder, index["weight_map"])
    if (folder / INDEX_NAME).exists():
        (folder / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        check_model_folder(folder)
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_refused_with_what_to_do(models: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy(models("llama"), tmp_path)
    torch.save(load_file(models("llama") / "model.safetensors"), folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*convert them to safetensors"):
        check_model_folder(folder)


# ---------------------------------------------------------------------------------------------------------------- FP8


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose matrices are no multiples of a block."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=40,
        intermediate_size=200,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("wide")
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    return folder


def plain(folder: Path, target: Path) -> Path:
    """An FP8 folder's weights as they are meant: value times scale of its block, element by element."""
    stored = load_file(folder / "model.safetensors")
    block = json.loads((folder / "config.json").read_text())["quantization_config"]["weight_block_size"]
    weights = {}
    for name, values in stored.items():
        if name.endswith("_scale_inv"):
            continue
        weights[name] = values.float()
        if f"{name}_scale_inv" in stored:
            rows, columns = (torch.arange(size) // by for size, by in zip(values.shape, block, strict=True))
            weights[name] = values.float() * stored[f"{name}_scale_inv"].float()[rows][:, columns]
    return copy(folder, target, weights, quantization_config=...)


@pytest.mark.parametrize("sharded", [False, True], ids=["one_file", "shards"])
def test_block_fp8_is_dequantised_whatever_the_shapes(sharded: bool, wide: Path, tmp_path: Path) -> None:
    folder = copy(wide, tmp_path / "fp8")
    shutil.copytree(materialise(wide, tmp_path / "cache", "fp8_block"), folder, dirs_exist_ok=True)
    want = theirs(plain(folder, tmp_path / "plain"))
    assert (want - theirs(wide)).abs().max() > 1e-3, "FP8 is not the same model"
    source = shard(folder, tmp_path / "sharded") if sharded else folder
    torch.testing.assert_close(ours(source), want, rtol=0, atol=1e-4)
    assert check_model_folder(source).quantised


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_block_fp8_gives_what_transformers_dequantises(
    family: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    """As published folders have it: scales in bfloat16."""
    from transformers import FineGrainedFP8Config

    made = materialise(models(family), tmp_path / "cache", "fp8_block")
    stored = load_file(made / "model.safetensors")
    scaled = {name: tensor.bfloat16() if name.endswith("_scale_inv") else tensor for name, tensor in stored.items()}
    folder = copy(made, tmp_path / "fp8", scaled)
    want = theirs(folder, quantization_config=FineGrainedFP8Config(dequantize=True))
    torch.testing.assert_close(ours(folder), want, rtol=0, atol=1e-4)


def test_exports_of_an_fp8_source_are_right_in_every_dtype(wide: Path, tmp_path: Path) -> None:
    source = materialise(wide, tmp_path / "cache", "fp8_block")
    policy, meant = build(source), load_file(plain(source, tmp_path / "plain") / "model.safetensors")
    for dtype in ("float32", "bfloat16", "fp8_block"):
        folder = tmp_path / dtype
        policy.export_hf(folder, dtype=dtype)
        started = materialise(source, tmp_path / "cache", dtype)  # what the server starts from
        verify_manifest(started)
        check_same_tensors(folder, started)
        assert ("quantization_config" in json.loads((folder / "config.json").read_text())) == (dtype == "fp8_block")
        got, served = load_file(folder / "model.safetensors"), load_file(started / "model.safetensors")
        assert got.keys() == served.keys() and all(
            torch.equal(got[name].float(), served[name].float()) for name in got
        ), dtype
        if dtype != "fp8_block":
            kind = getattr(torch, dtype)
            assert got.keys() == meant.keys() and all(torch.equal(got[name], meant[name].to(kind)) for name in got)
        torch.testing.assert_close(ours(folder), ours(source), rtol=0, atol=0.05 if dtype == "bfloat16" else 1e-5)


def test_a_copy_of_weights_that_are_not_finite_is_refused_and_leaves_nothing(wide: Path, tmp_path: Path) -> None:
    weights = load_file(wide / "model.safetensors")
    weights[EMBEDDING][0, 0] = torch.inf
    folder = copy(wide, tmp_path / "model", weights)
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight holds NaN or Inf"):
        materialise(folder, tmp_path / "cache", "fp8_block")
    assert not list((tmp_path / "cache").iterdir())


def test_scales_that_do_not_fit_are_refused_by_name(wide: Path, tmp_path: Path) -> None:
    source = materialise(wide, tmp_path / "cache", "fp8_block")
    stored = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    scale = f"{name}_scale_inv"
    for number, (match, weights) in enumerate(
        {
            f"{name} is F8_E4M3 without scales": _drop(stored, scale),
            f"{scale} has shape": stored | {scale: stored[scale][:1]},
            f"{scale} stands beside": stored | {name: stored[name].bfloat16()},
            f"{scale} is I8": stored | {scale: stored[scale].to(torch.int8)},
            r"model\.norm\.weight_scale_inv stands beside": stored | {"model.norm.weight_scale_inv": torch.ones(1, 1)},
            f"lacks {name}": _drop(stored, name),
        }.items()
    ):
        with pytest.raises(CheckpointError, match=match):
            check_model_folder(copy(source, tmp_path / str(number), weights))
    with pytest.raises(CheckpointError, match=r"_scale_inv is no weight .*quantization_config"):
        check_model_folder(copy(source, tmp_path / "unsaid", stored, quantization_config=...))
    said = json.loads((source / "config.json").read_text())["quantization_config"]
    with pytest.raises(CheckpointError, match="quantization_config says FP8, yet no weight"):
        check_model_folder(
            copy(wide, tmp_path / "stale", load_file(wide / "model.safetensors"), quantization_config=said)
        )


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq"},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"load_in_8bit": True},
        {"quant_method": "compressed-tensors"},
        {"quant_method": "mxfp4"},
        {"quant_method": "fp8"},
        {"quant_method": "fp8", "weight_block_size": [128]},
        {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "static"},
        {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e5m2"},
        {"quant_method": "fp8", "weight_block_size": [True, 128]},
        {},
        [],
        0,
    ],
)
def test_other_quantisations_are_refused_by_name(settings: Any, models: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy(
        models("qwen3"), tmp_path, load_file(models("qwen3") / "model.safetensors"), quantization_config=settings
    )
    with pytest.raises(ConfigError, match=r"config\.json: quantization_config.*unquantised weights"):
        check_model_folder(folder)


def test_what_only_servers_or_transformers_refuse_is_refused_before_they_start(
    models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    folder = copy(models("qwen3"), tmp_path, load_file(models("qwen3") / "model.safetensors"))
    (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    with pytest.raises(ConfigError, match=r"hf_quant_config\.json: .*ModelOpt"):
        check_model_folder(folder)
    (folder / "hf_quant_config.json").unlink()
    check_model_folder(folder)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AttributeError("no such thing")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
    with pytest.raises(
        ConfigError, match=r"config\.json: transformers can't read it \(AttributeError: no such thing\)"
    ):
        check_model_folder(folder)


@pytest.mark.parametrize(("dtype", "value"), [(torch.float64, 1e300), (torch.float32, 3.4e38)])
def test_values_that_the_policys_precision_cannot_hold_are_refused(
    dtype: torch.dtype, value: float, models: Callable[[str], Path], tmp_path: Path
) -> None:
    weights = load_file(models("llama") / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].to(dtype)
    weights["model.norm.weight"][1] = -value
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight holds a value of .*beyond what bfloat16 can hold"):
        check_values(check_model_folder(copy(models("llama"), tmp_path, weights)))


def test_a_shape_names_the_settings_that_ask_for_it(models: Callable[[str], Path], tmp_path: Path) -> None:
    for number, (family, key, value) in enumerate(
        [
            ("llama", "num_key_value_heads", 2),
            ("llama", "vocab_size", VOCAB + 1),
            ("llama", "intermediate_size", 8),
            ("qwen3_moe", "head_dim", 8),
            ("qwen3_moe", "moe_intermediate_size", 8),
            ("llama", "num_attention_heads", 4),
        ]
    ):
        folder = copy(
            models(family), tmp_path / str(number), load_file(models(family) / "model.safetensors"), **{key: value}
        )
        with pytest.raises(CheckpointError, match=rf"instead of .*{key}"):
            check_model_folder(folder)


def test_fp8_blocks_of_another_size() -> None:
    weight = torch.randn(9, 14, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 4)
    got = fp8_block.dequantise(weight, scale, (4, 4))
    want = torch.tensor([[float(weight[i, j]) * float(scale[i // 4, j // 4]) for j in range(14)] for i in range(9)])
    torch.testing.assert_close(got, want)


# ------------------------------------------------------------------------------------------------------------- exports


def test_exports_carry_templates_licences_and_notices(models: Callable[[str], Path], tmp_path: Path) -> None:
    source = copy(models("llama"), tmp_path / "source", load_file(models("llama") / "model.safetensors"))
    carried = [
        "additional_chat_templates/tool_use.jinja",
        "LICENSE",
        "LICENSE.txt",
        "license.md",
        "NOTICE",
        "Notice.txt",
        "COPYING",
        "USE_POLICY.md",
        "THIRD_PARTY_LICENSES/one.txt",
    ]
    for name in (*carried, "README.md", "notes.txt"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(name)
    from pact_nemo.checkpoints.hf import export_version

    folder = export_version(build(source), tmp_path / "out", 1)
    assert all((folder / name).read_text() == name for name in carried)
    assert not (folder / "README.md").exists() and not (folder / "notes.txt").exists()
    assert set(carried) <= verify_manifest(folder).files.keys()
    (folder / carried[0]).write_text("changed")
    with pytest.raises(CheckpointError, match=r"tool_use\.jinja"):
        verify_manifest(folder)
