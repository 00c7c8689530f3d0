"""Which traces a warm-up learns from, in which order: by ``warmup.seed`` where it is given, else by ``run.seed``."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from pact_nemo.config.load import load_config
from pact_nemo.objective.gate import uniform
from pact_nemo.training import warmup

TASKS = [SimpleNamespace(id=f"t{index}") for index in range(40)]


class Known(Exception):
    """The first batch is known: the rest of the stage is not what is looked at."""


def first_batch(*words: str) -> list[tuple[str, float]]:
    """Task, and the place in [0, 1) that chooses among its traces."""
    seen: list[tuple[str, float]] = []

    def trace_for(task_id: str, seed: str, step: int) -> None:
        seen.append((task_id, uniform("trace", seed, step, task_id)))
        if len(seen) == 8:
            raise Known

    run: Any = SimpleNamespace(
        config=load_config(None, ["trainer.steps=10", "warmup.steps=2", *words]),
        progress=SimpleNamespace(phase=lambda *_, **__: nullcontext()),
        state=SimpleNamespace(warmup_step=0),
        sharing=SimpleNamespace(taken=dict, trainer=lambda **_: None),
        checkpoints=SimpleNamespace(leave_if_asked=lambda: None),
        recorder=SimpleNamespace(spend=lambda record: 0.0),
        dataset=SimpleNamespace(warmup_tasks=lambda count: TASKS, trace_for=trace_for),
    )
    with pytest.raises(Known):
        warmup.warm_up(run, lambda *_: None)
    return seen


def test_a_warm_up_follows_the_seed_of_the_run() -> None:
    assert first_batch("run.seed=1") == first_batch("run.seed=1")
    assert first_batch("run.seed=1") != first_batch("run.seed=2")


def test_runs_of_other_seeds_share_a_warm_up_with_a_seed_of_its_own() -> None:
    assert first_batch("run.seed=2", "warmup.seed=1") == first_batch("run.seed=3", "warmup.seed=1")
    assert first_batch("run.seed=2", "warmup.seed=1") == first_batch("run.seed=1")
    assert first_batch("run.seed=1", "warmup.seed=0") == first_batch("run.seed=0"), "0 is a seed, not the default"
