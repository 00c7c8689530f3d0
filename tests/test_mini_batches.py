"""A step's groups cut into updates: what has nothing to compute is left out, and every denominator counts it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pact_nemo.batches.mini_batches import MiniBatch, mini_batches
from pact_nemo.batches.prompt_groups import PromptGroup
from pact_nemo.batches.streams import Scores, with_streams
from pact_nemo.config.schema import ObjectiveConfig
from pact_nemo.environments.base import Outcome, Task
from pact_nemo.methods.registry import method_named
from pact_nemo.monitoring.diagnostics import not_conditioned
from pact_nemo.objective.components import CALL, OBSERVATION
from pact_nemo.objective.schedules import StepClock, TraceSchedule
from pact_nemo.rollouts.types import Rollout, Turn
from pact_nemo.traces.spans import TraceTokens

SCHEDULE = TraceSchedule(clock=StepClock(10))
OBJECTIVE = ObjectiveConfig(group_size=2, kl_coef=0.0)


def rollout(name: str, sample: int, length: int, status: Any = "ok") -> Rollout:
    turns, ids = [Turn(0, length, "x")], list(range(3, 3 + length))
    outcome = None if status == "failed" else Outcome(True, 1.0)
    return Rollout(name, sample, [1, 2], ids, [1] * length, [-0.5] * length, turns, outcome, 0, status=status)


def group(name: str, length: int, advantage: float, component: int = OBSERVATION, *, failed: int = 0) -> PromptGroup:
    """Two rollouts of so many tokens, behind so many that failed. A trace of observations alone teaches nothing."""
    rollouts = [rollout(name, k, length, "failed" if k < failed else "ok") for k in range(2 + failed)]
    advantages = [np.array([0.0])] * failed + [np.array([advantage]), np.array([-advantage])]
    trace = TraceTokens([9] * 3, [component] * 3, segment_level=[4] * 3, turn=[0] * 3)
    task = Task(name, name, "c", (({"role": "user", "content": "u"},),), (), ((),))
    return PromptGroup(task, rollouts, [np.zeros(1)] * len(rollouts), advantages, False, trace)


def cut(groups: list[PromptGroup], *, both: bool, skip: bool, size: int = 4, **objective: Any) -> list[MiniBatch]:
    method = method_named("pact", replace(OBJECTIVE, **objective))
    return mini_batches(groups, [7], method, size=size, diagnostics=both, skip_zero_advantage=skip, temperature=1.0)


@pytest.mark.parametrize("aggregation", ["token-mean", "rollout-mean", "constant-length"])
@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("skip", [True, False])
def test_denominators_count_what_is_not_computed(aggregation: str, both: bool, skip: bool) -> None:
    """The weight of a token is that of equation 14, whatever is skipped because it is exactly 0."""
    groups = [group("a", 4, 1.0), group("b", 12, 0.0), group("c", 5, 0.0, CALL), group("d", 3, 0.0, failed=1)]
    objective = {"aggregation": aggregation, "constant_length": 20, "sft_aggregation": "token-mean"}
    (part,) = cut(groups, both=both, skip=skip, **objective)
    left_out = ["b", "d"] if skip and not both else []
    assert [other.task.id for other in part.others] == left_out
    method = method_named("pact", replace(OBJECTIVE, **objective))
    filled = with_streams(part.members, method, SCHEDULE, 0, Scores(), others=part.others)
    first = filled[0]
    found = {float(w) for w in first.tree.streams["w_rl_h"][slice(*first.spans[("h", 0)])]}
    live = 2 * (4 + 12 + 5 + 3)
    wanted = {"token-mean": 1 / live, "rollout-mean": 1 / (4 * 2 * 4), "constant-length": 1 / (4 * 2 * 20)}
    assert list(found) == [pytest.approx(wanted[aggregation], rel=1e-6)]
    taught = next(prompt for prompt in filled if prompt.group.task.id == "c")
    assert float(taught.tree.streams["w_sft_call"].sum()) == pytest.approx(OBJECTIVE.sft_coef, rel=1e-6)


def test_updates_without_a_token_are_left_out_and_the_others_numbered() -> None:
    groups = [group("a", 4, 0.0), group("b", 4, 1.0), group("c", 4, 0.0)]
    parts = cut(groups, both=False, skip=True, size=1)
    assert [(part.number, [p.group.task.id for p in part.members]) for part in parts] == [(0, ["b"])]


@pytest.mark.parametrize("both", [True, False])
def test_rollouts_that_are_not_conditioned_are_counted_whatever_else_is_computed(both: bool) -> None:
    anchored = replace(group("e", 4, 0.0), anchored=True)
    groups = [group("a", 4, 1.0), group("b", 12, 0.0), group("c", 5, 0.0, CALL), group("d", 3, 1.0, failed=1), anchored]
    for skip, wanted in ((True, 4), (False, 0)):
        parts = cut(groups, both=both, skip=skip, size=1)
        assert not_conditioned(groups, [p for part in parts for p in part.members]) == wanted
