"""Every row of the paper's tables 4 and 6 is a setting; boundaries as literals."""

from __future__ import annotations

import numpy as np
import pytest

from pact_nemo.objective.schedules import CALL, OBSERVATION, OTHER, REASONING, TraceSchedule

COMPONENT = np.array([REASONING, REASONING, REASONING, REASONING, CALL, CALL, OTHER, OBSERVATION, REASONING, CALL, CALL])
LEVEL = np.array([0, 1, 4, -1, -1, -1, -1, -1, 2, -1, -1])
TURN = np.array([0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1])


def weights(step: int, **kwargs: object) -> list[float]:
    return TraceSchedule(horizon=10, **kwargs).weights(COMPONENT, LEVEL, TURN, step).round(6).tolist()  # type: ignore[arg-type]


def test_levels_fall_in_five_equal_stretches() -> None:
    assert [TraceSchedule(horizon=10).level(s) for s in range(13)] == [4, 4, 3, 3, 2, 2, 1, 1, 0, 0, 0, 0, 0]
    assert [TraceSchedule(horizon=24).level(s) for s in (0, 4, 5, 9, 10, 14, 15, 19, 20, 23)] == [4, 4, 3, 3, 2, 2, 1, 1, 0, 0]
    assert [TraceSchedule(horizon=3).level(s) for s in range(4)] == [4, 3, 1, 0]


def test_call_weight_is_equation_11() -> None:
    schedule = TraceSchedule(horizon=10)
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


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="sentence"):
        TraceSchedule(reasoning="sentence")
    with pytest.raises(ValueError, match="segment"):
        TraceSchedule(call="segment")
    with pytest.raises(ValueError, match="horizon"):
        TraceSchedule(horizon=0)
