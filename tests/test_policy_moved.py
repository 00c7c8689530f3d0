"""The share of bfloat16 weights that an update changes, against every weight before and after it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.workers.policy_kit import launch, loss_fn, make_trees
from tests.workers.policy_worker import run_jobs
from tests.workers.small_policy import build


@pytest.mark.parametrize("lr", [1e-3, 1e-5])
@pytest.mark.parametrize("distributed", [True, False])
def test_it_is_that_of_all_weights(lr: float, distributed: bool, models: Callable[[str], Path]) -> None:
    policy = build(models("qwen3"), precision="bf16", distributed_optimizer=distributed, optimizer={"lr": lr})

    def weights() -> torch.Tensor:
        return torch.cat([p.detach().clone().flatten() for chunk in policy.chunks for p in chunk.parameters()])

    before = weights()
    moved = policy.update(make_trees(5, seed=3), loss_fn).moved
    exact = float((weights() != before).double().mean())
    assert moved == pytest.approx(exact, abs=0.01) and (0.5 < exact < 1.0 if lr == 1e-3 else 0.0 < exact < 0.1)


def test_in_float32_nothing_is_asked(models: Callable[[str], Path]) -> None:
    assert build(models("llama")).update(make_trees(2, seed=3), loss_fn).moved is None


def test_any_layout_tells_the_same(models: Callable[[str], Path], tmp_path: Path) -> None:
    layouts = {"pp2": {"pipeline_parallel": 2}, "tp2": {"tensor_parallel": 2}, "dp2": {}}
    jobs = [
        {
            "name": name,
            "hf_path": str(models("llama")),
            "config": {"precision": "bf16", "micro_batch_tokens": 96, "logprob_chunk": 16, **layout},
            "optimizer": {"lr": 1e-4},
            "trees": {"count": 5, "seed": 3},
            "actions": [["update", None]],
        }
        for name, layout in layouts.items()
    ]
    one = run_jobs([{**jobs[-1], "name": "one"}])["one"][0]["moved"]
    found = launch(2, jobs, tmp_path)
    assert 0.01 < one < 0.9 and all(found[name][0]["moved"] == pytest.approx(one, abs=0.01) for name in layouts)
