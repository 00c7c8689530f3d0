"""The engines of a run: each is supervised, a batch is shared by all, and one that is given up is not the run's end.

A request is the same wherever it is sent: prompt, what the episode wrote so far, and a seed of its own, to engines with
the same weights. So what an engine that is given up had under way goes to the others, and the batch is the one that all
of them would have sampled (up to the last bits of arithmetic that depend on what was batched together).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from pact_nemo.errors import ServerError, ServerLost
from pact_nemo.serving.client import Completion, GenerationRequest
from pact_nemo.serving.health import State
from pact_nemo.serving.refit import RefitReport, check_export, load
from pact_nemo.serving.supervisor import SupervisedServer

Result = TypeVar("Result")


class Fleet:
    """Engines that share every batch.

    Args:
        engines: launched, not necessarily ready; their order stays.
        min_share: of them that has to be left; below it the run ends (``rollout.server.min_engines_share``).
        note: told what is lost, one line each.
    """

    def __init__(self, engines: Sequence[SupervisedServer], *, min_share: float, note: Callable[[str], None]):
        self.engines = list(engines)
        self._min_share, self._note = min_share, note
        self._lost: list[SupervisedServer] = []
        self._moved = 0
        self._told = (0, 0)  # restarts and requests sent again that were counted already
        self._opened, self._users = AsyncExitStack(), 0

    @property
    def living(self) -> list[SupervisedServer]:
        """Those that are not given up."""
        return [engine for engine in self.engines if engine not in self._lost]

    @property
    def share(self) -> float:
        """Engines that are left, of all; 1 where there are none."""
        return len(self.living) / len(self.engines) if self.engines else 1.0

    def wait_ready(self) -> float:
        """Block until all of them answer; seconds of the slowest start. Raises ServerError when one doesn't."""
        for engine in self.engines:
            engine.wait_ready()
        return max((engine.server.start_seconds or 0.0 for engine in self.engines), default=0.0)

    def check_version(self, version: int) -> None:
        """Raises ServerError when an engine holds other weights."""
        for engine in self.living:
            if engine.weight_version != version:
                raise ServerError(
                    f"{engine.server.endpoint.url} holds weight version {engine.weight_version}, the policy is at"
                    f" {version}; refit first"
                )

    def give_up(self, engine: SupervisedServer, reason: str) -> None:
        """Go on without an engine, whose restarts are used up.

        Raises:
            ServerLost: fewer than ``min_share`` of all are left.
        """
        if engine not in self._lost:
            self._lost.append(engine)
            if self.living:
                self._note(
                    f"rollout server {self._name(engine)} is given up; {len(self.living)} of {len(self.engines)} are"
                    f" left and get its requests, so rollouts take longer: {reason.splitlines()[0]}"
                )
        if not self.living or self.share < self._min_share:
            if len(self.engines) == 1:
                raise ServerLost(reason)
            raise ServerLost(
                f"{len(self._lost)} of {len(self.engines)} rollout servers are given up: less than"
                f" {self._min_share:g} of them is left (rollout.server.min_engines_share); the last one: {reason}"
            )

    def _name(self, engine: SupervisedServer) -> str:
        return f"{self.engines.index(engine) + 1} of {len(self.engines)}"

    # -- a batch
    # ------------------------------------------------------------------------------------------------------------------

    def routes(self, tasks: int) -> list[Route]:
        """One client a task, in turn of the engines that are left: all rollouts of a task find its prompt in one
        engine's prefix cache.
        """
        living = self.living
        return [Route(self, number, living[number % len(living)]) for number in range(tasks)]

    def instead_of(self, engine: SupervisedServer, reason: str, number: int) -> SupervisedServer:
        """Where what was on its way to an engine that is given up goes now: spread over those that are left.

        Raises:
            ServerLost: too few are left.
        """
        self.give_up(engine, reason)
        self._moved += 1
        living = self.living
        return living[number // len(self.engines) % len(living)]

    async def __aenter__(self) -> Fleet:
        if self._users == 0:
            async with AsyncExitStack() as opened:
                for engine in self.living:
                    await opened.enter_async_context(engine)
                self._opened = opened.pop_all()
        self._users += 1
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._users -= 1
        if self._users == 0:
            await self._opened.__aexit__(kind, error, trace)

    # -- between batches
    # ------------------------------------------------------------------------------------------------------------------

    def sleep(self, *, drop: bool) -> None:
        """Have every engine asleep. One that isn't then is ended, which gives its memory back as well; it is started
        anew when it is needed.

        Args:
            drop: they keep no weights: a :meth:`refit` has to come before they are asked. Where that brings an adapter
                it brings no base, so they keep that on the host.
        """

        def sleep(engine: SupervisedServer) -> None:
            if drop:  # what memory holds that comes later passes for no version
                engine.client.admin.set_weight_version("dropped")
            engine.client.admin.sleep(drop=drop and engine.server.adapters is None)

        self._each(sleep)

    def wake(self, part: str | None) -> None:
        """Have every engine awake.

        Args:
            part: only ``weights``, before a refit, or ``kv_cache``, after it; None: all, with the weights of before. An
                engine that doesn't wake is started anew, before a refit by the refit.

        Raises:
            ServerLost: too few engines are left.
        """
        self._each(lambda engine: engine.client.admin.wake(part))
        if part != "weights":
            dead = [engine for engine in self.living if engine.health.state is State.DEAD]
            self._side_by_side(dead, lambda engine: engine.recover(engine.health.reason))

    def _each(self, tell: Callable[[SupervisedServer], None]) -> None:
        """Of all that live, at the same time; who refuses, is late or gone is ended."""

        def told(engine: SupervisedServer) -> None:
            if engine.health.state is State.DEAD:
                engine.server.end()  # what hangs holds memory
                return
            try:
                tell(engine)
            except ServerError as error:
                engine.put_down(str(error))

        if living := self.living:
            with ThreadPoolExecutor(len(living)) as threads:
                list(threads.map(told, living))

    def refit(self, folder: Path, version: int, *, like: Path | None) -> list[RefitReport]:
        """Make every engine load an export, all at the same time; see :func:`pact_nemo.serving.refit.refit_all`. One
        that dies, hangs or fails meanwhile is restarted and given the export.

        Raises:
            CheckpointError: the export is not whole or not what is due; no engine was touched.
            ServerLost: too few engines are left.
        """
        living = self.living
        started = time.perf_counter()
        check_export([engine.client for engine in living], folder, version, like=like)
        verify_s = time.perf_counter() - started
        for engine in living:
            engine.refitting(folder, version)
        with ThreadPoolExecutor(len(living)) as threads:
            loads = [threads.submit(_load, engine, folder, version, verify_s) for engine in living]
        for engine in living:
            engine.server.rotate_log()
        loading = dict(zip(living, loads, strict=True))
        return self._side_by_side(living, lambda engine: _settled(engine, loading[engine]))

    def _side_by_side(
        self, engines: Sequence[SupervisedServer], recover: Callable[[SupervisedServer], Result]
    ) -> list[Result]:
        """What ``recover`` gives for each engine that comes back, in their order; the others are given up. All at the
        same time: a start takes minutes.

        Raises:
            ServerLost: too few engines are left.
        """
        if not engines:
            return []
        with ThreadPoolExecutor(len(engines)) as threads:
            coming = [threads.submit(recover, engine) for engine in engines]
        found: list[Result] = []
        for engine, one in zip(engines, coming, strict=True):
            try:
                found.append(one.result())
            except ServerLost as error:
                self.give_up(engine, str(error))
        return found

    def counts(self) -> dict[str, float]:
        """``engines/share`` that is left, and since the last call: ``server/restarts`` and ``rollout/reissued``
        (requests sent again).
        """
        now = (
            sum(engine.health.restarts for engine in self.engines),
            sum(engine.reissued for engine in self.engines) + self._moved,
        )
        before, self._told = self._told, now
        return {
            "server/restarts": now[0] - before[0],
            "rollout/reissued": now[1] - before[1],
            "engines/share": self.share,
        }

    def peak_memory_bytes(self) -> int:
        return sum(engine.server.peak_memory_bytes() for engine in self.engines)

    def close(self) -> None:
        """Stop those that were started here, all at the same time."""
        if self.engines:
            with ThreadPoolExecutor(len(self.engines)) as threads:
                list(threads.map(lambda engine: engine.server.close(), self.engines))


def _settled(engine: SupervisedServer, loading: Future[RefitReport]) -> RefitReport:
    """What a load took; of a restarted engine where it failed, or where the engine had died before it."""
    try:
        report = loading.result()
        engine.refitted()
    except ServerError as error:
        again = engine.recover(str(error))
        assert again is not None
        return again
    if engine.health.state is State.DEAD:  # it was given up while the last batch ended
        engine.recover(engine.health.reason)
    return report


def _load(engine: SupervisedServer, folder: Path, version: int, verify_s: float) -> RefitReport:
    return load(engine.client, folder, version, elsewhere=engine.server.elsewhere, verify_s=verify_s)


class Route:
    """Where the episodes of one task are sampled: one engine, until that is given up."""

    def __init__(self, fleet: Fleet, number: int, engine: SupervisedServer):
        self._fleet, self._number, self._engine = fleet, number, engine

    async def __aenter__(self) -> Route:
        await self._fleet.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._fleet.__aexit__(kind, error, trace)

    @property
    def weight_version(self) -> int:
        """The version that completions have."""
        return self._engine.weight_version

    async def generate(self, request: GenerationRequest) -> Completion:
        """Sample one continuation; see :meth:`pact_nemo.serving.supervisor.SupervisedServer.generate`.

        Raises:
            ServerLost: too few engines are left: the batch can't be finished.
        """
        while True:
            engine = self._engine
            try:
                return await engine.generate(request)
            except ServerLost as error:
                other = self._fleet.instead_of(engine, str(error), self._number)
                if self._engine is engine:  # another rollout of the task may have moved it already
                    self._engine = other
