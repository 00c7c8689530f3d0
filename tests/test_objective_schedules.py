"""Every row of the paper's tables 4 and 6 is a setting; boundaries as literals."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pact_nemo.objective.components import CALL, OBSERVATION, OTHER, REASONING
from pact_nemo.objective.schedules import CALL_SCHEDULES, REASONING_SCHEDULES, AnnealState, StepClock, TraceSchedule

COMPONENT = np.array(
    [REASONING, REASONING, REASONING, REASONING, CALL, CALL, OTHER, OBSERVATION, REASONING, CALL, CALL]
)
LEVEL = np.array([0, 1, 4, -1, -1, -1, -1, -1, 2, -1, -1])
TURN = np.array([0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1])


def weights(step: int, **kwargs: object) -> list[float]:
    return TraceSchedule(clock=StepClock(10), **kwargs).weights(COMPONENT, LEVEL, TURN, step).round(6).tolist()  # type: ignore[arg-type]


def test_levels_fall_in_five_equal_stretches() -> None:
    assert [TraceSchedule(clock=StepClock(10)).level(s) for s in range(13)] == [4, 4, 3, 3, 2, 2, 1, 1, 0, 0, 0, 0, 0]
    assert [TraceSchedule(clock=StepClock(24)).level(s) for s in (0, 4, 5, 9, 10, 14, 15, 19, 20, 23)] == [
        4,
        4,
        3,
        3,
        2,
        2,
        1,
        1,
        0,
        0,
    ]
    assert [
        TraceSchedule(clock=StepClock(24), reasoning=r).level(23)
        for r in ("none", "fixed", "token", "whole_trace_token")
    ] == [-1, 4, 4, 4]
    assert [TraceSchedule(clock=StepClock(3)).level(s) for s in range(4)] == [4, 3, 1, 0]


def test_call_weight_is_equation_11() -> None:
    schedule = TraceSchedule(clock=StepClock(10))
    assert [schedule.call_weight(s) for s in (0, 5, 10, 99)] == pytest.approx([0.8, 0.5, 0.2, 0.2])


def test_papers_choice_segment_and_scale() -> None:
    assert weights(0) == [1, 1, 1, 0, 0.8, 0.8, 0, 0, 1, 0.8, 0.8]
    assert weights(4) == [1, 1, 0, 0, 0.56, 0.56, 0, 0, 1, 0.56, 0.56]
    assert weights(9) == [1, 0, 0, 0, 0.26, 0.26, 0, 0, 0, 0.26, 0.26]


def test_the_other_rows() -> None:
    assert weights(9, reasoning="none", call="none") == [0.0] * 11
    assert weights(9, reasoning="fixed", call="fixed") == [1, 1, 1, 0, 0.8, 0.8, 0, 0, 1, 0.8, 0.8]
    assert weights(9, reasoning="fixed", fixed_level=1, call="none") == [1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    # half way: ceil(3/2) = 2 of turn 0's reasoning, 1 of turn 1's; 1 of 2 call tokens in each turn
    assert weights(5, reasoning="token", call="token") == [1, 1, 0, 0, 0.8, 0, 0, 0, 1, 0.8, 0]
    assert weights(10, reasoning="token", call="token") == [0.0] * 11
    # 8 teachable tokens in the whole trace, half of them are left: three reasoning, one call
    assert weights(5, reasoning="whole_trace_token", call="fixed") == [1, 1, 1, 0, 0.8, 0, 0, 0, 0, 0, 0]
    assert weights(0, reasoning_scale=0.5)[0] == 0.5


def test_whole_trace_annealing_ignores_the_cut_of_calls_by_turn() -> None:
    # 8 teachable tokens, ceil(0.3 * 8) = 3 left: all reasoning
    assert weights(7, reasoning="whole_trace_token", call="token") == [1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]
    assert weights(2, reasoning="whole_trace_token", call="token") == [1, 1, 1, 0, 0.8, 0.8, 0, 0, 1, 0.8, 0]
    assert weights(0, reasoning="whole_trace_token", call="none") == [1, 1, 1, 0, 0, 0, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("horizon", [1, 2, 3, 4, 5, 7, 10, 24, 25, 49, 93, 100, 999, 1000])
def test_levels_change_exactly_at_fifths_of_any_horizon(horizon: int) -> None:
    schedule = TraceSchedule(clock=StepClock(horizon))
    for step in range(horizon + 3):
        done = Fraction(min(step, horizon), horizon)
        boundaries_passed = sum(done >= Fraction(k, 5) for k in (1, 2, 3, 4))
        assert schedule.level(step) == 4 - boundaries_passed, step


@given(st.integers(1, 5000), st.integers(0, 6000), st.integers(0, 20_000))
def test_kept_tokens_equal_exact_arithmetic(horizon: int, step: int, count: int) -> None:
    exact = math.ceil((1 - Fraction(min(step, horizon), horizon)) * count)
    assert TraceSchedule(clock=StepClock(horizon)).state(step).kept(count) == exact


@given(
    st.sampled_from(REASONING_SCHEDULES),
    st.sampled_from(CALL_SCHEDULES),
    st.lists(st.tuples(st.integers(0, 3), st.integers(-1, 4), st.integers(0, 3)), max_size=40),
    st.integers(0, 12),
)
def test_weights_equal_a_naive_loop(reasoning: str, call: str, tokens: list[tuple[int, int, int]], step: int) -> None:
    done = Fraction(min(step, 10), 10)
    level = 4 - min(4, math.floor(5 * done)) if reasoning == "segment" else 2 if reasoning == "fixed" else 4
    weight = {"none": 0.0, "fixed": 0.9, "token": 0.9, "scale": 0.9 - 0.6 * float(done)}[call]
    seen: dict[object, int] = {}
    size: dict[object, int] = {}
    whole = reasoning == "whole_trace_token"

    def group(kind: int, lowest: int, turn: int) -> object:
        if kind == CALL and call != "none":
            return "whole" if whole else ("call", turn) if call == "token" else None
        if kind == REASONING and lowest >= 0:
            return "whole" if whole else ("reasoning", turn) if reasoning == "token" else None
        return None

    for token in tokens:
        size[group(*token)] = size.get(group(*token), 0) + 1
    expected = []
    for kind, lowest, turn in tokens:
        key = group(kind, lowest, turn)
        rank = seen.get(key, 0)
        seen[key] = rank + 1
        cut = key is not None and rank >= math.ceil((1 - done) * size[key])
        if kind == CALL and not cut:
            expected.append(weight)
        elif kind == REASONING and reasoning != "none" and 0 <= lowest <= level and not cut:
            expected.append(0.7)
        else:
            expected.append(0.0)
    schedule = TraceSchedule(reasoning, call, 0.7, 2, 0.9, 0.3, clock=StepClock(10))
    kinds, lowest_levels, turns = [np.array([token[i] for token in tokens], dtype=int) for i in range(3)]
    assert schedule.weights(kinds, lowest_levels, turns, step).tolist() == pytest.approx(expected)


def test_annealing_state() -> None:
    assert [AnnealState(p).level for p in (0.0, 0.1999, 0.2, 0.3999, 0.4, 0.5999, 0.6, 0.7999, 0.8, 1.0)] == [
        4,
        4,
        3,
        3,
        2,
        2,
        1,
        1,
        0,
        0,
    ]
    assert [AnnealState(p).scale(0.8, 0.2) for p in (0.0, 0.25, 1.0)] == pytest.approx([0.8, 0.65, 0.2])
    assert [AnnealState(0.7).kept(n) for n in (0, 1, 10, 11)] == [0, 1, 3, 4]
    for progress in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="progress"):
            AnnealState(progress)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"reasoning": "sentence"}, "sentence"),
        ({"call": "segment"}, "segment"),
        ({"fixed_level": 5}, "fixed_level"),
        ({"call_end": -0.1}, "call_end"),
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        TraceSchedule(**{"clock": StepClock(10), **wrong})  # type: ignore[arg-type]


def test_arrays_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        TraceSchedule(clock=StepClock(10)).weights(COMPONENT, LEVEL[:-1], TURN, 0)


def test_a_horizon_that_nobody_set_stays_that_of_the_checkpoint() -> None:
    before, longer, told = StepClock(4, given=False), StepClock(8, given=False), StepClock(8)
    for clock in (longer, told):
        clock.load(before.state())
        clock.observe(1.0, 0.0)  # only the step counts
    assert longer.progress(2) == 0.5 and longer.progress(7) == 1.0
    assert told.progress(2) == 0.25
    with pytest.raises(ValueError, match="horizon is 0"):
        StepClock(0)
    with pytest.raises(ValueError, match="'adaptive'"):
        told.load({"kind": "adaptive", "value": 0.5})
