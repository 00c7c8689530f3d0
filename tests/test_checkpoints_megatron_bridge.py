"""Checkpoints of Megatron-Bridge: read under any layout as if they were the HF folder, written so that its own loader
opens them, and refused by name where they are of another model, torn, or would run code.
"""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pact_nemo.checkpoints.manifest import verify_manifest
from pact_nemo.checkpoints.megatron_bridge.index import check_checkpoint, stored_weights
from pact_nemo.checkpoints.megatron_bridge.reading import CheckpointWeights
from pact_nemo.checkpoints.megatron_bridge.settings import bridge_settings
from pact_nemo.checkpoints.megatron_bridge.writing import SAVE, export_bridge_to
from pact_nemo.checkpoints.pickles import read_index
from pact_nemo.errors import CheckpointError, ConfigError
from pact_nemo.policy.architectures import check_architecture
from pact_nemo.policy.config import OptimizerConfig, PolicyConfig
from pact_nemo.policy.model_source import ModelSource, model_source
from pact_nemo.policy.policy import MegatronPolicy
from tests.workers.policy_kit import REPO, launch
from tests.workers.policy_worker import weights_digest

SLOW = pytest.mark.slow
Models = Callable[[str], Path]


def policy(path: Path, **further: Any) -> MegatronPolicy:
    config = PolicyConfig(precision="fp32", micro_batch_tokens=96, logprob_chunk=16)
    return MegatronPolicy(config, OptimizerConfig(), path, seed=1, total_steps=4, **further)


def loaded(source: ModelSource) -> MegatronPolicy:
    return policy(source.described, trainable=False, weights=CheckpointWeights(source))


def same_weights(one: MegatronPolicy, other: MegatronPolicy) -> bool:
    pairs = zip(one.chunks[0].parameters(), other.chunks[0].parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.fixture(scope="module")
def exported(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """(HF folder, our Megatron-Bridge folder) of a family."""
    made: dict[str, tuple[Path, Path]] = {}

    def get(family: str) -> tuple[Path, Path]:
        if family not in made:
            folder = tmp_path_factory.mktemp(f"bridge-{family}") / "megatron_bridge"
            made[family] = (models(family), export_bridge_to(policy(models(family)), folder, version=3))
        return made[family]

    return get


@pytest.fixture
def broken(exported: Any, tmp_path: Path) -> ModelSource:
    """A copy to break."""
    shutil.copytree(exported("qwen3")[1], tmp_path / "mb")
    return model_source(tmp_path / "mb")


def bridge_s_own(*words: str | Path) -> dict[str, Any]:
    worker = REPO / "tests" / "workers" / "bridge_loader.py"
    done = subprocess.run([sys.executable, str(worker), *map(str, words)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


# ------------------------------------------------------------------ whole ones


@pytest.mark.parametrize("family", ["qwen3", *(pytest.param(f, marks=SLOW) for f in ("llama", "qwen2", "qwen3_moe"))])
def test_an_export_reads_back_bit_for_bit(family: str, exported: Any) -> None:
    hf, folder = exported(family)
    assert verify_manifest(folder, expect_version=3).extra == {"format": "megatron_bridge", "dtype": "float32"}
    source = model_source(folder)
    assert source == ModelSource(folder / SAVE / "tokenizer", folder / SAVE)
    names = set(read_index(folder / SAVE).state_dict_metadata)
    # what Transformer Engine's modules ask for, and megatron's loader insists on
    assert {f"decoder.layers.self_attention.core_attention._extra_state/shard_{n}_4" for n in range(4)} < names
    assert "decoder.final_layernorm._extra_state/shard_0_1" in names
    assert same_weights(loaded(source), policy(hf, trainable=False))
    assert model_source(folder / SAVE, hf) == ModelSource(hf, folder / SAVE)


@pytest.mark.parametrize(
    "family",
    ["qwen3", *(pytest.param(f, marks=SLOW) for f in ("llama", "qwen2", "qwen3_moe", "mistral", "llama_biases"))],
)
def test_the_bridge_s_own_loader_gives_transformers_logits(family: str, exported: Any) -> None:
    hf, folder = exported(family)
    answer = bridge_s_own("logits", folder / SAVE, hf)
    assert answer["difference"] < 2e-5 < 1 < answer["largest"]


@SLOW
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_a_checkpoint_that_the_bridge_wrote_is_its_model(family: str, models: Models, tmp_path: Path) -> None:
    bridge_s_own("write", models(family), tmp_path / "theirs")
    source = model_source(tmp_path / "theirs", models(family))
    assert source.checkpoint == tmp_path / "theirs" / SAVE
    assert same_weights(loaded(source), policy(models(family), trainable=False))


LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_parallel": 2},
    "pp2vp2": {"pipeline_parallel": 2, "virtual_pipeline": 2},
    "ep2": {"expert_parallel": 2},
    "tp2sp": {"tensor_parallel": 2, "sequence_parallel": True},
}


@pytest.mark.parametrize(
    ("family", "names"),
    [("llama", ("tp2", "pp2vp2")), pytest.param("qwen3_moe", ("ep2", "tp2sp", "pp2vp2"), marks=SLOW)],
)
def test_every_layout_reads_and_writes_the_same_weights(
    family: str, names: tuple[str, ...], exported: Any, tmp_path: Path
) -> None:
    hf, folder = exported(family)
    jobs = [
        {
            "name": name,
            "hf_path": str(hf),
            "checkpoint": str(folder / SAVE),
            "config": LAYOUTS[name],
            "policy": {"trainable": False},
            "actions": [["digest", None], ["export_bridge", str(tmp_path / name)]],
        }
        for name in names
    ]
    expected = weights_digest(policy(hf, trainable=False))
    assert [answers[0] for answers in launch(2, jobs, tmp_path / "jobs").values()] == [expected] * len(names)
    for name in names:  # what two ranks wrote, one rank reads
        assert same_weights(loaded(model_source(tmp_path / name)), policy(hf, trainable=False))


# -------------------------------------------------------------------- refusals


def changed(save: Path, **settings: Any) -> None:
    path = save / "run_config.yaml"
    content = yaml.safe_load(path.read_text())
    content["model"].update(settings)
    path.write_text(yaml.safe_dump(content))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("num_layers", 5),
        ("hidden_size", 72),
        ("num_attention_heads", 4),
        ("num_query_groups", 8),
        ("kv_channels", 8),
        ("ffn_hidden_size", 97),
        ("vocab_size", 132),
        ("rotary_base", 500000),
        ("rope_scaling", True),
        ("layernorm_epsilon", 1e-5),
        ("share_embeddings_and_output_weights", True),
        ("qk_layernorm", False),
        ("add_qkv_bias", True),
        ("num_moe_experts", 8),
        ("window_size", [6, 0]),
        ("activation_func", {"_target_": "torch.nn.functional.gelu", "_call_": False}),
        ("normalization", "LayerNorm"),
        ("multi_latent_attention", True),
        ("mtp_num_layers", 1),
        ("rotary_percent", 0.5),
    ],
)
def test_settings_that_contradict_config_json_are_named(setting: str, value: Any, broken: ModelSource) -> None:
    assert broken.checkpoint is not None
    architecture = check_architecture(broken.described)
    check_checkpoint(broken, architecture)  # whole before
    changed(broken.checkpoint, **{setting: value})
    with pytest.raises(CheckpointError, match=rf"run_config.yaml: model\.{setting} is "):
        check_checkpoint(broken, architecture)


def test_settings_are_read_and_never_called(broken: ModelSource, tmp_path: Path) -> None:
    assert broken.checkpoint is not None
    mark = tmp_path / "ran"
    changed(broken.checkpoint, init_method={"_target_": "pathlib.Path.touch", "_args_": [str(mark)]})
    check_checkpoint(broken, check_architecture(broken.described))
    text = (broken.checkpoint / "run_config.yaml").read_text()
    (broken.checkpoint / "run_config.yaml").write_text(f"x: !!python/object/apply:os.mkdir [{mark}]\n{text}")
    with pytest.raises(CheckpointError, match="run_config.yaml can't be read"):
        check_checkpoint(broken, check_architecture(broken.described))
    assert not mark.exists()


class Bomb:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_pickles_beside_the_weights_are_not_read(broken: ModelSource, models: Models, tmp_path: Path) -> None:
    """Those of a training run hold optimizer, generators and arguments; nothing of them is needed."""
    assert broken.checkpoint is not None
    mark = tmp_path / "ran"
    for name in ("common.pt", "train_state.pt"):
        torch.save({"args": Bomb(mark)}, broken.checkpoint / name)
    assert same_weights(loaded(broken), policy(models("qwen3"), trainable=False))
    (broken.checkpoint / ".metadata").write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(CheckpointError, match=r"\.metadata would run "):
        loaded(broken)
    assert not mark.exists()


def test_torn_files_are_named(broken: ModelSource) -> None:
    save = broken.checkpoint
    assert save is not None
    shard = max(save.glob("*.distcp"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=rf"{shard.name} has {len(content) - 1} bytes, {len(content)} are"):
        stored_weights(save)
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"{shard.name} is missing"):
        stored_weights(save)
    shard.write_bytes(bytes(len(content)))
    with pytest.raises(CheckpointError, match="can't be read .*copy that checkpoint again"):
        loaded(broken)


def test_another_format_is_named(broken: ModelSource) -> None:
    assert broken.checkpoint is not None
    (broken.checkpoint / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(CheckpointError, match="format 'zarr' is not read, torch_dist is"):
        stored_weights(broken.checkpoint)
    (broken.checkpoint / "metadata.json").unlink()
    with pytest.raises(CheckpointError, match="its format is not torch_dist"):
        stored_weights(broken.checkpoint)


def test_adapters_alone_are_named(broken: ModelSource) -> None:
    assert broken.checkpoint is not None
    path = broken.checkpoint / "run_config.yaml"
    path.write_text(path.read_text() + "peft: {_target_: megatron.bridge.peft.lora.LoRA}\n")
    with pytest.raises(CheckpointError, match="holds adapters"):
        check_checkpoint(broken, check_architecture(broken.described))


@pytest.mark.parametrize(
    ("theirs", "asked", "said"),
    [
        ("qwen3", {"num_hidden_layers": 2}, r"has shape \[4, .*give model.hf_config"),
        ("qwen3", {"vocab_size": 140}, "embedding.word_embeddings.weight has shape .*at least 140"),
        ("qwen3", {"tie_word_embeddings": True}, "output_layer.weight would not be loaded"),
        ("llama", {"tie_word_embeddings": False}, "no output_layer.weight"),
    ],
)
def test_weights_of_another_model_are_named_though_settings_agree(
    theirs: str, asked: dict[str, Any], said: str, exported: Any, tmp_path: Path
) -> None:
    """``run_config.yaml`` was changed to agree with a wrong ``config.json``: the weights themselves don't."""
    hf, folder = exported(theirs)
    shutil.copytree(folder, tmp_path / "mb")
    wrong = tmp_path / "hf"
    wrong.mkdir()
    config = json.loads((hf / "config.json").read_text()) | asked
    if "num_hidden_layers" in asked and "layer_types" in config:
        config["layer_types"] = config["layer_types"][: asked["num_hidden_layers"]]
        config["max_window_layers"] = asked["num_hidden_layers"]
    (wrong / "config.json").write_text(json.dumps(config))
    source = model_source(tmp_path / "mb", wrong)
    assert source.checkpoint is not None
    architecture = check_architecture(wrong)
    with pytest.raises(CheckpointError, match="run_config.yaml: model"):
        check_checkpoint(source, architecture)
    wanted = {key: value for key, value in bridge_settings(architecture).items() if key != "activation_func"}
    changed(source.checkpoint, **wanted)
    with pytest.raises(CheckpointError, match=f"(?s){said}"):
        loaded(source)


def test_a_value_that_is_not_finite_is_named(models: Models, tmp_path: Path) -> None:
    damaged = policy(models("qwen3"), trainable=False)
    with torch.no_grad():
        damaged.chunks[0].decoder.layers[1].mlp.linear_fc2.weight[3, 5] = float("nan")
    folder = export_bridge_to(damaged, tmp_path / "mb", version=0)
    with pytest.raises(CheckpointError, match="linear_fc2.weight got no weight, or one that is NaN"):
        loaded(model_source(folder))


# ------------------------------------------------------------- which folder it is


def test_which_folder_is_which(exported: Any, tmp_path: Path) -> None:
    hf, folder = exported("qwen3")
    assert model_source(hf) == ModelSource(hf)
    theirs = tmp_path / "theirs"
    shutil.copytree(folder, theirs)
    shutil.rmtree(theirs / SAVE / "tokenizer")
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: model_source(theirs), "set model.hf_config to a Hugging Face folder"),
        (lambda: model_source(hf, hf), "model.hf_config=.* is none"),
    ]
    for call, said in cases:
        with pytest.raises(ConfigError, match=said):
            call()
    shutil.copytree(theirs / SAVE, theirs / "iter_0000020")
    assert model_source(theirs, hf).checkpoint == theirs / SAVE, "the tracker's file says which is whole"
    (theirs / "latest_checkpointed_iteration.txt").write_text("30")
    with pytest.raises(ConfigError, match="says '30', and there is no such"):
        model_source(theirs, hf)
    (theirs / "latest_checkpointed_iteration.txt").unlink()
    assert model_source(theirs, hf).checkpoint == theirs / "iter_0000020"
    (theirs / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="give the folder of one of them"):
        model_source(theirs, hf)
