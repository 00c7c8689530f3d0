"""Traces from ground truth: reference calls executed in the environment, so that observations are real, and verified by
the checker.

For any environment whose tasks carry reference calls.
"""

from __future__ import annotations

from typing import Literal

from pact_nemo.environments.base import Environment, Task
from pact_nemo.environments.sessions import start_scripted
from pact_nemo.errors import EnvironmentFailure
from pact_nemo.traces.annotate import Context, Style, annotate_abstention, annotate_closing, annotate_turn
from pact_nemo.traces.builder import TraceBuilder
from pact_nemo.traces.schema import Trace


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
        None if the ground truth makes no call at all, or the environment fails under it.
    """
    builder = TraceBuilder()
    seen: list[str] = []
    tools = list(task.tools)
    everything = {tool["name"]: tool for tool in (*task.tools, *task.later_tools)}
    try:
        session = start_scripted(environment, task, ())
    except EnvironmentFailure:
        return None
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
            upcoming = session.next_user_turn(task.reference_answer or "")
            if upcoming is None:
                break
            messages, revealed = upcoming
            tools += revealed
            if not steps:  # an assistant message is due before the user speaks again
                builder.assistant(annotate_abstention(style, bool(revealed)), [], [], user_turn)
            builder.user(messages, revealed, annotate_closing(style) if steps else "")
        outcome = session.outcome()
    except EnvironmentFailure:  # an expected call that fails, say: the task is left without a trace
        return None
    finally:
        session.close()
    return builder.build(task.id, "ground_truth", outcome.success)
