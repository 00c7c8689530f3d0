"""Exports by several ranks at once: the tensors of one process, every rank writing its share, and all or nothing when one of them can't."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pact_nemo.checkpoints.manifest import read_manifest, verify_manifest
from pact_nemo.policy.fp8_block import dequantise
from tests.workers.policy_kit import launch, make_model
from tests.workers.policy_worker import run_jobs

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "tied, TP 2 x PP 2": ("llama", {"tensor_parallel": 2, "pipeline_parallel": 2}),
    "biases, PP 2 x DP 2": ("qwen2", {"pipeline_parallel": 2}),
    "experts, EP 2 x DP 2": ("qwen3_moe", {"expert_parallel": 2}),
}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    base = tmp_path_factory.mktemp("exports")
    for family in ("llama", "qwen2", "qwen3_moe"):
        make_model(base / family, family)

    def jobs(ranks: int) -> list[dict[str, Any]]:
        found = []
        for index, (family, config) in enumerate(CASES.values()):
            root = str(base / f"{index}-{ranks}")
            actions = [["update", None], ["export_version", [root, 3]]]
            actions += [["export_fails", [root, 4, 2]], ["export_version", [root, 4]]] if ranks > 1 else []
            found.append({"name": str(index), "hf_path": str(base / family), "config": config if ranks > 1 else {}, "actions": actions})
        return found

    return base, launch(4, jobs(4), base) | {f"one-{name}": answer for name, answer in run_jobs(jobs(1)).items()}


@pytest.mark.parametrize("index", range(len(CASES)), ids=list(CASES))
def test_four_writers_write_what_one_writes(index: int, exports: tuple[Path, dict[str, Any]]) -> None:
    base, _ = exports
    many, one = base / f"{index}-4" / "v000003", base / f"{index}-1" / "v000003"
    files = sorted(path.name for path in many.glob("*.safetensors"))
    assert files == [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]
    sizes = [(many / name).stat().st_size for name in files]
    assert max(sizes) < 1.9 * min(sizes), sizes  # a tiny model: one tensor is a good part of a file
    got = {name: tensor for file in files for name, tensor in load_file(many / file).items()}
    want = load_file(one / "model.safetensors")
    assert got.keys() == want.keys()
    for name, tensor in want.items():  # trained under another layout: equal to rounding
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-6, msg=name)
    assert verify_manifest(many, expect_version=3).files.keys() >= set(files)
    assert json.loads((many / "model.safetensors.index.json").read_text())["weight_map"].keys() == got.keys()


@pytest.mark.parametrize("index", range(len(CASES)), ids=list(CASES))
def test_a_writer_that_fails_fails_all_and_leaves_nothing(index: int, exports: tuple[Path, dict[str, Any]]) -> None:
    """Every rank has the failed one's message (the worker compares them), and the next export of the same version works."""
    base, answers = exports
    assert "can't be written ([Errno 28] No space left on device); make room there" in answers[str(index)][2]
    root = base / f"{index}-4"
    assert sorted(path.name for path in root.iterdir()) == ["v000003", "v000004"]
    assert read_manifest(root / "v000004").version == 4


def test_a_sharded_export_loads_in_transformers(exports: tuple[Path, dict[str, Any]]) -> None:
    from transformers import AutoModelForCausalLM

    base, _ = exports
    folder = base / "1-4" / "v000003"
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    for path in folder.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            assert torch.equal(loaded[name], tensor), name


def test_fp8_exports_are_half_the_bytes_and_dequantise_to_the_weights(tmp_path: Path) -> None:
    """The public block-scaled format: linear layers of the decoder in FP8 with a scale for each 128 x 128 block, everything else in bf16."""
    family = make_model(tmp_path / "hf", "qwen3_moe")
    answers = run_jobs([{"name": "a", "hf_path": str(family), "actions": [["export_fp8", str(tmp_path / "out")]]}])
    assert answers["a"] == [None]
    before, after = load_file(family / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    quantised = {name for name in before if f"{name}_scale_inv" in after}
    assert after.keys() == before.keys() | {f"{name}_scale_inv" for name in quantised}
    assert quantised == {name for name in before if ".layers." in name and name.endswith("_proj.weight")}
    for name, tensor in before.items():
        if name in quantised:
            assert after[name].dtype == torch.float8_e4m3fn and after[f"{name}_scale_inv"].dtype == torch.float32
            error = (dequantise(after[name], after[f"{name}_scale_inv"]) - tensor).abs()
            assert error.max() <= 2.0**-4 * tensor.abs().max()
        else:
            torch.testing.assert_close(after[name], tensor.to(torch.bfloat16), rtol=0, atol=0)
    settings = config["quantization_config"]
    assert (settings["quant_method"], settings["weight_block_size"]) == ("fp8", [128, 128])
    assert {"lm_head", "model.embed_tokens", "model.layers.0.mlp.gate"} <= set(settings["modules_to_not_convert"])


def test_files_that_did_not_change_are_linked_not_written(tmp_path: Path) -> None:
    family = make_model(tmp_path / "hf", "llama")
    root = str(tmp_path / "exports")
    run_jobs([{"name": "a", "hf_path": str(family), "actions": [["export_version", [root, 1]], ["export_version", [root, 2]], ["update", None],
                                                                 ["export_version", [root, 3]]]}])  # fmt: skip
    first, second, third = (tmp_path / "exports" / f"v00000{version}" / "model.safetensors" for version in (1, 2, 3))
    assert first.stat().st_ino == second.stat().st_ino != third.stat().st_ino
    assert not torch.equal(load_file(first)["model.norm.weight"], load_file(third)["model.norm.weight"])
    assert verify_manifest(second.parent, expect_version=2).version == 2
