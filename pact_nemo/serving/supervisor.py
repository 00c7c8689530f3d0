"""A rollout server that is kept alive: heartbeats while it generates, a restart when it dies or hangs, and requests
sent again.

A request is the prompt, what this episode wrote so far, and a seed of its own: sent again, to a new process with the
same weights, it gives the same completion (up to the last bits of arithmetic that depend on what was batched together).
So an episode that was under way goes on where it was; its environment notices nothing.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from pact_nemo.errors import ServerError, ServerLost
from pact_nemo.runtime.hangs import beat
from pact_nemo.serving.client import Completion, GenerationRequest, RolloutClient, StaleWeights, TransientServerError
from pact_nemo.serving.health import Event, Health, HealthLimits, State
from pact_nemo.serving.refit import RefitReport, refit
from pact_nemo.serving.remote import RemoteServer
from pact_nemo.serving.server import RolloutServer

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.1


class _Down(Exception):
    """The server was given up while a request was under way."""


class SupervisedServer:
    """A launched :class:`RolloutServer` and its client, as episodes use it (``weight_version``, ``generate``).

    A server that was attached to is not restarted by us: its owner does that, and it is loaded with the current weights
    when it answers again.

    Args:
        server: launched, not necessarily ready.
        note: told every death and return, one line each.
        on_request: see :class:`RolloutClient`.
        like: folder that the server was started from; see :func:`pact_nemo.serving.refit.refit_all`.

    Attributes:
        health: as far as is known.
        reissued: requests that were sent again.
    """

    def __init__(
        self,
        server: RolloutServer | RemoteServer,
        *,
        note: Callable[[str], None] = log.warning,
        on_request: Callable[[dict[str, Any]], None] | None = None,
        like: Path | None = None,
    ):
        self.server = server
        self.health = Health(since=time.monotonic())
        self.reissued = 0
        self._note, self._on_request, self._like = note, on_request, like
        self._limits = HealthLimits(server.config.heartbeat_timeout_s, server.config.max_restarts)
        self._loaded: tuple[Path, int] | None = None  # None: the weights that the server starts with
        self._client: RolloutClient | None = None
        self._users = 0
        self._leaving = False
        self._watching: asyncio.Task[None] | None = None
        # of its own: episodes that are being ended need a thread for their environments, and may have one in all
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollout-server")
        self._up = self._down = asyncio.Event()
        self._hurry = False  # a heartbeat is wanted now
        self._answered = 0.0  # when the last heartbeat that was answered had been asked for

    # -- synchronous part: start, refit, restart

    def wait_ready(self) -> None:
        """Block until the server answers. Raises ServerError when it doesn't; a first start is not tried again."""
        self._open(self.server)

    def _open(self, server: RolloutServer | RemoteServer) -> None:
        self._stop_when_leaving()  # a server that answers at the first look reports no progress
        server.wait_ready(self._progress)
        settings = server.config
        self._client = RolloutClient(
            server.endpoint,
            weight_version=server.version,
            request_timeout_s=settings.request_timeout_s,
            connect_retries=settings.connect_retries,
            admin_timeout_s=settings.refit_timeout_s,
            on_request=self._on_request,
        )
        self._happened(Event.READY)
        if self._loaded is None:
            self._happened(Event.LOADED, version=server.version)

    def _progress(self, seconds: float, line: str) -> None:
        beat()  # a start has a deadline of its own
        self._stop_when_leaving()

    def _stop_when_leaving(self) -> None:
        if self._leaving:
            raise ServerError("the run is being stopped")

    @property
    def client(self) -> RolloutClient:
        """Of the process that runs now. Raises ServerError before :meth:`wait_ready`."""
        if self._client is None:
            raise ServerError("the rollout server was not started")
        return self._client

    @property
    def weight_version(self) -> int:
        """The version that completions have."""
        return self._loaded[1] if self._loaded is not None else self.server.version

    def refitting(self, folder: Path, version: int) -> None:
        """The server is about to be given other weights; a process that takes its place is given the same."""
        self._loaded = (folder, version)
        self._happened(Event.REFIT)

    def refitted(self) -> None:
        """It has them."""
        self._happened(Event.LOADED, version=self.weight_version)

    def recover(self, reason: str) -> RefitReport | None:
        """Start the server anew and load the current weights; again when that fails, up to ``max_restarts`` in all.

        Returns:
            what the load took; None where the server starts with the current weights.

        Raises:
            ServerLost: the restarts are used up; with the end of the server's log.
            CheckpointError: the current weights' export is not whole.
        """
        self._happened(Event.FAILED, reason=reason)
        while True:
            self._happened(Event.RESTART)
            if self.health.state is State.LOST:
                self.server.close()  # what hangs holds memory and cores
                raise ServerLost(
                    f"the rollout server is given up after {self.health.restarts} restarts"
                    f" (rollout.server.max_restarts): {reason}; end of"
                    f" {self.server.log_file}:\n{self.server.log_tail()}"
                )
            attached = self.server.config.url is not None
            what = (
                "waiting for it to answer again"
                if attached
                else f"restart {self.health.restarts} of {self._limits.max_restarts}"
            )
            self._note(f"rollout server: {reason.splitlines()[0]}; {what}")
            started = time.monotonic()
            try:
                self.server.restart()
                self._open(self.server)
                report = (
                    refit(self.client, *self._loaded, like=self._like, elsewhere=self.server.elsewhere)
                    if self._loaded is not None
                    else None
                )
            except ServerError as error:
                if self._leaving:  # half started it answers nobody; dead, it is started anew when it is needed again
                    self._happened(Event.ABANDONED, reason=reason)
                    raise
                reason = str(error)
                self._happened(Event.FAILED, reason=reason)
                continue
            self._happened(Event.LOADED, version=self.weight_version)
            seconds = time.monotonic() - started
            self._note(f"rollout server: back after {seconds:.0f} s with weight version {self.weight_version}")
            return report

    def put_down(self, reason: str) -> None:
        """End a server that does not do what it is told, and what it holds; :meth:`recover` starts it anew."""
        self._happened(Event.FAILED, reason=reason)
        self.server.end()

    def _happened(self, event: Event, *, version: int | None = None, reason: str = "") -> None:
        before = self.health
        self.health = before.after(event, time.monotonic(), self._limits, version=version, reason=reason)
        if self.health.state is not before.state:
            log.info("rollout server %s: %s -> %s %s", event, before.state, self.health.state, self.health.reason)

    # -- while a batch is played

    async def __aenter__(self) -> SupervisedServer:
        if self._users == 0:
            self._up, self._down = asyncio.Event(), asyncio.Event()
            await self.client.__aenter__()
            if self.health.serves(self.weight_version):
                self._up.set()
            self._watching = asyncio.create_task(self._watch(), name="rollout-server-watch")
        self._users += 1
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._users -= 1
        if self._users == 0:
            self._leaving = True
            assert self._watching is not None
            self._watching.cancel()
            with suppress(asyncio.CancelledError):
                await self._watching
            self._leaving = False  # a restart outside a batch, in a refit, is no thread that has to be ended
            await self.client.__aexit__(kind, error, trace)

    async def generate(self, request: GenerationRequest) -> Completion:
        """Sample one continuation, through restarts of the server.

        Raises:
            ServerLost: the server is given up: the batch can't be finished.
            ServerError: the server refuses this request, or gave no usable answer ``reissue_limit`` times more while it
                was alive.
        """
        spent = 0
        while True:
            await self._up.wait()
            if self.health.state is State.LOST:
                raise ServerLost(self.health.reason)
            down = self._down
            try:
                return await _unless(down, self.client.generate(request))
            except _Down:
                pass  # restarts are bounded by their own limit
            except StaleWeights as error:  # nothing that it says is believed until it was loaded anew
                if not down.is_set():
                    self._give_up(Event.STALE, str(error))
            except TransientServerError as error:
                # a front end goes on answering for a while after its engine has died: only an engine that lives is at
                # the request's charge
                if await self._lives(down):
                    spent += 1
                    if spent > self.server.config.reissue_limit:
                        raise
                    log.warning("sent again: %s", error)
            self.reissued += 1

    async def _lives(self, down: asyncio.Event) -> bool:
        """Whether the engine answers a heartbeat that it is asked for from now on; False once the server is given
        up.
        """
        failed = time.monotonic()
        while not down.is_set() and self._answered < failed:
            self._hurry = True
            await asyncio.sleep(_POLL_SECONDS)
        return not down.is_set()

    def _give_up(self, event: Event, reason: str) -> None:
        """Requests that are under way end now; the watch restarts the server."""
        self._happened(event, reason=reason)
        self._up.clear()
        self._down.set()

    async def _watch(self) -> None:
        """Heartbeats, and a restart when they end."""
        while True:
            try:
                reason = await self._dead()
                self._give_up(Event.FAILED, reason)
                restarting = asyncio.get_running_loop().run_in_executor(self._thread, self.recover, reason)
                old = self.client
                try:
                    await asyncio.shield(restarting)
                except asyncio.CancelledError:  # the run is being stopped: the thread notices ``_leaving`` soon
                    with suppress(Exception):
                        await restarting
                    raise
                finally:
                    await old.__aexit__(None, None, None)
                    if self._client is not old:
                        await self.client.__aenter__()
                    else:
                        await old.__aenter__()  # closed by __aexit__
                self._down = asyncio.Event()
                self._up.set()
            except asyncio.CancelledError:
                raise
            except Exception as error:  # every request that waits has to hear of it
                self.health = Health(
                    State.LOST, time.monotonic(), self.health.heard, None, self.health.restarts, str(error)
                )
                self._down.set()
                self._up.set()
                return

    async def _dead(self) -> str:
        """Returns why, once the server is dead."""
        config = self.server.config
        # between two batches nobody asked: it is heard from now on
        self._happened(Event.BEAT)
        ping: asyncio.Task[int | None] | None = None
        asked = -math.inf
        try:
            while True:
                if self.health.state in (State.DEAD, State.LOST):
                    return self.health.reason
                gone = self.server.exit_reason()
                if gone is not None:
                    return gone
                now = time.monotonic()
                if ping is None and (self._hurry or now - asked >= config.heartbeat_s):
                    asked, self._hurry = now, False
                    ping = asyncio.create_task(self.client.heartbeat(config.heartbeat_timeout_s))
                if ping is not None and ping.done():
                    try:
                        version = ping.result()
                    except ServerError as error:
                        log.debug("heartbeat: %s", error)
                        self._happened(Event.MISS)
                    else:
                        if version != (self._loaded[1] if self._loaded is not None else None):
                            return (
                                f"{self.server.endpoint.url} holds weight version {version}, not {self.weight_version}"
                            )
                        self._happened(Event.BEAT)
                        self._answered = asked
                    ping = None
                elif ping is not None and now - asked >= config.heartbeat_s:
                    self._happened(Event.MISS)
                await asyncio.sleep(_POLL_SECONDS)
        finally:
            if ping is not None:
                ping.cancel()
                with suppress(asyncio.CancelledError, ServerError):
                    await ping


async def _unless(event: asyncio.Event, work: Any) -> Any:
    """The result of ``work``; _Down when the event comes first."""
    task, signal = asyncio.ensure_future(work), asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait({task, signal}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise _Down
    finally:
        signal.cancel()
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError, ServerError):
                await task
