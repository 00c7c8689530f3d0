"""Exports by several ranks: the tensors of one process bit for bit, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pact_nemo.checkpoints.manifest import read_manifest, verify_manifest
from pact_nemo.runtime.tensor_files import read_tensors
from tests.workers.policy_kit import launch, make_model
from tests.workers.policy_worker import run_jobs

LAYOUTS: dict[str, tuple[int, dict[str, Any], list[str]]] = {
    "tp2": (2, {"tensor_parallel": 2}, ["llama", "qwen3"]),  # tied, untied
    "pp2": (2, {"pipeline_parallel": 2}, ["llama", "qwen3"]),
    "ep2": (2, {"expert_parallel": 2}, ["qwen3_moe"]),
    "tp2_one_writer": (2, {"tensor_parallel": 2, "export_writers": 1}, ["qwen3"]),
    "tp2_pp2": (4, {"tensor_parallel": 2, "pipeline_parallel": 2}, ["llama", "qwen3"]),
}
FAST = {("qwen3", "tp2"), ("llama", "pp2"), ("qwen3_moe", "ep2")}
CASES = [
    pytest.param(family, layout, marks=() if (family, layout) in FAST else pytest.mark.slow)
    for layout, (_, _, families) in LAYOUTS.items()
    for family in families
]
FAMILIES = sorted({family for _, _, families in LAYOUTS.values() for family in families})


def writers(layout: str) -> int:
    ranks, config, _ = LAYOUTS[layout]
    return int(config.get("export_writers", ranks))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Answers by "family-layout"; "one" is a single process."""
    base = tmp_path_factory.mktemp("exports")
    for family in FAMILIES:
        make_model(base / family, family)
    return {"base": base, **run_jobs([job(base, family, "one", {}, 1) for family in FAMILIES])}


def job(base: Path, family: str, layout: str, config: dict[str, Any], ranks: int) -> dict[str, Any]:
    """v1, v2 of the same weights, v3 in FP8, and after an update v4, at first on a full disk."""
    root = str(base / f"{family}-{layout}")
    actions: list[Any] = [
        ["export_version", {"root": root, "version": 1}],
        ["export_version", {"root": root, "version": 2}],
    ]
    actions += [["export_version", {"root": root, "version": 3, "dtype": "fp8_block"}], ["update", None]]
    if ranks > 1:
        actions += [
            ["export_version", {"root": root, "version": 4, "full_rank": rank}] for rank in (0, writers(layout) - 1)
        ]
        actions += [["export_version", {"root": root, "version": 4}]]
    return {"name": f"{family}-{layout}", "hf_path": str(base / family), "config": config, "actions": actions}


def made(results: dict[str, Any], family: str, layout: str) -> Any:
    """A case's answers; the first one asked for runs all that are as fast and have its number of ranks, in one job."""
    if f"{family}-{layout}" not in results:
        base, ranks, fast = results["base"], LAYOUTS[layout][0], (family, layout) in FAST
        alike = [
            (f, name)
            for name, (needed, _, families) in LAYOUTS.items()
            if needed == ranks
            for f in families
            if ((f, name) in FAST) == fast
        ]
        results.update(launch(ranks, [job(base, f, name, LAYOUTS[name][1], ranks) for f, name in alike], base))
    return results[f"{family}-{layout}"]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_the_ranks_write_together_what_one_process_writes(family: str, layout: str, results: dict[str, Any]) -> None:
    made(results, family, layout)
    for version in (1, 3):  # float32, FP8
        ours, reference = (results["base"] / f"{family}-{name}" / f"v{version:06d}" for name in (layout, "one"))
        verify_manifest(ours, expect_version=version)
        got, want = tensors(ours), tensors(reference)
        assert got.keys() == want.keys() and all(
            torch.equal(got[name].view(torch.uint8), want[name].view(torch.uint8)) for name in want
        )
        assert {name: entry.shape for name, entry in read_tensors(ours).items()} == {
            name: tuple(t.shape) for name, t in want.items()
        }, "the index"
    initial = load_file(results["base"] / family / "model.safetensors")
    exported = tensors(results["base"] / f"{family}-{layout}" / "v000001")
    assert initial.keys() == exported.keys() and all(torch.equal(initial[name], exported[name]) for name in initial)


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_a_full_disk_of_one_rank_fails_all_ranks_and_leaves_nothing(
    family: str, layout: str, results: dict[str, Any]
) -> None:
    """The worker checks that every rank gives the same answer; a rank that waited for ever would time out."""
    *failures, last = made(results, family, layout)[4:]
    assert failures == [["CheckpointError", True, ["v000001", "v000002", "v000003"]]] * 2
    assert last[0] == "v000004" and last[1] >= writers(layout), "the next export works"
    verify_manifest(results["base"] / f"{family}-{layout}" / "v000004", expect_version=4)


def test_equal_files_are_linked(results: dict[str, Any]) -> None:
    made(results, "qwen3", "tp2")
    first, second = (results["base"] / "qwen3-tp2" / f"v{version:06d}" for version in (1, 2))
    weights = [name for name in read_manifest(first).files if name.endswith(".safetensors")]
    assert len(weights) >= 2 and all((first / name).samefile(second / name) for name in weights)


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_transformers_loads_the_files_of_several_writers(family: str, layout: str, results: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    made(results, family, layout)
    ours, source = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
        for folder in (results["base"] / f"{family}-{layout}" / "v000001", results["base"] / family)
    )
    assert ours.keys() == source.keys() and all(torch.equal(ours[name], source[name]) for name in source)
