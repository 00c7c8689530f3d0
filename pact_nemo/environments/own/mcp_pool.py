"""The MCP servers of a host: one a rollout, some of them started ahead, or one for all."""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import logging
import os
import threading
from collections import deque
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pact_nemo.environments.own.mcp_server import Lost, Server, Trade
from pact_nemo.environments.own.mcp_templates import LaunchPlan, Rollout
from pact_nemo.environments.own.workers import SLOT_S
from pact_nemo.errors import EnvironmentFailure

log = logging.getLogger(__name__)

_T = TypeVar("_T")
_END_S = 5.0  #: for those who still wait to be told of the end
Task = Mapping[str, Any] | None


class Servers(Protocol):
    """Where rollouts get their servers from. For one event loop."""

    async def first(self, example: Task) -> Server:
        """Start the first one, to learn what there is. Raises Lost."""
        ...

    async def take(self, task: Task) -> Server:
        """The server of a rollout. Raises Lost, EnvironmentFailure."""
        ...

    async def give(self, server: Server) -> None:
        """A rollout has ended."""
        ...

    async def close(self) -> None:
        """Stop all, and wait for that."""
        ...


class _Started:
    """What both kinds of servers have in common."""

    def __init__(self, plan: LaunchPlan, trade: Trade):
        self._plan, self._trade = plan, trade
        self._numbers = itertools.count(1)
        self._all: set[Server] = set()
        #: more at once would only make each of them late
        self._starts = asyncio.Semaphore(max(2, len(os.sched_getaffinity(0))))

    async def _start(self, task: Task) -> Server:
        async with self._starts:
            number = next(self._numbers)
            rollout = Rollout(number, str(Path(self._trade.base) / f"server-{number}"), task)
            server = Server(self._trade, rollout, self._plan.launch(rollout))
            self._all.add(server)
            try:
                await server.start()
            except BaseException:
                self._all.discard(server)
                raise
            return server

    async def _stop(self, server: Server, kill: bool) -> None:
        await server.stop(kill)
        self._all.discard(server)


class Pool(_Started):
    """A server process a rollout. As many as were open at once are started ahead, and one more.

    Args:
        workers: rollouts that may be open at once; servers that were started ahead count.
    """

    def __init__(self, plan: LaunchPlan, trade: Trade, workers: int):
        super().__init__(plan, trade)
        self._workers = workers
        self._slots = asyncio.Semaphore(workers)
        self._ahead: deque[asyncio.Task[Server]] = deque()
        self._leaving: set[asyncio.Task[None]] = set()
        self._open: set[Server] = set()
        self._taken, self._peak = 0, 0
        self._closed, self._failing = False, False

    async def first(self, example: Task) -> Server:
        """See :class:`Servers`. It is the first rollout's, where that may have any task."""
        server = await self._start(example)
        if self._plan.needs_task:
            await self._stop(server, kill=False)
        else:
            self._ahead.append(asyncio.create_task(_started(server)))
        return server

    async def take(self, task: Task) -> Server:
        """See :class:`Servers`."""
        try:
            async with asyncio.timeout(SLOT_S):
                await self._slots.acquire()
        except TimeoutError:
            raise EnvironmentFailure(
                f"no rollout ended within {SLOT_S:g} s, and agent.workers={self._workers} are open"
            ) from None
        self._taken += 1
        self._peak = max(self._peak, self._taken)
        try:
            server = await self._next(task)
        except BaseException:
            self._freed()
            raise
        self._open.add(server)
        self._refill()
        return server

    async def _next(self, task: Task) -> Server:
        while self._ahead:
            starting = next((each for each in self._ahead if each.done()), self._ahead[0])
            self._ahead.remove(starting)
            try:
                server = await starting
            except Lost as error:
                log.warning("a server that was started ahead is lost: %s", error)
                self._failing = True
                continue
            if server.alive:
                return server
            self._leave(server, kill=True)
        server = await self._start(task)
        self._failing = False
        return server

    def _refill(self) -> None:
        if self._plan.needs_task or self._failing or self._closed:
            return
        while self._taken + len(self._ahead) < min(self._workers, self._peak + 1):
            self._ahead.append(asyncio.create_task(self._start(None)))

    async def give(self, server: Server) -> None:
        """See :class:`Servers`. Doesn't wait until the server is gone."""
        if server in self._open:
            self._open.discard(server)
            self._leave(server, kill=server.lost is not None)
            self._freed()
            self._refill()

    def _freed(self) -> None:
        self._taken -= 1
        self._slots.release()

    def _leave(self, server: Server, kill: bool) -> None:
        leaving = asyncio.create_task(self._stop(server, kill))
        self._leaving.add(leaving)
        leaving.add_done_callback(self._leaving.discard)

    async def close(self) -> None:
        """See :class:`Servers`."""
        self._closed = True
        for starting in self._ahead:
            starting.cancel()
        await asyncio.gather(*self._ahead, *self._leaving, return_exceptions=True)
        await asyncio.gather(*(self._stop(each, kill=each not in self._open) for each in list(self._all)))


async def _started(server: Server) -> Server:
    return server


class SharedServer(_Started):
    """One server for all rollouts. One that is lost is started again for the next rollout."""

    def __init__(self, plan: LaunchPlan, trade: Trade):
        super().__init__(plan, trade)
        self._server: Server | None = None
        self._changing = asyncio.Lock()

    async def first(self, example: Task) -> Server:
        """See :class:`Servers`."""
        return await self.take(example)

    async def take(self, task: Task) -> Server:
        """See :class:`Servers`."""
        async with self._changing:
            if self._server is not None and not self._server.alive:
                log.warning("the shared MCP server is started again: %s", self._server.lost or "it ended")
                await self._stop(self._server, kill=True)
                self._server = None
            if self._server is None:
                self._server = await self._start(None)
            return self._server

    async def give(self, server: Server) -> None:
        """See :class:`Servers`."""

    async def close(self) -> None:
        """See :class:`Servers`."""
        await asyncio.gather(*(self._stop(each, kill=False) for each in list(self._all)))


class LoopThread:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._loop.run_forever, name="mcp-servers", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """The result of a coroutine, from any other thread.

        Raises:
            EnvironmentFailure: the loop is closed, or was closed meanwhile.
        """
        with self._lock:
            if self._closed:
                work.close()
                raise EnvironmentFailure("the tools are closed")
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise EnvironmentFailure("the tools are closed") from None
        except BaseException:
            future.cancel()  # e.g. Ctrl-C in the waiting thread
            raise

    def close(self, last: Coroutine[Any, Any, None] | None) -> None:
        """Run ``last``, and end the thread."""
        with self._lock:
            self._closed = True
        future = asyncio.run_coroutine_threadsafe(self._finish(last), self._loop)
        future.result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _finish(self, last: Coroutine[Any, Any, None] | None) -> None:
        try:
            if last is not None:
                await last
        finally:
            others = [each for each in asyncio.all_tasks() if each is not asyncio.current_task()]
            for each in others:
                each.cancel()
            if others:
                await asyncio.wait(others, timeout=_END_S)
