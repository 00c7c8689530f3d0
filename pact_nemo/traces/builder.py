"""Putting a trace together turn by turn, whoever solves the task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pact_nemo.environments.base import ToolCall
from pact_nemo.traces.schema import ReasoningSegment, Trace, TraceTurn


class TraceBuilder:
    """Collects assistant turns and what the user says between them."""

    def __init__(self) -> None:
        self._turns: list[TraceTurn] = []

    def acted_in(self, user_turn: int) -> bool:
        """Whether user turn ``user_turn`` has an assistant turn yet."""
        return bool(self._turns) and self._turns[-1].user_turn == user_turn

    def assistant(
        self,
        segments: Sequence[ReasoningSegment],
        calls: Sequence[ToolCall],
        observations: Sequence[str],
        user_turn: int,
    ) -> None:
        """Add one assistant turn."""
        self._turns.append(TraceTurn(tuple(segments), tuple(calls), tuple(observations), user_turn))

    def user(self, messages: Sequence[dict[str, str]], new_tools: Sequence[dict[str, Any]], closing: str = "") -> None:
        """The user speaks again after the last assistant turn, which ``closing`` has closed."""
        last = self._turns[-1]
        self._turns[-1] = replace(
            last,
            user_messages_after=(*last.user_messages_after, *messages),
            new_tools_after=(*last.new_tools_after, *new_tools),
            closing=closing,
        )

    def build(self, task_id: str, source: str, verified: bool) -> Trace | None:
        """The trace up to its last call (what follows could only be an answer), or None if there is no call."""
        turns = list(self._turns)
        while turns and not turns[-1].calls:
            turns.pop()
        if not turns:
            return None
        turns[-1] = replace(turns[-1], user_messages_after=(), new_tools_after=(), closing="")
        return Trace(task_id=task_id, source=source, turns=tuple(turns), verified=verified)
