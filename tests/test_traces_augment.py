"""Variants of traces are verified by execution, the policy's own solutions become traces, and beaten traces lose
weight.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pact_nemo.environments.base import Outcome, Task, ToolCall
from pact_nemo.environments.bfcl.environment import BFCLEnvironment
from pact_nemo.objective.trace_quality import TraceQuality, beats
from pact_nemo.rollouts.types import Rollout, Turn
from pact_nemo.traces.augment import new_solutions, promoted, replay, variants
from pact_nemo.traces.schema import ReasoningSegment, Trace, TraceTurn, read_traces, write_traces
from tests.workers.bfcl_tasks import bfcl_environment, make_trace

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def bfcl() -> tuple[BFCLEnvironment, list[tuple[Task, Trace]]]:
    environment = bfcl_environment(categories=["multi_turn_base"], window="turn", max_tools=6, max_calls=3)
    pairs = []
    for task in environment.tasks():
        if sum(len(calls) for calls in task.reference_calls) < 2:
            continue
        trace = make_trace(environment, task, style="compact", calls_per_turn="all")
        if trace is not None:
            pairs.append((task, trace))
        if len(pairs) == 40:
            break
    return environment, pairs


def executed_alone(environment: BFCLEnvironment, task: Task, trace: Trace) -> tuple[list[str], bool]:
    session = environment.start(task)
    observations = [text for turn in trace.turns for text in session.execute(list(turn.calls))]
    session.next_user_turn()
    success = session.outcome().success
    session.close()
    return observations, success


def test_variants_say_what_execution_gives(bfcl: tuple[BFCLEnvironment, list[tuple[Task, Trace]]]) -> None:
    environment, pairs = bfcl
    swapped = kept_order = reordered = 0
    for task, trace in pairs:
        made = variants(environment, task, trace, ["argument_order", "call_order"], 4, seed=3)
        assert made == variants(environment, task, trace, ["argument_order", "call_order"], 4, seed=3)
        assert len({repr(variant) for variant in [trace, *made]}) == len(made) + 1
        for variant in made:
            observations, success = executed_alone(environment, task, variant)
            assert success and observations == [text for turn in variant.turns for text in turn.observations]
            before = sorted(
                repr(sorted(call.arguments.items())) + call.name for turn in trace.turns for call in turn.calls
            )
            after = sorted(
                repr(sorted(call.arguments.items())) + call.name for turn in variant.turns for call in turn.calls
            )
            assert before == after and variant.verified
        swapped += any(variant.source.endswith("call_order") for variant in made)
        reordered += any(variant.source.endswith("argument_order") for variant in made)
        kept_order += not any(variant.source.endswith("call_order") for variant in made)
    assert swapped and kept_order and reordered  # some calls can change places, and some can't


def test_a_reordering_that_changes_what_happens_is_no_variant() -> None:
    environment = bfcl_environment(categories=["multi_turn_base"], window="turn")
    for task in environment.tasks():
        trace = make_trace(environment, task, style="compact", calls_per_turn="all")
        if trace is not None and [call.name for call in trace.turns[0].calls][:2] == ["cd", "mv"]:
            break
    else:
        pytest.skip("no such task")
    backwards = replace(
        trace.turns[0], calls=trace.turns[0].calls[::-1], observations=trace.turns[0].observations[::-1]
    )
    result = replay(environment, task, replace(trace, turns=(backwards, *trace.turns[1:])))
    assert result is None or not result.outcome.success or result.observations[0] != backwards.observations
    assert all(
        variant.turns[0].calls[0].name == "cd"
        for variant in variants(environment, task, trace, ["call_order"], 9, seed=0)
    )


def test_reasoning_that_speaks_of_an_order_keeps_it() -> None:
    calls = (ToolCall("a"), ToolCall("b"))
    turn = TraceTurn((ReasoningSegment("other", "First a, then b."),), calls, ("1", "2"))
    task = Task("t", "t", "c", (({"role": "user", "content": "q"},),), (), ((),))
    assert variants(None, task, Trace("t", "x", (turn,), True), ["call_order"], 3, 0) == []  # type: ignore[arg-type]  # nothing is executed


def rollout(turns: list[Turn], success: bool = True, status: str = "ok") -> Rollout:
    return Rollout("t", 0, [1], [1], [1], [0.0], turns, Outcome(success, float(success)), 0, status)  # type: ignore[arg-type]


def test_passed_rollouts_become_traces_without_their_answer() -> None:
    task = Task("t", "t", "c", (({"role": "user", "content": "q"},),), ({"name": "f"},), ((),))
    call = Turn(0, 1, "I use f. CALL", calls=[ToolCall("f", {"a": 1})], observations=["3"])
    answer = Turn(1, 2, "It is 3.")

    def reasoning(text: str) -> str:
        return text.partition("CALL")[0].strip()

    trace = promoted(task, rollout([call, answer]), reasoning)
    assert trace is not None and (trace.source, trace.verified, len(trace.turns)) == ("policy", True, 1)
    assert trace.turns[0].reasoning == "I use f." and trace.turns[0].observations == ("3",)
    assert "It is 3" not in json.dumps(trace.to_dict())
    assert promoted(task, rollout([call, answer], success=False), reasoning) is None
    assert promoted(task, rollout([call, answer], status="truncated"), reasoning) is None
    assert promoted(task, rollout([answer]), reasoning) is None
    assert promoted(task, rollout([Turn(0, 1, "x", call_errors=["?"]), call]), reasoning) is None
    assert promoted(task, rollout([call, replace(answer, user_turn=1)]), reasoning) is None
    other = promoted(task, rollout([replace(call, calls=[ToolCall("f", {"a": 2})])]), reasoning)
    assert other is not None
    assert new_solutions([trace], [trace, other, other]) == [other]


def test_one_file_may_hold_several_traces_of_a_task(tmp_path: Path) -> None:
    first = Trace("t", "x", (TraceTurn((), (ToolCall("f", {"a": 1, "b": 2}),), ("3",)),), True)
    second = Trace("t", "y", (TraceTurn((), (ToolCall("f", {"b": 2, "a": 1}),), ("3",)),), True)
    write_traces(tmp_path / "t.jsonl", [first, second])
    assert [list(trace.turns[0].calls[0].arguments) for trace in read_traces(tmp_path / "t.jsonl")] == [
        ["a", "b"],
        ["b", "a"],
    ]


@pytest.mark.parametrize(
    ("rollout", "trace", "wins"),
    [((1.0, 1), (1.0, 2), True), ((1.0, 2), (1.0, 2), False), ((0.5, 0), (1.0, 2), False), ((1.0, 9), (0.5, 2), True)],
)
def test_what_beats_a_trace(rollout: tuple[float, int], trace: tuple[float, int], wins: bool) -> None:
    assert beats(*rollout, *trace) is wins


def test_a_trace_that_is_beaten_time_and_again_loses_its_weight() -> None:
    quality = TraceQuality(smoothing=0.5)
    assert quality.weight("a") == 1.0
    quality.observe("a", [True, False])
    assert quality.weight("a") == pytest.approx(0.75)
    quality.observe("a", [])
    assert quality.weight("a") == pytest.approx(0.75)
    for _ in range(30):
        quality.observe("a", [True])
    assert quality.weight("a") == pytest.approx(0.0, abs=1e-6) and quality.weight("b") == 1.0
    quality.observe("a", [False])
    assert quality.weight("a") == pytest.approx(0.5)
    with pytest.raises(ValueError, match="smoothing"):
        TraceQuality(1.0)


def test_the_weight_scales_the_sft_term_and_nothing_else() -> None:
    from pact_nemo.config.schema import ObjectiveConfig
    from pact_nemo.objective.schedules import StepClock, TraceSchedule
    from tests.test_training_batch import built, make_groups

    objective = ObjectiveConfig(anchor_prob=0.0, group_size=3)
    schedule = TraceSchedule(clock=StepClock(10))
    plain = built(make_groups(objective), objective, schedule, 2)
    groups = make_groups(objective)
    for group in groups:
        group.trace_weight = 0.25
    light = built(groups, objective, schedule, 2)
    changed = 0
    for one, other in zip(plain, light, strict=True):
        for name, stream in one.tree.streams.items():
            factor = 0.25 if name.startswith("w_sft") else 1.0
            changed += name.startswith("w_sft") and bool(stream.any())
            assert np.allclose(other.tree.streams[name], factor * np.asarray(stream), atol=1e-8), name
    assert changed


def test_the_tool_extends_a_trace_file(tmp_path: Path) -> None:
    words = [
        "environment_config.window=turn",
        "environment_config.max_calls=2",
        "environment_config.max_tools=4",
        "traces.calls_per_turn=all",
        "traces.style=compact",
    ]
    tool = [sys.executable, str(REPO / "tools" / "make_traces.py")]
    base = [*tool, "--out", str(tmp_path / "a.jsonl"), "--recorded", "--limit", "20", *words]
    assert subprocess.run(base, capture_output=True, text=True, timeout=300).returncode == 0
    more = [
        "--out",
        str(tmp_path / "b.jsonl"),
        "--extend",
        str(tmp_path / "a.jsonl"),
        "--augment",
        "argument_order",
        "--augment",
        "call_order",
    ]
    done = subprocess.run([*tool, *more, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    one, other = read_traces(tmp_path / "a.jsonl"), read_traces(tmp_path / "b.jsonl")
    assert found["traces"] == len(other) > len(one) == found["read"] and {trace.task_id for trace in other} == {
        trace.task_id for trace in one
    }
    assert found["argument_order"] + found.get("call_order", 0) == len(other) - len(one)
