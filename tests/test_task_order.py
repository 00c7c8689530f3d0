"""Tasks that build on other tasks: played in order, never twice, and refused where no order holds."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from dataclasses import replace
from typing import Any

import pytest

from pact_nemo.config.load import load_config
from pact_nemo.data.tasks import refuse_evaluation_only
from pact_nemo.environments.base import Outcome, Task
from pact_nemo.environments.order import order_fault, play_in_order, refuse_samples, standing, with_prerequisites
from pact_nemo.environments.outside import OutsideEnvironment
from pact_nemo.environments.spec import EnvironmentSpec
from pact_nemo.errors import ConfigError
from pact_nemo.rollouts import batch
from pact_nemo.rollouts.types import Rollout


def task(name: str, *after: str, prepares: bool = False) -> Task:
    return Task(name, "g", "c", (({"role": "user", "content": name},),), (), ((),), after=after, prepares=prepares)


CHAIN = [
    task("a0", prepares=True),
    task("b0", prepares=True),
    task("a1", "a0", prepares=True),
    task("qa", "a0", "a1"),
    task("qb", "b0"),
]


class Recorder:
    """Begins and ends of episodes, whatever the threads."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []
        self.lock = threading.Lock()

    def note(self, what: str, name: str) -> None:
        with self.lock:
            self.events.append((what, name))

    def check(self, tasks: list[Task]) -> None:
        assert sorted(name for what, name in self.events if what == "end") == sorted(task.id for task in tasks)
        for each in tasks:
            for before in each.after:
                assert self.events.index(("end", before)) < self.events.index(("begin", each.id))


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_threads_begin_a_task_when_those_that_it_builds_on_have_ended(workers: int) -> None:
    recorder, rng = Recorder(), random.Random(workers)
    pauses = {each.id: rng.random() / 100 for each in CHAIN}

    def play(each: Task) -> str:
        recorder.note("begin", each.id)
        time.sleep(pauses[each.id])
        recorder.note("end", each.id)
        return each.id

    shuffled = [CHAIN[i] for i in (4, 3, 2, 1, 0)]
    assert play_in_order(shuffled, play, workers) == [each.id for each in shuffled]
    recorder.check(CHAIN)


def test_a_task_that_raises_holds_up_nobody() -> None:
    played = []

    def play(each: Task) -> None:
        played.append(each.id)
        if each.id == "a0":
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        play_in_order(CHAIN, play, 2)
    assert sorted(played) == sorted(each.id for each in CHAIN)


@pytest.mark.parametrize("concurrency", [1, 3])
def test_a_batch_keeps_the_order_with_one_place_and_with_several(
    concurrency: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()

    async def episode(each: Task, sample: int, setup: Any, client: Any) -> Rollout:
        recorder.note("begin", each.id)
        await asyncio.sleep(0.002)
        recorder.note("end", each.id)
        return Rollout(each.id, sample, [], [], [], [], [], Outcome(True, 1.0), 0)

    class Client:
        async def __aenter__(self) -> None: ...
        async def __aexit__(self, *words: Any) -> None: ...

    monkeypatch.setattr(batch, "run_episode", episode)
    shuffled: list[Task] = [CHAIN[i] for i in (4, 3, 2, 1, 0)]
    clients: Any = [Client()]
    made = asyncio.run(batch.run_batch(shuffled, 1, None, clients=clients, concurrency=concurrency))  # type: ignore[arg-type]
    assert [rollout.task_id for rollout in made] == [each.id for each in shuffled]
    recorder.check(CHAIN)
    with pytest.raises(ConfigError, match=r"evaluation\.samples=2"):
        asyncio.run(batch.run_batch(shuffled, 2, None, clients=clients, concurrency=concurrency))  # type: ignore[arg-type]


def test_what_a_choice_builds_on_is_played_too() -> None:
    assert [each.id for each in with_prerequisites([CHAIN[3]], CHAIN)] == ["a0", "a1", "qa"]
    assert with_prerequisites([CHAIN[4], CHAIN[1]], CHAIN) == [CHAIN[4], CHAIN[1]], "what was chosen keeps its order"


def test_what_builds_on_a_task_that_is_played_again_is_played_again() -> None:
    assert standing({"a0", "a1", "b0", "qa", "qb"}, CHAIN) == {"a0", "a1", "b0", "qa", "qb"}
    assert standing({"a1", "b0", "qa", "qb"}, CHAIN) == {"b0", "qb"}
    assert standing({"a0", "qa", "gone"}, CHAIN) == {"a0"}


def test_an_order_that_does_not_hold_is_named() -> None:
    assert order_fault(CHAIN) is None
    assert "'a0', which is no earlier task" in str(order_fault([CHAIN[2], CHAIN[0]]))
    assert "has to be a tuple" in str(order_fault([replace(CHAIN[0], after=["b0"])]))  # type: ignore[arg-type]

    class Late:
        def tasks(self) -> list[Task]:
            return [CHAIN[2], CHAIN[0]]

        def start(self, each: Task) -> None: ...

    with pytest.raises(ConfigError, match="no earlier task"):
        OutsideEnvironment("late.py:Late", Late(), EnvironmentSpec(Late), None).tasks()


def test_linked_tasks_are_evaluated_once_and_never_trained_on() -> None:
    refuse_samples(CHAIN, 1)
    refuse_samples([task("x")], 5)
    with pytest.raises(ConfigError, match=r"evaluation\.samples=3"):
        refuse_samples(CHAIN, 3)
    config = load_config([], ["environment=bfcl"])
    refuse_evaluation_only(config, [task("x")])
    with pytest.raises(ConfigError, match="task a0 builds on other episodes"):
        refuse_evaluation_only(config, CHAIN)


def test_a_session_may_open_with_messages_of_its_own() -> None:
    class Own:
        def __init__(self, messages: Any) -> None:
            self.messages = messages

        def tasks(self) -> list[Task]:
            return [task("x")]

        def start(self, each: Task) -> Any:
            found = self.messages

            class Session:
                def opening(self) -> Any:
                    return found

                def execute(self, calls: Any) -> list[str]:
                    return []

                def next_user_turn(self, message: str = "") -> None: ...

                def outcome(self) -> Outcome:
                    return Outcome(True, 1.0)

            return Session()

    from pact_nemo.errors import EnvironmentFailure

    def opening(messages: Any) -> list[dict[str, str]]:
        return OutsideEnvironment("own.py:Own", Own(messages), EnvironmentSpec(Own), None).start(task("x")).opening()

    assert opening([{"role": "user", "content": "hello"}]) == [{"role": "user", "content": "hello"}]
    with pytest.raises(EnvironmentFailure, match="opening"):
        opening([{"role": "user"}])
