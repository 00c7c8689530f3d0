"""Traces from ground truth: reference calls executed in the environment, so that observations are real, and verified by
the checker.

Written for BFCL; works with any environment whose tasks carry reference calls.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal

from pact_nemo.environments.base import Environment, Task
from pact_nemo.traces.annotate import Context, Style, annotate_abstention, annotate_closing, annotate_turn
from pact_nemo.traces.builder import TraceBuilder
from pact_nemo.traces.filters import reject_reason
from pact_nemo.traces.schema import Trace

log = logging.getLogger(__name__)


def ground_truth_trace(
    environment: Environment, task: Task, style: Style, calls_per_turn: Literal["one", "all"]
) -> Trace | None:
    """Execute a task's reference calls and write down the trace; ``verified`` is the checker's verdict.

    Args:
        environment: where to execute.
        task: a task with reference calls.
        style: of the annotator.
        calls_per_turn: ``one`` call per assistant turn, each followed by its observation, or ``all`` calls of a user
            turn at once.

    Returns:
        None if the ground truth makes no call at all.
    """
    builder = TraceBuilder()
    seen: list[str] = []
    tools = list(task.tools)
    everything = {tool["name"]: tool for tool in _all_tools(task)}
    session = environment.start(task)
    try:
        messages = list(task.user_turns[0])
        words = earlier_words = ""
        for user_turn, calls in enumerate(task.reference_calls):
            earlier_words = f"{earlier_words}\n{words}"
            words = "\n".join(message["content"] for message in messages if message["role"] == "user")
            steps = [[call] for call in calls] if calls_per_turn == "one" else ([list(calls)] if calls else [])
            for index, step in enumerate(steps):
                offered = tools + [
                    everything[call.name] for call in step if call.name not in {tool["name"] for tool in tools}
                ]
                later = frozenset(call.name for rest in steps[index + 1 :] for call in rest)
                segments = annotate_turn(step, Context(offered, words, earlier_words, seen, index == 0, later), style)
                observations = session.execute(list(step))
                seen.extend(observations)
                builder.assistant(segments, step, observations, user_turn)
            upcoming = session.next_user_turn()
            if upcoming is None:
                break
            messages, revealed = upcoming
            tools += revealed
            if not steps:  # an assistant message is due before the user speaks again
                builder.assistant(annotate_abstention(style, bool(revealed)), [], [], user_turn)
            builder.user(messages, revealed, annotate_closing(style) if steps else "")
        outcome = session.outcome()
    finally:
        session.close()
    return builder.build(task.id, "ground_truth", outcome.success)


def _all_tools(task: Task) -> list[dict[str, Any]]:
    entry = task.data.get("entry")
    hidden = [tool for tools in entry.revealed.values() for tool in tools] if entry is not None else []
    return [*task.tools, *hidden]


def make_trace(
    environment: Environment, task: Task, *, style: Style = "compact", calls_per_turn: Literal["one", "all"] = "one"
) -> Trace | None:
    """A verified trace that passes the filters, or None. See :func:`make_traces` for many, with the reasons of those
    left out.
    """
    trace, _ = _filtered(environment, task, style, calls_per_turn)
    return trace


def _filtered(
    environment: Environment, task: Task, style: Style, calls_per_turn: Literal["one", "all"]
) -> tuple[Trace, None] | tuple[None, str]:
    trace = ground_truth_trace(environment, task, style, calls_per_turn)
    if trace is None:
        return None, "no_calls"
    reason = reject_reason(trace, task.tools)
    return (trace, None) if reason is None else (None, reason)


def make_traces(
    environment: Environment,
    tasks: Iterable[Task],
    *,
    style: Style = "compact",
    calls_per_turn: Literal["one", "all"] = "one",
) -> tuple[list[Trace], Counter[str]]:
    """Verified, filtered traces of ``tasks`` in order, and how many tasks got none, by reason.

    The count's denominator is the number of tasks; reasons are those of :func:`~pact_nemo.traces.filters.reject_reason`
    and ``no_calls``.
    """
    traces: list[Trace] = []
    rejected: Counter[str] = Counter()
    for task in tasks:
        trace, reason = _filtered(environment, task, style, calls_per_turn)
        if trace is None:
            rejected[str(reason)] += 1
        else:
            traces.append(trace)
    if rejected:
        log.info("tasks without a usable trace: %s", dict(rejected))
    return traces, rejected
