"""One episode of BFCL's memory and web-search categories: calls on BFCL's own backends, its agentic checker at the
end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pact_nemo.environments.base import Outcome, Task, ToolCall
from pact_nemo.environments.bfcl.agentic_data import AgenticEntry
from pact_nemo.environments.bfcl.backend import Instances
from pact_nemo.environments.bfcl.memory import Memory, Snapshots, memory_text
from pact_nemo.environments.bfcl.session import run_calls
from pact_nemo.environments.sessions import after_the_end, shown_to_policy

NO_LAST_MESSAGE = "agentic:no_last_message"


def contains_answer(text: str, answers: Sequence[str]) -> tuple[bool, str]:
    """BFCL's agentic check of a text. Returns (passed, its error type or ``ok``)."""
    from bfcl_eval.eval_checker.agentic_eval.agentic_checker import agentic_checker

    verdict = agentic_checker(text, list(answers))
    return bool(verdict["valid"]), "ok" if verdict["valid"] else str(verdict["error_type"])


class AgenticSession:
    """An episode; for one thread at a time.

    Args:
        task: what is being solved.
        backend: where its calls run; closed with the session.
        max_observation_chars: longer observations are cut for the policy. None: no limit.
    """

    def __init__(self, task: Task, backend: Instances, max_observation_chars: int | None):
        self.task = task
        self._backend, self._limit = backend, max_observation_chars
        self._offered = {tool["name"] for tool in task.tools}
        self._turn, self._finished, self._closed = 0, False, False
        self._last_message = ""

    def execute(self, calls: list[ToolCall]) -> list[str]:
        """Run the calls of one assistant turn in order; one observation string each. What is not executed and how it is
        answered is as in :class:`~pact_nemo.environments.bfcl.session.BFCLSession`.

        Raises:
            EnvironmentFailure: the session is closed or its last user turn is, or BFCL itself broke.
        """
        if self._closed or self._finished:
            raise after_the_end(self.task)
        observations, _ = run_calls(self._backend, calls, self._offered)
        return shown_to_policy(observations, self._limit)

    def next_user_turn(self, message: str = "") -> tuple[list[dict[str, str]], list[dict[str, Any]]] | None:
        """Close the current user turn; the last one's ``message`` is the answer."""
        self._turn += 1
        if self._turn < len(self.task.user_turns):
            return [dict(row) for row in self.task.user_turns[self._turn]], []
        self._finished, self._last_message = True, message
        return None

    def outcome(self) -> Outcome:
        """Official verdict on the final message; may be asked again. An episode without one fails with BFCL's
        ``agentic:no_last_message``.
        """
        if not self._finished or not self._last_message.strip():
            return Outcome(False, 0.0, NO_LAST_MESSAGE)
        passed, reason = contains_answer(self._last_message, self.task.data["entry"].answers)
        return Outcome(passed, float(passed), reason)

    def close(self) -> None:
        """Release all state; safe to call twice."""
        self._closed = True
        self._backend.close()


class MemorySession(AgenticSession):
    """A question to a memory, or a conversation.

    Args:
        task, max_observation_chars: see :class:`AgenticSession`.
        before: what the memory holds at the start; None: nothing.
    """

    def __init__(self, task: Task, before: str | None, max_observation_chars: int | None):
        entry: AgenticEntry = task.data["entry"]
        self._memory = Memory(entry, before)
        super().__init__(task, self._memory.backend, max_observation_chars)
        self._opening = self._memory.opening()

    def opening(self) -> list[dict[str, str]]:
        """See :class:`~pact_nemo.environments.base.OpensItself`."""
        return [dict(message) for message in self._opening]

    def close(self) -> None:
        super().close()
        self._memory.close()


class ConversationSession(MemorySession):
    """A conversation that questions build on: when it is over, or a limit has cut it as BFCL's own runner cuts it, what
    the memory holds is kept.
    """

    def __init__(self, task: Task, before: str | None, max_observation_chars: int | None, keep: Snapshots):
        super().__init__(task, before, max_observation_chars)
        self._keep = keep

    def outcome(self) -> Outcome:
        """Keeps the memory; there is nothing to judge."""
        self._keep.write(self.task.id, self._memory.save())
        return Outcome(True, 1.0, "conversation")


class WriteSession(MemorySession):
    """A conversation that is scored by what it leaves in memory."""

    def outcome(self) -> Outcome:
        """Score: share of the later questions' answers that BFCL's checker finds in what the memory holds."""
        held = memory_text(self._memory.save(), self.task.data["entry"].backend)
        targets: Sequence[AgenticEntry] = self.task.data["targets"]
        found = sum(contains_answer(held, question.answers)[0] for question in targets)
        passed = found == len(targets)
        reason = "ok" if passed else f"memory:{len(targets) - found}_of_{len(targets)}_answers_missing"
        return Outcome(passed, found / len(targets), reason, {"answers_held": float(found)})


#: what a session of a memory task is made by: the task -> a session
Start = Callable[[Task], MemorySession]
