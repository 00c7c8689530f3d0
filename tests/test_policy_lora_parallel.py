"""Adapters under every parallel layout: real gloo processes, the numbers of one process, and checkpoints that another
layout goes on from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.test_policy_parallel import flat
from tests.workers.policy_kit import launch, make_model
from tests.workers.policy_worker import run_jobs

DENSE = {"rank": 4, "alpha": 6.0}
ATTENTION = {**DENSE, "targets": ["linear_qkv", "linear_proj"]}
FAMILY_LORA = {"llama": DENSE, "qwen2": DENSE, "qwen3": DENSE, "qwen3_moe": ATTENTION}
OPTIMIZER = {"lr": 1e-2}
#: layout -> ranks, settings, families
LAYOUTS: dict[str, tuple[int, dict[str, Any], list[str]]] = {
    "tp2": (2, {"tensor_parallel": 2}, ["llama"]),
    "tp2_sp": (2, {"tensor_parallel": 2, "sequence_parallel": True}, ["qwen2", "qwen3"]),
    "tp2_sp_recompute": (2, {"tensor_parallel": 2, "sequence_parallel": True, "recompute": "full"}, ["qwen3"]),
    "pp2": (2, {"pipeline_parallel": 2}, ["llama", "qwen3"]),
    "pp2_recompute": (2, {"pipeline_parallel": 2, "recompute": "full"}, ["llama"]),
    "pp2_vp2": (2, {"pipeline_parallel": 2, "virtual_pipeline": 2}, ["llama"]),
    "cp2": (2, {"context_parallel": 2}, ["qwen3"]),
    "dp2": (2, {}, ["llama"]),
    "dp2_overlap": (2, {"overlap_grad_reduce": True}, ["llama"]),
    "dp2_plain_optimizer": (2, {"distributed_optimizer": False}, ["llama"]),
    "ep2": (2, {"expert_parallel": 2}, ["qwen3_moe"]),
    "tp2_sp_ep2": (2, {"tensor_parallel": 2, "sequence_parallel": True, "expert_parallel": 2}, ["qwen3_moe"]),
    "tp2_sp_pp2_cp2": (
        8,
        {"tensor_parallel": 2, "sequence_parallel": True, "pipeline_parallel": 2, "context_parallel": 2},
        ["qwen3"],
    ),
}
FAST = {
    ("llama", "tp2"),
    ("qwen3", "tp2_sp"),
    ("llama", "pp2_recompute"),
    ("llama", "pp2_vp2"),
    ("qwen3", "cp2"),
    ("llama", "dp2"),
    ("qwen3_moe", "ep2"),
}
CASES = [
    pytest.param(family, layout, marks=() if (family, layout) in FAST else pytest.mark.slow)
    for layout, (_, _, families) in LAYOUTS.items()
    for family in families
]
#: checkpoint's layout -> the one that goes on from it
ROUTES = [("tp2", "tp2"), ("tp2", "pp2_vp2"), ("pp2_vp2", "dp2")]


def job(base: Path, family: str, layout: str, config: dict[str, Any]) -> dict[str, Any]:
    name = f"{family}-{layout}"
    actions = [
        ["logprobs", None],
        ["update", None],
        ["save", str(base / f"saved-{name}")],
        ["update", None],
        ["logprobs", None],
        ["load_reference", str(base / family)],
        ["reference", None],
        ["adapter", str(base / f"adapter-{name}")],
        ["export", str(base / f"merged-{name}")],
    ]
    config = {**config, "lora": FAMILY_LORA[family]}
    return {"name": name, "hf_path": str(base / family), "config": config, "optimizer": OPTIMIZER, "actions": actions}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Results by "family-layout"; "one" is a single process."""
    base = tmp_path_factory.mktemp("lora")
    for family in FAMILY_LORA:
        make_model(base / family, family)
    return {"base": base, **run_jobs([job(base, family, "one", {}) for family in FAMILY_LORA])}


def made(results: dict[str, Any], family: str, layout: str) -> Any:
    """A case's results; the first one asked for runs all that are as fast and have its number of ranks, in one job."""
    if f"{family}-{layout}" not in results:
        base, ranks, fast = results["base"], LAYOUTS[layout][0], (family, layout) in FAST
        jobs = [
            job(base, f, name, config)
            for name, (needed, config, families) in LAYOUTS.items()
            if needed == ranks
            for f in families
            if ((f, name) in FAST) == fast
        ]
        results.update(launch(ranks, jobs, base, timeout=500))
    return results[f"{family}-{layout}"]


def assert_same_files(base: Path, kind: str, file: str, ours: str, theirs: str) -> None:
    found, expected = (load_file(base / f"{kind}-{name}" / file) for name in (ours, theirs))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_a_layout_gives_the_adapters_of_one_process(family: str, layout: str, results: dict[str, Any]) -> None:
    ours, reference = made(results, family, layout), results[f"{family}-one"]
    for index in (0, 4, 6):  # log-probs before and after the steps, and under the base
        torch.testing.assert_close(flat(ours[index]), flat(reference[index]), rtol=0, atol=1e-5)
    assert (flat(ours[4]) - flat(ours[0])).abs().max() > 0.05
    torch.testing.assert_close(flat(ours[6]), flat(ours[0]), rtol=0, atol=1e-6)
    for index in (1, 3):
        assert ours[index]["loss"] == pytest.approx(reference[index]["loss"], abs=1e-6)
        assert ours[index]["grad_norm"] == pytest.approx(reference[index]["grad_norm"], rel=1e-5)
    base, name = results["base"], f"{family}-{layout}"
    assert_same_files(base, "adapter", "adapter_model.safetensors", name, f"{family}-one")
    assert_same_files(base, "merged", "model.safetensors", name, f"{family}-one")
    assert (base / f"adapter-{name}" / "adapter_config.json").read_text() == (
        base / f"adapter-{family}-one" / "adapter_config.json"
    ).read_text()


def test_another_layout_goes_on_from_a_checkpoint(results: dict[str, Any]) -> None:
    base = results["base"]
    jobs = []
    for source, target in ROUTES:
        made(results, "llama", source)
        one = job(base, "llama", target, LAYOUTS[target][1])
        saved = str(base / f"saved-llama-{source}" / "step_000001")
        jobs.append({**one, "name": f"{source}-{target}", "actions": [["load", saved], ["update", None]]})
    resumed = launch(2, jobs, base / "resumed")
    for name, answers in resumed.items():
        expected = results["llama-one"][3]
        assert answers[1]["loss"] == pytest.approx(expected["loss"], abs=1e-6), name
        assert answers[1]["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5), name
    assert resumed["tp2-tp2"][1] == results["llama-tp2"][3], "the same layout: bit for bit"
