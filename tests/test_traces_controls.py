"""``traces.control=other_task``: which trace stands in for the task's own."""

from __future__ import annotations

import pytest

from pact_nemo.environments.base import ToolCall
from pact_nemo.errors import ConfigError
from pact_nemo.objective.components import CALL, OBSERVATION, REASONING
from pact_nemo.objective.gate import uniform
from pact_nemo.traces.controls import other_trace
from pact_nemo.traces.spans import TraceTokens


def trace(reasoning: int, *calls: int) -> TraceTokens:
    tokens = [reasoning, *calls, 9]
    kinds = [REASONING, *[CALL] * len(calls), OBSERVATION]
    return TraceTokens(tokens, kinds, [-1] * len(tokens), [0] * len(tokens), [len(tokens)])


OWN = {"own": trace(1, 5, 6)}
OTHERS = {f"t{i}": trace(2, 10 + i) for i in range(9)}
SAME = {"t3": trace(7, 5, 6)}  # in other words


def drawn(traces: dict[str, TraceTokens], step: int) -> str:
    calls = {
        name: [
            ToolCall("f", {"a": token})
            for token, kind in zip(one.token_ids, one.component, strict=True)
            if kind == CALL
        ]
        for name, one in traces.items()
    }
    found = other_trace(traces, {name: name for name in traces}, "own", 50, calls=calls, seed=3, step=step)
    return next(name for name, other in traces.items() if other is found)


def test_a_trace_with_the_same_calls_is_drawn_again_and_every_other_draw_stays() -> None:
    traces = OWN | OTHERS | SAME
    before = [sorted(OTHERS)[int(uniform("control", 3, step, "own") * 9)] for step in range(400)]
    after = [drawn(traces, step) for step in range(400)]
    assert "t3" in before and "t3" not in after
    assert [a for a, b in zip(after, before, strict=True) if b != "t3"] == [b for b in before if b != "t3"]
    again = {a for a, b in zip(after, before, strict=True) if b == "t3"}
    assert len(again) > 4, "the second draw is among all the others"
    assert after == [drawn(traces, step) for step in range(400)]


def test_where_all_others_say_the_same_it_is_refused_as_where_there_is_none() -> None:
    for others in ({}, {"a": trace(7, 5, 6), "b": trace(1, 5, 6)}):
        with pytest.raises(ConfigError, match="no whole trace of another scenario group"):
            drawn(OWN | others, 0)
    assert drawn(OWN | {"a": trace(7, 5, 6), "b": trace(1, 5), "c": trace(7, 5, 6)}, 0) == "b"


def test_traces_without_calls_differ_by_their_text() -> None:
    bare = {"own": trace(1), "a": trace(1), "b": trace(2)}
    assert {drawn(bare, step) for step in range(20)} == {"b"}
