"""The share of bfloat16 weights that an update changes, against every weight before and after it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pact_nemo.policy.config import LoraConfig
from tests.workers.policy_kit import launch, loss_fn, make_trees
from tests.workers.policy_worker import run_jobs
from tests.workers.small_policy import build


@pytest.mark.parametrize("lr", [1e-3, 1e-5])
@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize("rank", [0, 8])
def test_it_is_that_of_all_that_is_trained(
    lr: float, distributed: bool, rank: int, models: Callable[[str], Path]
) -> None:
    config = {"precision": "bf16", "distributed_optimizer": distributed, "lora": LoraConfig(rank=rank)}
    policy, trees = build(models("qwen3"), optimizer={"lr": lr}, **config), make_trees(5, seed=3)

    def weights() -> torch.Tensor:
        trained = (p for chunk in policy.chunks for p in chunk.parameters() if p.requires_grad)
        return torch.cat([p.detach().clone().flatten() for p in trained])

    if rank:  # B is 0 at first, and any step moves all of it
        policy.update(trees, loss_fn, lr=1e-2)
    before = weights()
    moved = policy.update(trees, loss_fn).moved
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
