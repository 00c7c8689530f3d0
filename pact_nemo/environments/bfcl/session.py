"""One BFCL episode: calls on BFCL's own backends, user turns as the entry has them, the official verdict."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

from pact_nemo.environments.base import Outcome, Task, ToolCall
from pact_nemo.environments.bfcl.backend import Backend, Instances, protect_strings, too_heavy
from pact_nemo.environments.bfcl.data import Entry
from pact_nemo.environments.bfcl.settings import BFCLConfig
from pact_nemo.environments.calls import call_text
from pact_nemo.environments.sessions import after_the_end, shown_to_policy
from pact_nemo.errors import ConfigError, ToolCallError

FORCE_TERMINATED = "multi_turn:force_terminated"


def _new_functions_message() -> dict[str, str]:
    from bfcl_eval.constants.default_prompts import DEFAULT_USER_PROMPT_FOR_ADDITIONAL_FUNCTION_FC

    return {"role": "user", "content": DEFAULT_USER_PROMPT_FOR_ADDITIONAL_FUNCTION_FC}


def user_messages(entry: Entry, turn: int) -> tuple[dict[str, str], ...]:
    """What the user says in a turn; where functions are revealed in it, BFCL's own message that says so."""
    if turn in entry.revealed:
        return (_new_functions_message(),)
    return tuple({"role": row["role"], "content": row["content"]} for row in entry.record["question"][turn])


def run_calls(
    backend: Instances, calls: Sequence[ToolCall], offered: Set[str], hidden: Set[str] = frozenset()
) -> tuple[list[str], list[str]]:
    """Run the calls of one assistant turn in order. Returns (an observation a call, the texts that were executed).

    Args:
        offered: names of tools that run, and are listed where another one is called.
        hidden: names of tools that run and are not listed.
    """
    observations, executed = [], []
    for call in calls:
        if call.name not in offered and call.name not in hidden:
            observations.append(f"Error: unknown function {call.name!r}. Available: {', '.join(sorted(offered))}")
            continue
        try:
            text = protect_strings(call_text(call))
            if too_heavy(call):
                raise ToolCallError("a number in the call is too large")
        except ToolCallError as error:
            observations.append(f"Error: {error}")
            continue
        executed.append(text)
        observations.append(backend.execute([text])[0])
    return observations, executed


class BFCLSession:
    """One episode. Sessions are independent of one another and may run in different threads; one session is for one
    thread at a time.

    Args:
        task: what is being solved.
        settings: of its environment.
        max_observation_chars: longer observations are cut for the policy; the checker sees them whole. None: no limit.

    Attributes:
        steps: executed call texts: user turns, assistant turns within, calls within; what the official checker gets.
    """

    def __init__(self, task: Task, settings: BFCLConfig, max_observation_chars: int | None):
        if "entry" not in task.data:
            raise ConfigError(f"task {task.id} is not a BFCL task")
        self.task = task
        self._settings, self._limit = settings, max_observation_chars
        self._entry: Entry = task.data["entry"]
        self._turn: int = task.data["first_turn"]
        self._last: int = task.data["last_turn"]
        self._offered = {tool["name"] for tool in task.tools}
        later = range(self._turn + 1, self._last + 1)
        self._hidden = {tool["name"] for turn in later for tool in self._entry.revealed.get(turn, ())}
        self._finished = False
        self._closed = False
        self._backend = Backend(self._entry)
        self.steps: list[list[list[str]]] = []
        for earlier in self._entry.ground_truth[: self._turn]:
            self._backend.execute(earlier)
            self.steps.append([list(earlier)] if earlier else [])
        self.steps.append([])

    def execute(self, calls: list[ToolCall]) -> list[str]:
        """Run the calls of one assistant turn in order; one observation string each.

        A tool that the episode never offers, a call that can't be written as literals or one that would never end is
        answered with an error text and not executed; wrong arguments are executed and answered with BFCL's own error
        text.

        Raises:
            EnvironmentFailure: the session is closed or its last user turn is, or BFCL itself broke.
        """
        if self._closed or self._finished:
            raise after_the_end(self.task)
        observations, step = run_calls(self._backend, calls, self._offered, self._hidden)
        if step:
            self.steps[-1].append(step)
        return shown_to_policy(observations, self._limit)

    def next_user_turn(self, message: str = "") -> tuple[list[dict[str, str]], list[dict[str, Any]]] | None:
        """Close the current user turn. Returns (messages, newly revealed tools) of the next one, or None when the task
        is over. BFCL's checkers don't read what the assistant says.
        """
        if self._turn >= self._last:
            self._finished = True
            return None
        self._turn += 1
        self.steps.append([])
        revealed = list(self._entry.revealed.get(self._turn, ()))
        self._offered |= {tool["name"] for tool in revealed}
        return [dict(message) for message in user_messages(self._entry, self._turn)], revealed

    def outcome(self) -> Outcome:
        """Official verdict on everything executed so far; may be asked again.

        An episode whose last user turn was not closed fails with BFCL's ``multi_turn:force_terminated`` unless
        ``judge_unfinished`` is set.
        """
        if not self._finished and not self._settings.judge_unfinished:
            return Outcome(False, 0.0, FORCE_TERMINATED)
        missing: list[list[list[str]]] = [[] for _ in range(self._last + 1 - len(self.steps))]
        return self._backend.judge(self.steps + missing, self._last + 1, self._settings.irrelevance_check)

    def close(self) -> None:
        """Release all state; safe to call twice."""
        self._closed = True
        self._backend.close()
