"""What sessions have in common: the cut of long observations, the end of an episode, and tools given as Python
source.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pact_nemo.environments.base import Environment, Session, Task, ToolCall
from pact_nemo.environments.python_tools import Executed, PythonTools
from pact_nemo.errors import EnvironmentFailure
from pact_nemo.sandbox import Sandbox

CUT = " [cut]"  #: ends an observation that was cut


def shown_to_policy(observations: Sequence[str], limit: int | None) -> list[str]:
    """Observations as the policy sees them: those longer than ``limit`` characters are cut. None: no limit."""
    return [text if limit is None or len(text) <= limit else f"{text[:limit]}{CUT}" for text in observations]


def opening_messages(session: Any, task: Task) -> list[dict[str, str]]:
    """The first messages of an episode: the session's own where it is one that
    :class:`~pact_nemo.environments.base.OpensItself`, else the task's.
    """
    own = getattr(session, "opening", None)
    return [dict(message) for message in (own() if callable(own) else task.user_turns[0])]


def opening_fault(task: Task, opening: Sequence[Mapping[str, str]]) -> str | None:
    """Why a task whose session opens with these messages can't be trained on; None where it can.

    The prompt x of a task is ``user_turns[0]``: warm-up, traces and every rollout of a group go by the same one.
    """
    if [dict(message) for message in opening] == [dict(message) for message in task.user_turns[0]]:
        return None
    return (
        f"opening() of a session of task {task.id!r} gave {list(opening)!r:.120}, which isn't Task.user_turns[0]:"
        " training needs the same prompt in every episode. Put the messages into Task.user_turns[0], whatever"
        " seeded() is given, or only evaluate such tasks (tools/evaluate.py)"
    )


def after_the_end(task: Task) -> EnvironmentFailure:
    """The error for a call when the episode is over."""
    return EnvironmentFailure(f"{task.id}: a call after the episode's end")


def start_scripted(environment: Environment, task: Task, later: Sequence[Sequence[dict[str, str]]]) -> Session:
    """A new episode that is played without a policy, from calls that are known beforehand.

    Where a model plays the user (``start_scripted(task, later)`` of the environment), it isn't asked: ``later`` is what
    the user says in each user turn after the request, and content with the end. Other environments know it themselves.

    Raises:
        EnvironmentFailure: the environment can't start it.
    """
    given = getattr(environment, "start_scripted", None)
    session: Session = given(task, later) if given is not None else environment.start(task)
    return session


def seed_session(session: Session, seed: int) -> None:
    """Tell a session that draws (``seeded(seed)``) its seed."""
    given = getattr(session, "seeded", None)
    if given is not None:
        given(seed)


class SourceSession:
    """An episode of one user turn whose tools are Python source that runs in the sandbox.

    Args:
        task: what is being solved.
        sandbox: where the tools run.
        sources: Python source of each tool, by name.
        max_observation_chars: longer observations are cut for the policy; scoring sees them whole. None: no limit.
    """

    def __init__(self, task: Task, sandbox: Sandbox, sources: Mapping[str, str], max_observation_chars: int | None):
        self.task = task
        self._limit = max_observation_chars
        self._tools = PythonTools(sandbox, sources)
        self._closed = False

    @property
    def executed(self) -> list[Executed]:
        """The calls made so far, in order, with their whole results."""
        return list(self._tools.executed)

    def execute(self, calls: list[ToolCall]) -> list[str]:
        """Raises EnvironmentFailure after :meth:`close`; whatever a tool does is its observation."""
        if self._closed:
            raise after_the_end(self.task)
        return shown_to_policy(self._tools.execute(calls), self._limit)

    def next_user_turn(self, message: str = "") -> tuple[list[dict[str, str]], list[dict[str, Any]]] | None:
        """There is one user turn."""
        return None

    def close(self) -> None:
        self._closed = True


def call_counts(executed: Sequence[Executed]) -> dict[str, float]:
    """Metrics ``calls`` and ``invocation_errors`` of an episode: numbers of executed calls."""
    return {
        "calls": float(len(executed)),
        "invocation_errors": float(sum(not done.result.ok for done in executed)),
    }
