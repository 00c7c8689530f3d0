"""Many episodes at once, in a fixed order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from typing import Any, Protocol

from pact_nemo.environments.base import Task
from pact_nemo.environments.order import refuse_samples
from pact_nemo.errors import ConfigError, Interrupted, ServerLost
from pact_nemo.rollouts.episode import EpisodeSetup, Generates, run_episode
from pact_nemo.rollouts.types import Rollout

CHECK_SECONDS = 0.25


class Served(Generates, Protocol):
    """A client or a supervised server: opened around each batch."""

    async def __aenter__(self) -> Any: ...
    async def __aexit__(self, kind: Any, error: Any, trace: Any) -> None: ...


#: Called after each episode with (episodes done, episodes in all, policy-written tokens so far).
BatchProgress = Callable[[int, int, int], None]


def _give_threads(count: int) -> None:
    """asyncio's own pool has a few threads more than there are cores, and never above 32; asyncio.run closes this one
    as it would close that.
    """
    threads = ThreadPoolExecutor(count, thread_name_prefix="environment")
    asyncio.get_running_loop().set_default_executor(threads)


async def _repeat(check: Callable[[], None] | None) -> None:
    """Call ``check`` every ``CHECK_SECONDS`` until cancelled."""
    while check is not None:
        check()
        await asyncio.sleep(CHECK_SECONDS)


class _Gate:
    """Lets so many in at once as ``limit`` says at that moment."""

    def __init__(self, limit: Callable[[], int]):
        self._limit, self._inside, self._left = limit, 0, asyncio.Condition()

    async def __aenter__(self) -> None:
        async with self._left:
            await self._left.wait_for(lambda: self._inside < self._limit())
            self._inside += 1

    async def __aexit__(self, kind: Any, error: Any, trace: Any) -> None:
        async with self._left:
            self._inside -= 1
            self._left.notify()


async def _side_by_side(
    clients: Sequence[Served],
    check: Callable[[], None] | None,
    episodes: Callable[[], list[Coroutine[Any, Any, Rollout]]],
) -> list[Rollout]:
    """Play episodes with the clients open, all at once, until the last has ended or ``check`` raises."""
    ended: BaseException | None = None
    try:
        async with AsyncExitStack() as opened:
            for client in clients:
                await opened.enter_async_context(client)
            async with asyncio.TaskGroup() as group:
                watching = group.create_task(_repeat(check))
                running = [group.create_task(episode) for episode in episodes()]
                if running:
                    await asyncio.wait(running)
                watching.cancel()
    except* (ConfigError, Interrupted, ServerLost) as raised:
        ended = raised.exceptions[0]
    if ended is not None:  # raised out here: Python 3.11.2 wraps what an except* clause raises into a group again
        raise ended from None
    return [task.result() for task in running]


async def run_batch(
    tasks: Sequence[Task],
    samples: int,
    setup: EpisodeSetup,
    *,
    clients: Sequence[Served],
    concurrency: int | Callable[[], int],
    on_progress: BatchProgress | None = None,
    check: Callable[[], None] | None = None,
) -> list[Rollout]:
    """Play every task ``samples`` times, at most ``concurrency`` episodes at once; a function is asked at every start
    of one, and may say less than before.

    Returns ``len(tasks) * samples`` rollouts ordered by (task, sample): ``tasks[i]``'s are
    ``[i * samples : (i + 1) * samples]``. Tasks go to the clients in turn, all rollouts of a task to the same one, one
    after another, so that they find its prompt in that server's prefix cache. Each request has its own seed
    (``episode.SeedPath``), so which episodes ran side by side does not decide what is drawn (up to the last bits of the
    server's arithmetic, which depend on the batch).

    Each open episode has a thread for its environment, so that tools which wait hold up no other episode.

    A task waits for those of the batch that it builds on (``Task.after``), however they end; it takes no place in the
    queue meanwhile.

    ``check`` is called a few times a second; what it raises ends the batch and is passed on.

    Raises:
        ConfigError: see :func:`~pact_nemo.rollouts.episode.run_episode`.
    """
    refuse_samples(tasks, samples)
    limit = concurrency if callable(concurrency) else lambda: concurrency
    gate, ended_tasks = _Gate(limit), {task.id: asyncio.Event() for task in tasks}
    _give_threads(limit())
    total, done, tokens = len(tasks) * samples, 0, 0

    async def one(task: Task, sample: int, client: Served) -> Rollout:
        nonlocal done, tokens
        for name in task.after:
            if name in ended_tasks:
                await ended_tasks[name].wait()
        async with gate:
            rollout = await run_episode(task, sample, setup, client)
        ended_tasks[task.id].set()
        done += 1
        tokens += sum(rollout.loss_mask)
        if on_progress is not None:
            on_progress(done, total, tokens)
        return rollout

    def episodes() -> list[Coroutine[Any, Any, Rollout]]:
        order = ((i, task, sample) for i, task in enumerate(tasks) for sample in range(samples))
        return [one(task, sample, clients[i % len(clients)]) for i, task, sample in order]

    return await _side_by_side(clients, check, episodes)
