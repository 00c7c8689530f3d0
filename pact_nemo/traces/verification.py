"""Which imported conversations are expert traces: those that solve their task, told or tried."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pact_nemo.environments.base import Environment, Task
from pact_nemo.traces.augment import replay
from pact_nemo.traces.conversations import Conversation
from pact_nemo.traces.schema import Trace

Verify = Literal["replay", "reward", "none"]
VERIFY: tuple[Verify, ...] = ("replay", "reward", "none")


def new_error(told: str, seen: str) -> bool:
    """Whether an observation is an error now that the trace says it isn't."""
    return seen.startswith("Error") and not told.startswith("Error")


def new_errors(told: Sequence[Sequence[str]], seen: Sequence[Sequence[str]]) -> bool:
    """Whether an observation is an error now that the trace says it isn't. (Texts may differ: they may have been cut to
    another length.)
    """
    pairs = zip((text for turn in told for text in turn), (text for turn in seen for text in turn), strict=True)
    return any(new_error(then, now) for then, now in pairs)


def why_unverified(
    environment: Environment, task: Task, found: tuple[Conversation, Trace], verify: str, min_score: float
) -> str | None:
    """Why a conversation is no expert trace of its task; None where it is.

    Args:
        found: the conversation, and the trace that was made of it.
        verify, min_score: ``traces.verify`` and ``traces.min_score``.

    Returns:
        ``no_reward``, ``low_reward``, ``replay_refused``, ``replay_error`` or ``replay_low_score``.
    """
    conversation, trace = found
    if verify == "none":
        return None
    if verify == "reward":
        if conversation.reward is None:
            return "no_reward"
        return "low_reward" if conversation.reward < min_score else None
    result = replay(environment, task, trace, conversation.answers)
    if result is None:
        return "replay_refused"
    if new_errors([turn.observations for turn in trace.turns], result.observations):
        return "replay_error"
    return "replay_low_score" if result.outcome.score < min_score else None
