"""Tasks that build on other tasks (``Task.after``): in which order they are played, and what else has to be played."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from pact_nemo.environments.base import Task
from pact_nemo.errors import ConfigError

T = TypeVar("T")


def order_fault(tasks: Sequence[Task]) -> str | None:
    """What is wrong with the order of ``tasks``, or None: each has to stand behind those that it builds on."""
    seen: set[str] = set()
    for index, task in enumerate(tasks):
        if not isinstance(task.after, tuple) or not isinstance(task.prepares, bool):
            return f"[{index}].after has to be a tuple of ids, and .prepares true or false"
        missing = next((name for name in task.after if name not in seen), None)
        if missing is not None:
            return f"[{index}].after names {missing!r}, which is no earlier task"
        seen.add(task.id)
    return None


def refuse_samples(tasks: Sequence[Task], samples: int) -> None:
    """Raises ConfigError where tasks that build on others would be played more than once each: nothing says which of
    the episodes the others build on.
    """
    linked = next((task for task in tasks if task.after or task.prepares), None)
    if samples > 1 and linked is not None:
        raise ConfigError(
            f"evaluation.samples={samples}: task {linked.id} builds on other episodes or prepares for them, so each is"
            " played once; set evaluation.samples=1, and evaluate into another folder for another sample"
        )


def with_prerequisites(chosen: Sequence[Task], tasks: Sequence[Task]) -> list[Task]:
    """What ``chosen`` builds on, directly or not, in the order of ``tasks``; then ``chosen`` itself, in its own order.

    Args:
        chosen: some of ``tasks``.
        tasks: all tasks, each behind those that it builds on.
    """
    by_id, needed, names = {task.id: task for task in tasks}, set[str](), {task.id for task in chosen}
    left = [name for task in chosen for name in task.after]
    while left:
        name = left.pop()
        if name not in needed:
            needed.add(name)
            left += by_id[name].after
    return [task for task in tasks if task.id in needed - names] + list(chosen)


def standing(done: set[str], tasks: Sequence[Task]) -> set[str]:
    """Of the ids ``done``, those whose task builds on nothing that is not done; a task that is played again has all
    that builds on it played again.
    """
    kept: set[str] = set()
    for task in tasks:
        if task.id in done and kept.issuperset(task.after):
            kept.add(task.id)
    return kept


def play_in_order(tasks: Sequence[Task], play: Callable[[Task], T], workers: int) -> list[T]:
    """``play`` of every task in ``workers`` threads, each begun when those that it builds on have ended, however they
    did. Results in the order of ``tasks``.

    Tasks that build on less are handed out first. So a thread that waits, waits for what another thread plays.
    """
    ended = {task.id: threading.Event() for task in tasks}
    by_id, depths = {task.id: task for task in tasks}, dict[str, int]()

    def depth(task: Task) -> int:
        if task.id not in depths:
            depths[task.id] = max((depth(by_id[name]) + 1 for name in task.after if name in by_id), default=0)
        return depths[task.id]

    def one(task: Task) -> T:
        for name in task.after:
            if name in ended:
                ended[name].wait()
        try:
            return play(task)
        finally:
            ended[task.id].set()

    with ThreadPoolExecutor(workers) as threads:
        played = {task.id: threads.submit(one, task) for task in sorted(tasks, key=depth)}
        return [played[task.id].result() for task in tasks]
