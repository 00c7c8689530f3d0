"""Traces from a teacher model behind an OpenAI-compatible endpoint: it solves the task with the same tools; the checker
verifies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pact_nemo.environments.base import Environment, Task
from pact_nemo.errors import EnvironmentFailure, ServerError
from pact_nemo.rollouts.chat_episode import message_parts, play_by_chat
from pact_nemo.rollouts.types import Turn
from pact_nemo.serving.chat_endpoint import Complete
from pact_nemo.serving.config import EpisodeLimits
from pact_nemo.traces.builder import TraceBuilder
from pact_nemo.traces.schema import ReasoningSegment, Trace
from pact_nemo.traces.segments import split_reasoning

Segment = Callable[[str, Sequence[str]], list[tuple[str, str]]]
_ENDLESS = 10**9  # tokens are the endpoint's business


class _GivenUp(Exception):
    """The attempt can't become a trace any more."""


class _Away(Exception):
    """The endpoint failed; no fault of the attempt's."""


class _Recorder:
    """Builds the trace while the episode is played."""

    def __init__(self, task: Task, segment: Segment):
        self.builder = TraceBuilder()
        self._segment = segment
        self._tools = [tool["name"] for tool in task.tools]
        self._closing = ""  # the latest message without calls

    def assistant(self, answer: Mapping[str, Any], turn: Turn) -> None:
        if turn.call_errors:
            raise _GivenUp
        if turn.calls:
            thought, said = message_parts(answer)
            reasoning = thought or said
            pieces = [ReasoningSegment(*piece) for piece in self._segment(reasoning, self._tools)]
            self.builder.assistant(pieces, turn.calls, turn.observations, turn.user_turn)
        self._closing = "" if turn.calls else turn.visible

    def user(self, messages: Sequence[dict[str, str]], revealed: Sequence[dict[str, Any]], user_turn: int) -> None:
        if not self.builder.acted_in(user_turn - 1):
            self.builder.assistant([ReasoningSegment("other", "No call is needed here.")], [], [], user_turn - 1)
        self.builder.user(messages, revealed, self._closing)
        self._tools += [tool["name"] for tool in revealed]


def teacher_trace(
    environment: Environment, task: Task, complete: Complete, max_turns: int, segment: Segment = split_reasoning
) -> Trace | None:
    """One teacher rollout as a trace, its messages without calls (answers) left out; ``verified`` is the checker's
    verdict.

    The result still has to pass :func:`pact_nemo.traces.filters.reject_reason`.

    Args:
        environment: where the calls run.
        task: what to solve. The teacher sees its user turns and tools, never its reference calls.
        complete: (messages, tools) → assistant message; see :func:`pact_nemo.serving.chat_endpoint.chat_endpoint`.
        max_turns: assistant turns per user turn.
        segment: (reasoning, tool names) → typed pieces whose texts concatenate to the reasoning.

    Returns:
        None if the teacher wrote a malformed call, made no call, or reached ``max_turns``.

    Raises:
        ServerError: from ``complete``.
        EnvironmentFailure: the environment broke.
    """
    recorder = _Recorder(task, segment)

    def asked(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        try:
            return complete(messages, tools)
        except ServerError as error:
            raise _Away from error

    try:
        rollout = play_by_chat(
            environment, task, 0, asked, EpisodeLimits(max_turns, _ENDLESS, _ENDLESS, _ENDLESS, _ENDLESS), recorder
        )
    except _GivenUp:
        return None
    except _Away as away:
        assert isinstance(away.__cause__, ServerError)
        raise away.__cause__ from away.__cause__.__cause__
    if rollout.status == "failed":
        raise EnvironmentFailure(rollout.error or task.id)
    if rollout.status == "truncated" or rollout.outcome is None:
        return None
    return recorder.builder.build(task.id, "teacher", rollout.outcome.success)
