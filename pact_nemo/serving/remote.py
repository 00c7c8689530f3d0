"""An engine of another node: its process belongs to a thread of that node's leader, its life to rank 0's supervisor."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from pact_nemo.errors import PactError, ServerError
from pact_nemo.serving.adapters import AdapterRoom
from pact_nemo.serving.admin import ServerAdmin
from pact_nemo.serving.board import Board, Do, Order, Status
from pact_nemo.serving.config import RolloutServerConfig
from pact_nemo.serving.endpoint import ServerEndpoint
from pact_nemo.serving.processes import tail_of
from pact_nemo.serving.proxies import left_aside
from pact_nemo.serving.server import Progress, RolloutServer

log = logging.getLogger(__name__)

_POLL_S = 0.2
_PEAK_EVERY = 50  #: polls
_LATER_S = 30.0  #: a node gives its engine up by itself before rank 0 stops waiting for it


@dataclass(frozen=True)
class Where:
    """An engine of another node, as rank 0 knows it.

    Attributes:
        host, rank: of the leader that starts it, for messages.
        log_file: that its node writes, on a disk that rank 0 sees, too.
        api_key: that it asks for.
    """

    host: str
    rank: int
    log_file: Path
    api_key: str

    def __str__(self) -> str:
        return f"{self.host} (rank {self.rank})"


class RemoteServer:
    """Rank 0's side: what :class:`pact_nemo.serving.server.RolloutServer` is to a supervisor. Orders are obeyed by a
    :class:`Keeper` there.
    """

    elsewhere = True
    pid: int | None = None

    def __init__(
        self,
        config: RolloutServerConfig,
        board: Board,
        where: Where,
        *,
        version: int = 0,
        adapters: AdapterRoom | None = None,
    ):
        self.config, self.version, self.log_file, self.adapters = config, version, where.log_file, adapters
        self.start_seconds: float | None = None
        self._board, self._where = board, where
        self._number, self._launched_at = 0, 0.0
        self._endpoint: ServerEndpoint | None = None
        self._status, self._looked = Status(-1), float("-inf")

    @property
    def endpoint(self) -> ServerEndpoint:
        """Address, key and model name. Raises ServerError before :meth:`wait_ready`."""
        if self._endpoint is None:
            raise ServerError(f"the rollout server on {self._where} has no address yet")
        return self._endpoint

    def admin(self) -> ServerAdmin:
        """Synchronous calls to the server."""
        return ServerAdmin(self.endpoint, timeout_s=self.config.refit_timeout_s)

    def launch(self) -> None:
        """Order a start and return at once."""
        self._order(Do.START)
        self._launched_at = time.monotonic()

    def restart(self) -> None:
        """Order what is left of it killed, and a new process."""
        self._endpoint = None
        self.launch()

    def close(self) -> None:
        """Order its end. Its node also ends it when that leaves the run."""
        with suppress(RuntimeError):  # the store is gone: so is the job
            self._order(Do.STOP)

    def end(self) -> None:
        """Order its end, and wait until its node says so: what it holds of a GPU is free then."""
        self.close()
        deadline = time.monotonic() + self.config.stop_timeout_s + _LATER_S
        with suppress(RuntimeError):
            while self._newest(0.0) is None:
                if time.monotonic() > deadline:
                    log.warning("the rollout server on %s was told to end, and nothing was heard of it", self._where)
                    return
                time.sleep(_POLL_S)

    def _order(self, do: Do) -> None:
        self._number += 1
        self._board.order(Order(self._number, do))

    def wait_ready(self, on_progress: Progress | None = None) -> RemoteServer:
        """Block until it answers, on its node and from here.

        Raises:
            ServerError: it died while starting, is not there in time, or can't be reached from here.
        """
        deadline = self._launched_at + self.config.start_timeout_s + _LATER_S
        while (status := self._newest(0.0)) is None or status.url is None:
            if status is not None and status.failure is not None:
                raise ServerError(f"the rollout server on {self._where}: {status.failure}")
            if time.monotonic() > deadline:
                raise ServerError(
                    f"nothing was heard of the rollout server on {self._where} for"
                    f" {time.monotonic() - self._launched_at:.0f} s; see {self.log_file}"
                )
            if on_progress is not None:
                on_progress(time.monotonic() - self._launched_at, self.log_tail(1).strip()[-200:])
            time.sleep(_POLL_S)
        self._endpoint = ServerEndpoint(status.url, self._where.api_key)
        if not self.admin().healthy():
            raise ServerError(
                f"the rollout server on {self._where} answers there, and not from here at {status.url}: rank 0 has to"
                f" reach the other nodes' ports{left_aside(status.url)}"
            )
        self.admin().check_weight_version(self.version)
        self.start_seconds = status.start_seconds
        return self

    def _newest(self, patience: float) -> Status | None:
        """What became of the last order; None: nothing was heard yet. Looked up again after ``patience`` seconds."""
        now = time.monotonic()
        if now - self._looked >= patience:
            self._status, self._looked = self._board.status() or self._status, now
        return self._status if self._status.number == self._number else None

    def exit_reason(self) -> str | None:
        """How its process ended; None while it runs, as far as its node has said."""
        status = self._newest(_POLL_S)
        return status.failure if status is not None else None

    def check_alive(self) -> None:
        """Raises ServerError with the end of the log when the process has died."""
        reason = self.exit_reason()
        if reason is not None:
            raise ServerError(f"{self._where}: {reason}; end of {self.log_file}:\n{self.log_tail()}")

    def log_tail(self, lines: int = 15) -> str:
        """Last lines of its log."""
        return tail_of(self.log_file, lines, self._where.api_key)

    def rotate_log(self) -> None:
        """Its node does that."""

    def peak_memory_bytes(self) -> int:
        """Peak resident size of its processes, bytes, as its node said last."""
        with suppress(RuntimeError):  # the store is gone: so is the job
            self._newest(0.0)
        return self._status.peak_bytes


class Keeper(threading.Thread):
    """The node's side: starts one engine when that is ordered, and says what becomes of it. It ends with :meth:`stop`,
    and its engine with it; when this process is killed, the engine's own watchdog ends it.

    Args:
        server: not launched yet.
        board: with a store of its own.
    """

    def __init__(self, server: RolloutServer, board: Board):
        super().__init__(name="engine-keeper", daemon=True)
        self._server, self._board = server, board
        self._left = threading.Event()
        self._told, self._obeying = Status(0), 0

    def run(self) -> None:
        now, polls = self._told, 0
        try:
            while not self._left.is_set():
                order = self._board.ordered()
                if order is not None and order.number > now.number:
                    now, polls = self._obey(order), 0
                reason = self._server.exit_reason()
                if reason is not None and now.failure is None:
                    now = replace(now, failure=reason)
                if polls % _PEAK_EVERY == 0:
                    self._server.rotate_log()
                    now = replace(now, peak_bytes=self._server.peak_memory_bytes())
                if now != self._told:
                    self._board.tell(now)
                    self._told = now
                polls += 1
                self._left.wait(_POLL_S)
        except Exception as error:  # the store went with rank 0: this rank's main thread hears of it in its collective
            log.warning("an engine is no longer looked after: %r", error)

    def _obey(self, order: Order) -> Status:
        self._obeying = order.number
        if order.do is Do.STOP:
            self._server.close()
            return Status(order.number, failure="it was stopped")
        try:
            self._server.restart()
            self._server.wait_ready(self._progress)
        except Exception as error:  # rank 0 decides what follows
            return Status(order.number, failure=str(error) if isinstance(error, PactError) else repr(error))
        return Status(order.number, self._server.endpoint.url, start_seconds=self._server.start_seconds)

    def _progress(self, seconds: float, line: str) -> None:
        newest = self._board.ordered()
        if self._left.is_set() or (newest is not None and newest.number > self._obeying):
            raise ServerError("it is no longer wanted")

    @property
    def pid(self) -> int | None:
        """Process (and process group) id of the engine."""
        return self._server.pid

    def stop(self) -> None:
        """End engine and thread. Safe to call twice."""
        self._left.set()
        self._server.close()
        if self.is_alive():
            self.join(10.0)
        self._server.close()  # it may have been starting one meanwhile
