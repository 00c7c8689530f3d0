"""An environment of somebody else behind the checks of the protocol: what breaks it is refused by name.

Faults of the environment as a whole are ConfigErrors, raised as the tasks are read and so before anything is started.
Faults in one episode are EnvironmentFailures: that episode is masked and counted.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from pact_nemo.environments.base import Goal, Outcome, Task, ToolCall, check_schema
from pact_nemo.environments.order import order_fault
from pact_nemo.environments.sessions import opening_fault, opening_messages, shown_to_policy
from pact_nemo.environments.spec import EnvironmentSpec
from pact_nemo.errors import ConfigError, EnvironmentFailure, PactError


def _lacking(value: Any, names: tuple[str, ...]) -> list[str]:
    return [f"{name}()" for name in names if not callable(getattr(value, name, None))]


def _messages_fault(messages: Any) -> str | None:
    if not isinstance(messages, list | tuple) or not messages:
        return "has to be a non-empty sequence of messages"
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            return f"holds {message!r:.80}, which is no message with role and content"
    return None


def _tools_fault(tools: Any) -> str | None:
    if not isinstance(tools, list | tuple):
        return "has to be a sequence of tool schemas"
    for tool in tools:
        try:
            check_schema(tool)
        except ValueError as error:
            return str(error)
    return None


def _calls_fault(turns: Any) -> str | None:
    if not isinstance(turns, tuple) or not all(isinstance(calls, tuple) for calls in turns):
        return "has to be a tuple of calls for each user turn"
    odd = next((call for calls in turns for call in calls if not isinstance(call, ToolCall)), None)
    return None if odd is None else f"holds {odd!r:.80}, which is no ToolCall"


def task_fault(task: Any) -> str | None:
    """What is wrong with a task, or None."""
    if not isinstance(task, Task):
        return f"is a {type(task).__name__}, not a Task"
    for name in ("id", "group", "category"):
        if not isinstance(getattr(task, name), str) or not getattr(task, name):
            return f".{name} has to be a text"
    if not isinstance(task.user_turns, tuple) or not task.user_turns:
        return ".user_turns has to be a non-empty tuple, the messages of each user turn"
    parts = {f"user_turns[{index}]": _messages_fault(turn) for index, turn in enumerate(task.user_turns)}
    parts |= {"tools": _tools_fault(task.tools), "later_tools": _tools_fault(task.later_tools)}
    parts |= {"reference_calls": _calls_fault(task.reference_calls)}
    return next((f".{name} {fault}" for name, fault in parts.items() if fault is not None), None)


class OutsideEnvironment:
    """An environment that is not of this package.

    Args:
        name: the setting ``environment``, which messages say.
        inner: has ``tasks()`` and ``start(task)``; ``close()`` may be missing.
        spec: what it says of itself.
        max_observation_chars: longer observations are cut for the policy. None: no limit.

    Raises:
        ConfigError: a method is missing.
    """

    def __init__(self, name: str, inner: Any, spec: EnvironmentSpec, max_observation_chars: int | None):
        self._name, self._inner, self._limit = name, inner, max_observation_chars
        self._lock: AbstractContextManager[Any] = nullcontext() if spec.thread_safe else threading.RLock()
        self._tasks: list[Task] | None = None
        self._opens_itself = False
        needed = ("tasks", "start", "goals") if spec.expert_traces == "recorded" else ("tasks", "start")
        missing = _lacking(inner, needed)
        if missing:
            raise self._refused(f"{type(inner).__name__} has no {', '.join(missing)}; give it what it lacks")

    def _refused(self, message: str) -> ConfigError:
        return ConfigError(f"environment={self._name!r}: {message} (docs/extend/environment.md)")

    def _asked(self, what: str, ask: Callable[[], Any]) -> Any:
        try:
            with self._lock:
                return ask()
        except PactError:
            raise
        except Exception as error:
            raise self._refused(f"{what} raised {error!r}; repair it") from error

    def tasks(self) -> list[Task]:
        """All tasks, read and checked once; an episode of the first one is opened and closed.

        Raises:
            ConfigError: they are no tasks, two have the same id, or a session lacks a method; names which.
        """
        if self._tasks is None:
            found = self._asked("tasks()", self._inner.tasks)
            if not isinstance(found, list | tuple) or not found:
                raise self._refused(f"tasks() gave {found!r:.80}; it has to be a list of one Task or more")
            seen: set[str] = set()
            for index, task in enumerate(found):
                fault = task_fault(task)
                if fault is not None:
                    raise self._refused(f"tasks()[{index}]{'' if fault[0] == '.' else ' '}{fault}")
                if task.id in seen:
                    raise self._refused(f"tasks()[{index}].id {task.id!r} is another task's; ids have to differ")
                seen.add(task.id)
            fault = order_fault(found)
            if fault is not None:
                raise self._refused(f"tasks() {fault}")
            session = self._asked(f"start({found[0].id!r})", lambda: self._inner.start(found[0]))
            missing = _lacking(session, OutsideSession.NEEDED)
            self._asked("close() of a session", getattr(session, "close", lambda: None))
            if missing:
                raise self._refused(f"its session, a {type(session).__name__}, has no {', '.join(missing)}")
            self._opens_itself = callable(getattr(session, "opening", None))
            self._tasks = list(found)
        return list(self._tasks)

    def start(self, task: Task) -> OutsideSession:
        """A new episode.

        Raises:
            EnvironmentFailure: it could not be started.
        """
        return OutsideSession(self._inner, task, self._lock, self._limit)

    def check_openings(self, tasks: Sequence[Task]) -> None:
        """Where the first task's session has ``opening()``: ask sessions of all these tasks, each under two seeds. A
        session that can't be started says nothing here; its episodes will fail.

        Raises:
            ConfigError: one opens with other messages than ``Task.user_turns[0]``, so it can't be trained on.
        """
        for task, seed in ((task, seed) for task in tasks if self._opens_itself for seed in (0, 1)):
            try:
                session = self.start(task)
                try:
                    session.seeded(seed)
                    fault = opening_fault(task, session.opening())
                finally:
                    session.close()
            except EnvironmentFailure:
                continue
            if fault is not None:
                raise self._refused(fault)

    def goals(self, task: Task) -> list[Goal]:
        """What the environment says; only asked where its ``expert_traces`` are ``recorded``."""
        goals: list[Goal] = self._asked("goals()", lambda: self._inner.goals(task))
        return goals

    def close(self) -> None:
        """Close the environment where it can be."""
        with self._lock:
            getattr(self._inner, "close", lambda: None)()


class OutsideSession:
    """One episode. Whatever the environment's code raises or returns by mistake is an EnvironmentFailure."""

    NEEDED = ("execute", "next_user_turn", "outcome")

    def __init__(self, environment: Any, task: Task, lock: AbstractContextManager[Any], limit: int | None):
        self.task, self._lock, self._limit = task, lock, limit
        self._closed = False
        with self._guarded("start()"):
            self._inner = environment.start(task)
        missing = _lacking(self._inner, self.NEEDED)
        if missing:
            raise self._failure(f"its session has no {', '.join(missing)}")

    def _failure(self, message: str) -> EnvironmentFailure:
        return EnvironmentFailure(f"{self.task.id}: {message}")

    @contextmanager
    def _guarded(self, what: str) -> Iterator[None]:
        try:
            with self._lock:
                yield
        except PactError:
            raise
        except Exception as error:
            raise self._failure(f"{what} raised {error!r}") from error

    def seeded(self, seed: int) -> None:
        """See :class:`~pact_nemo.environments.base.Session`."""
        with self._guarded("seeded()"):
            getattr(self._inner, "seeded", lambda seed: None)(seed)

    def opening(self) -> list[dict[str, str]]:
        """See :class:`~pact_nemo.environments.base.OpensItself`; the task's own where the session has none."""
        with self._guarded("opening()"):
            found = opening_messages(self._inner, self.task)
        fault = _messages_fault(found)
        if fault is not None:
            raise self._failure(f"opening() {fault}")
        return found

    def execute(self, calls: list[ToolCall]) -> list[str]:
        """See :class:`~pact_nemo.environments.base.Session`."""
        with self._guarded("execute()"):
            found = self._inner.execute(list(calls))
        if not isinstance(found, list | tuple) or not all(isinstance(text, str) for text in found):
            raise self._failure(f"execute() gave {found!r:.80}; it has to be a text for each call")
        if len(found) != len(calls):
            raise self._failure(f"{len(calls)} calls got {len(found)} observations")
        return shown_to_policy(found, self._limit)

    def next_user_turn(self, message: str = "") -> tuple[list[dict[str, str]], list[dict[str, Any]]] | None:
        """See :class:`~pact_nemo.environments.base.Session`."""
        with self._guarded("next_user_turn()"):
            found = self._inner.next_user_turn(message)
        if found is None:
            return None
        if not isinstance(found, tuple) or len(found) != 2:
            raise self._failure(f"next_user_turn() gave {found!r:.80}; it has to be (messages, new tools), or None")
        fault = _messages_fault(found[0]) or _tools_fault(found[1])
        if fault is not None:
            raise self._failure(f"next_user_turn() {fault}")
        return list(found[0]), list(found[1])

    def outcome(self) -> Outcome:
        """See :class:`~pact_nemo.environments.base.Session`."""
        with self._guarded("outcome()"):
            found = self._inner.outcome()
        if not isinstance(found, Outcome):
            raise self._failure(f"outcome() gave {found!r:.80}, which is no Outcome")
        if not isinstance(found.score, int | float) or not math.isfinite(found.score) or not 0 <= found.score <= 1:
            raise self._failure(f"outcome().score is {found.score!r}; it has to be in [0, 1]")
        return found

    def close(self) -> None:
        """Close the session where it can be, once."""
        if not self._closed:
            self._closed = True
            with self._guarded("close()"):
                getattr(self._inner, "close", lambda: None)()
