"""Adaptive annealing: progress by hand, never backwards, and what follows from it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pact_nemo.objective.adaptive import AdaptiveClock, between
from pact_nemo.objective.components import CALL, REASONING
from pact_nemo.objective.schedules import StepClock, TraceSchedule


def test_progress_by_hand() -> None:
    progress = AdaptiveClock(success_target=0.5, smoothing=0.5)
    progress.observe(0.1, None)
    assert progress.value == pytest.approx(0.2)  # 0.1 / 0.5, no gap seen yet
    progress.observe(0.3, -0.4)  # success 0.2; the first gap
    assert progress.value == pytest.approx((0.2 / 0.5 + 0.0) / 2)
    progress.observe(0.4, -0.2)  # success 0.3, gap 0.3 of 0.4
    assert progress.value == pytest.approx((0.3 / 0.5 + 0.25) / 2)
    before = progress.value
    progress.observe(0.0, -0.9)  # a bad step: nothing comes back
    assert progress.value == before
    progress.observe(None, None)
    assert progress.value == before
    for _ in range(50):
        progress.observe(1.0, 0.0)
    assert progress.value == pytest.approx(1.0, abs=1e-6) and progress.value <= 1.0


def test_the_schedule_follows_progress_and_not_the_step() -> None:
    base, clock = TraceSchedule(clock=StepClock(10)), AdaptiveClock()
    schedule = TraceSchedule(clock=clock)
    component, level, turn = np.array([REASONING, REASONING, CALL]), np.array([0, 4, -1]), np.zeros(3, dtype=int)
    for step in (0, 9):
        assert schedule.level(step) == 4 and schedule.call_weight(step) == pytest.approx(0.8)
        assert schedule.weights(component, level, turn, step).tolist() == pytest.approx([1, 1, 0.8])
    clock.value = 1.0
    assert schedule.level(0) == 0 and schedule.call_weight(0) == pytest.approx(0.2)
    assert schedule.weights(component, level, turn, 0).tolist() == pytest.approx([1, 0, 0.2])
    clock.value = 0.5
    assert schedule.weights(component, level, turn, 3).tolist() == base.weights(component, level, turn, 5).tolist()


def test_it_resumes_where_it_was_and_with_the_settings_of_now() -> None:
    clock, again = AdaptiveClock(), AdaptiveClock()
    clock.observe(0.2, 0.3)
    again.load(json.loads(json.dumps(clock.state())))
    for one in (clock, again):
        one.observe(0.5, 0.1)
    assert clock == again
    stricter = AdaptiveClock(success_target=1.0)
    stricter.load(clock.state())
    assert stricter.success_target == 1.0 and stricter.progress(0) == clock.value
    with pytest.raises(ValueError, match="'fixed'"):
        again.load(StepClock(3).state())


@pytest.mark.parametrize(
    "wrong", [{"success_target": 0.0}, {"success_target": 1.5}, {"smoothing": 1.0}, {"smoothing": -0.1}]
)
def test_settings_outside_their_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="success_target"):
        AdaptiveClock(**wrong)


def test_anchoring_moves_only_if_told_where_to() -> None:
    assert between(0.4, None, 0.7) == 0.4
    assert between(0.4, 0.8, 0.5) == pytest.approx(0.6)
