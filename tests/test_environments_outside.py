"""Environments that break the protocol: refused by name before anything starts, or one episode that fails."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pact_nemo.environments.base import Outcome, Session, Task, ToolCall
from pact_nemo.environments.outside import OutsideEnvironment
from pact_nemo.environments.spec import EnvironmentSpec
from pact_nemo.errors import ConfigError, EnvironmentFailure

GOOD = Task("a", "a", "c", (({"role": "user", "content": "hi"},),), (), ((),))


class Episode:
    """Keeps the protocol; what a test changes breaks it."""

    def __init__(self, **changes: Callable[..., Any] | None):
        self.execute: Any = lambda calls: ["seen"] * len(calls)
        self.next_user_turn: Any = lambda message="": None
        self.outcome: Any = lambda: Outcome(True, 1.0)
        for name, value in changes.items():
            setattr(self, name, value)


class World:
    def __init__(self, tasks: Any = (GOOD,), session: Any = None):
        self._tasks, self._session = tasks, session

    def tasks(self) -> Any:
        if isinstance(self._tasks, Exception):
            raise self._tasks
        return self._tasks

    def start(self, task: Task) -> Any:
        return self._session if self._session is not None else Episode()


def outside(world: Any, **spec: Any) -> OutsideEnvironment:
    return OutsideEnvironment("world.py:World", world, EnvironmentSpec(World, **spec), None)


def changed(**changes: Any) -> tuple[Task, ...]:
    return (dataclasses.replace(GOOD, **changes),)


@pytest.mark.parametrize(
    ("world", "said"),
    [
        (object(), "object has no tasks(), start()"),
        (World(tasks=()), "tasks() gave ()"),
        (World(tasks=5), "tasks() gave 5"),
        (World(tasks=KeyError("x")), "tasks() raised KeyError('x')"),
        (World(tasks=({"id": "a"},)), "tasks()[0] is a dict, not a Task"),
        (World(tasks=(GOOD, GOOD)), "tasks()[1].id 'a' is another task's"),
        (World(tasks=changed(id="")), "tasks()[0].id has to be a text"),
        (World(tasks=changed(user_turns=())), "tasks()[0].user_turns has to be"),
        (World(tasks=changed(user_turns=("hi",))), "tasks()[0].user_turns[0] has to be"),
        (World(tasks=changed(user_turns=(("hi",),))), "tasks()[0].user_turns[0] holds 'hi'"),
        (World(tasks=changed(tools=({"name": "x"},))), "tasks()[0].tools a tool has to be an object with parameters"),
        (World(tasks=changed(reference_calls=(("f()",),))), "tasks()[0].reference_calls holds 'f()'"),
        (World(session=object()), "its session, a object, has no execute(), next_user_turn(), outcome()"),
        (World(session=Episode(outcome=None)), "has no outcome()"),
    ],
)
def test_an_environment_that_breaks_the_protocol_is_refused_before_anything_starts(world: Any, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        outside(world).tasks()
    assert said in str(caught.value) and "environment='world.py:World'" in str(caught.value)


def test_recorded_answers_need_goals() -> None:
    with pytest.raises(ConfigError, match=r"has no goals\(\)"):
        outside(World(), expert_traces="recorded")


def fails(calls: Any) -> Any:
    raise RuntimeError("lost")


@pytest.mark.parametrize(
    ("changes", "use", "said"),
    [
        ({"execute": fails}, "execute", "execute() raised RuntimeError('lost')"),
        ({"execute": lambda calls: [1]}, "execute", "execute() gave [1]"),
        ({"execute": lambda calls: []}, "execute", "1 calls got 0 observations"),
        ({"next_user_turn": lambda message: "more"}, "next_user_turn", "next_user_turn() gave 'more'"),
        ({"next_user_turn": lambda message: ([], [])}, "next_user_turn", "next_user_turn() has to be"),
        ({"outcome": lambda: 1.0}, "outcome", "outcome() gave 1.0"),
        ({"outcome": lambda: Outcome(True, float("nan"))}, "outcome", "outcome().score is nan"),
        ({"outcome": lambda: Outcome(True, 2.0)}, "outcome", "outcome().score is 2.0"),
    ],
)
def test_what_a_session_does_by_mistake_is_a_failed_episode(changes: dict[str, Any], use: str, said: str) -> None:
    session: Session = outside(World(session=Episode(**changes))).start(GOOD)
    arguments: dict[str, tuple[Any, ...]] = {"execute": ([ToolCall("f", {})],), "next_user_turn": ("",), "outcome": ()}
    with pytest.raises(EnvironmentFailure) as caught:
        getattr(session, use)(*arguments[use])
    assert said in str(caught.value) and str(caught.value).startswith("a: ")


@pytest.mark.parametrize("safe", [True, False])
def test_an_environment_that_is_not_thread_safe_gets_one_call_at_a_time(safe: bool) -> None:
    inside, most, lock = [0], [0], threading.Lock()

    def execute(calls: Any) -> list[str]:
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        time.sleep(0.02)
        with lock:
            inside[0] -= 1
        return ["seen"] * len(calls)

    environment = outside(World(session=Episode(execute=execute)), thread_safe=safe)
    sessions = [environment.start(GOOD) for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda session: session.execute([ToolCall("f", {})]), sessions))
    assert (most[0] == 1) is not safe


def test_long_observations_are_cut_for_the_policy_by_the_door() -> None:
    world = World(session=Episode(execute=lambda calls: ["x" * 50]))
    session = OutsideEnvironment("w", world, EnvironmentSpec(World), 10).start(GOOD)
    assert session.execute([ToolCall("f", {})]) == ["x" * 10 + " [cut]"]
