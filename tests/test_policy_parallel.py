"""Every parallel layout gives the step of one process: real gloo processes under torchrun, tiny models with an odd
vocabulary.

Compared: log-probs, loss, gradient norm, metrics and weights after two steps, the second of which is a PACT mini-batch
with all four terms, ragged lengths and empty micro-batches (weights through the Hugging Face export, so the round trip
under that layout is part of it); the round trip of untouched weights; a refusal of non-finite numbers on all ranks
together.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.workers.policy_kit import launch, make_model
from tests.workers.policy_worker import run_jobs

ALL = ["llama", "qwen2", "qwen3"]  # tied, tied with biases, untied with q/k norms
MOE = "qwen3_moe"
BIASES, WINDOW, MOE_WINDOW = "llama_biases", "qwen3_window", "qwen3_moe_window"
PROMPTS = 11  # of the PACT batch: not a multiple of any number of ranks, so some of them get empty micro-batches
LAYOUTS: dict[str, tuple[int, dict[str, Any], list[str]]] = {
    "tp2": (2, {"tensor_parallel": 2}, [*ALL, BIASES]),
    "tp2_sp": (2, {"tensor_parallel": 2, "sequence_parallel": True}, ["llama", "qwen3", BIASES, WINDOW]),
    "ep2": (2, {"expert_parallel": 2}, [MOE]),
    "moe_tp2_sp": (2, {"tensor_parallel": 2, "sequence_parallel": True}, [MOE, MOE_WINDOW]),
    "pp2": (2, {"pipeline_parallel": 2}, ALL),
    "pp2_vp2": (2, {"pipeline_parallel": 2, "virtual_pipeline": 2}, ["llama"]),
    "cp2": (2, {"context_parallel": 2}, ["llama", "qwen3", WINDOW]),
    "dp2": (2, {}, ["llama", "qwen3"]),
    "dp2_plain_optimizer": (2, {"distributed_optimizer": False}, ["llama"]),
    "dp2_no_sharing": (2, {"share_prefix": False}, ["llama"]),
    "dp2_overlap": (2, {"overlap_grad_reduce": True}, ["llama"]),
    "pp2_recompute": (2, {"pipeline_parallel": 2, "recompute": "full"}, ["llama"]),
    "tp2_pp2": (4, {"tensor_parallel": 2, "pipeline_parallel": 2}, ["llama", "qwen3"]),
    "pp2_vp2_window": (2, {"pipeline_parallel": 2, "virtual_pipeline": 2}, [WINDOW]),
    "tp2_sp_cp2": (4, {"tensor_parallel": 2, "sequence_parallel": True, "context_parallel": 2}, ["qwen3"]),
    "pp2_dp2": (4, {"pipeline_parallel": 2}, ["llama"]),
    "pp2_vp2_dp2_overlap": (4, {"pipeline_parallel": 2, "virtual_pipeline": 2, "overlap_grad_reduce": True}, ["llama"]),
    "cp2_dp2": (4, {"context_parallel": 2}, ["llama"]),
    "tp2_sp_pp2_cp2": (
        8,
        {"tensor_parallel": 2, "sequence_parallel": True, "pipeline_parallel": 2, "context_parallel": 2},
        ["llama", "qwen3"],
    ),
    "tp2_pp2_dp2": (8, {"tensor_parallel": 2, "pipeline_parallel": 2}, ["qwen2"]),
    "tp2_pp2_vp2_dp2_overlap": (
        8,
        {"tensor_parallel": 2, "pipeline_parallel": 2, "virtual_pipeline": 2, "overlap_grad_reduce": True},
        ["llama"],
    ),
    "pp2_vp2_cp2_dp2": (8, {"pipeline_parallel": 2, "virtual_pipeline": 2, "context_parallel": 2}, ["qwen3"]),
    "pp4_dp2": (8, {"pipeline_parallel": 4}, ["llama"]),
    "tp4_sp_dp2_overlap": (
        8,
        {"tensor_parallel": 4, "sequence_parallel": True, "overlap_grad_reduce": True},
        ["qwen3"],
    ),
    "ep4_dp2": (8, {"expert_parallel": 4}, [MOE]),
    "tp2_sp_ep2_pp2": (
        8,
        {"tensor_parallel": 2, "sequence_parallel": True, "expert_parallel": 2, "pipeline_parallel": 2},
        [MOE],
    ),
}
#: of at most four ranks; all others are slow
FAST = {
    (BIASES, "tp2_sp"),
    (MOE, "ep2"),
    (MOE_WINDOW, "moe_tp2_sp"),
    ("qwen2", "pp2"),
    ("llama", "pp2_vp2"),
    ("qwen3", "cp2"),
    (WINDOW, "cp2"),
    ("llama", "dp2"),
    ("llama", "dp2_plain_optimizer"),
    ("llama", "dp2_overlap"),
    ("qwen3", "tp2_sp_cp2"),
}
CASES = [
    pytest.param(family, layout, marks=() if (family, layout) in FAST else pytest.mark.slow)
    for layout, (_, _, families) in LAYOUTS.items()
    for family in families
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Results by "family-layout"; "one" is a single process."""
    base = tmp_path_factory.mktemp("parallel")
    for family in [*ALL, MOE, BIASES, WINDOW, MOE_WINDOW]:
        make_model(base / family, family)

    return {
        "base": base,
        **run_jobs([job(base, family, "one", {}) for family in [*ALL, MOE, BIASES, WINDOW, MOE_WINDOW]]),
    }


def job(base: Path, family: str, layout: str, config: dict[str, Any]) -> dict[str, Any]:
    export = ["export", str(base / f"trained-{family}-{layout}")]
    actions = [["export", str(base / f"initial-{family}-{layout}")], ["broken_update", None]]
    actions += [
        ["logprobs", None],
        ["entropies", None],
        ["update", None],
        ["pact_update", PROMPTS],
        export,
        ["gradient_cosine", None],
    ]
    return {"name": f"{family}-{layout}", "hf_path": str(base / family), "config": config, "actions": actions}


def made(results: dict[str, Any], family: str, layout: str) -> Any:
    """A case's results; the first one asked for runs all that are as fast and have its number of ranks, in one job."""
    if f"{family}-{layout}" not in results:
        base, ranks, fast = results["base"], LAYOUTS[layout][0], (family, layout) in FAST
        alike = [
            (f, name)
            for name, (needed, _, families) in LAYOUTS.items()
            if needed == ranks
            for f in families
            if ((f, name) in FAST) == fast
        ]
        jobs = [job(base, f, name, LAYOUTS[name][1]) for f, name in alike]
        results.update(launch(ranks, jobs, base, timeout=500))
    return results[f"{family}-{layout}"]


def flat(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor([value for row in rows for value in row])


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_a_layout_gives_the_same_step(family: str, layout: str, results: dict[str, Any]) -> None:
    ours, reference = made(results, family, layout), results[f"{family}-one"]
    for index in (2, 3):  # log-probs, entropies
        torch.testing.assert_close(flat(ours[index]), flat(reference[index]), rtol=0, atol=1e-5)
    for got, want in zip(ours[4:6], reference[4:6], strict=True):
        assert got["loss"] == pytest.approx(want["loss"], abs=1e-6)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-5)
        assert got["metrics"] == pytest.approx(want["metrics"], rel=1e-5, abs=1e-6)
        torch.testing.assert_close(flat(got["logprobs"]), flat(want["logprobs"]), rtol=0, atol=1e-5)
    terms = reference[5]["metrics"]
    assert ours[7] == pytest.approx(reference[7], rel=1e-4)  # cosine of two gradients, their norms
    assert (
        all(terms[f"loss/{name}"] != 0 for name in ("rl_x", "rl_h", "sft_reasoning", "sft_call", "kl", "entropy"))
        and terms["clip/h"] > 0
    )
    torch.testing.assert_close(flat(ours[5]["entropies"]), flat(reference[5]["entropies"]), rtol=0, atol=1e-5)
    base: Path = results["base"]
    trained, expected = (load_file(base / f"trained-{family}-{name}" / "model.safetensors") for name in (layout, "one"))
    initial = load_file(base / family / "model.safetensors")
    for name, value in expected.items():
        torch.testing.assert_close(trained[name], value, rtol=0, atol=1e-5, msg=name)
        assert (value - initial[name]).abs().max() > 1e-4, f"{name} was trained"


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_untouched_weights_come_back_bit_for_bit(family: str, layout: str, results: dict[str, Any]) -> None:
    made(results, family, layout)
    base: Path = results["base"]
    before, after = (
        load_file(base / family / "model.safetensors"),
        load_file(base / f"initial-{family}-{layout}" / "model.safetensors"),
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_non_finite_numbers_are_refused_on_all_ranks_together(
    family: str, layout: str, results: dict[str, Any]
) -> None:
    """Only one micro-batch on one rank sees them; the worker checks that every rank gives the same answer and goes
    on.
    """
    message = made(results, family, layout)[1]
    assert message == "update 1: not finite: loss, bad; the weights were not changed"
