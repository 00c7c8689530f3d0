"""The process of one rollout: a fork that answers the trainer's requests, and what it runs the user's file with."""

from __future__ import annotations

import ctypes
import os
import random
import resource
import signal
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from pact_nemo.environments.own import confinement, wire
from pact_nemo.environments.own.classes import Instance, Offered
from pact_nemo.errors import ConfigError

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
#: what a scheduler sends to every process of a job; the importing process stays as long as the trainer does
OF_THE_TRAINER = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
libc = ctypes.CDLL(None)


class Answering(Protocol):
    """What answers the requests of a rollout."""

    def answer(self, request: dict[str, Any]) -> dict[str, Any]: ...


class Imported:
    """The user's file in the process that starts rollouts, which are forks of it."""

    def __init__(self, settings: dict[str, Any]):
        random.seed(0)  # each rollout starts with the state that the import leaves
        self._offered = Offered(settings["reference"], settings["include"])
        self._memory_mb: int | None = settings["memory_mb"]
        self._random = random.getstate()

    @property
    def report(self) -> dict[str, Any]:
        return _report(self._offered)

    def begin(self, number: int) -> Answering:
        """What answers the requests of a rollout, in its process."""
        random.setstate(self._random)  # Python gives each fork another one
        if self._memory_mb is not None:
            _limit_memory(self._memory_mb)
        return Instance(self._offered)


class Confined:
    """The user's file in the confined process of a rollout, and nowhere else."""

    def __init__(self, settings: dict[str, Any]):
        self._settings = settings
        random.seed(0)
        self._random = random.getstate()
        self._offered: Offered | None = None
        self._instance: Instance | None = None
        self._failure = ""

    def begin(self, number: int) -> Answering:
        """As :meth:`Imported.begin`; the process that it returns in is another one, without privileges, in which the
        file is imported.
        """
        try:
            confinement.become_rollout(self._settings["sandbox"], number)
        except OSError as error:
            self._failure = f"the sandbox can't be set up: {error}"
            return self
        random.setstate(self._random)
        try:
            self._offered = Offered(self._settings["reference"], self._settings["include"])
            self._instance = Instance(self._offered)
        except ConfigError as error:
            self._failure = str(error)
        except BaseException as error:
            self._failure = f"{type(error).__name__}: {error}"
        return self

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """As :meth:`Instance.answer`; ``report``: what the file offers."""
        if self._instance is None or self._offered is None:
            return {"failure": self._failure}
        return {"value": _report(self._offered)} if request["do"] == "report" else self._instance.answer(request)


def _report(offered: Offered) -> dict[str, Any]:
    return {key: getattr(offered, key) for key in ("schemas", "offers", "warnings", "name")}


def leave_with(parent: int) -> None:
    """End when the thread that started this process ends."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)


def begin_rollout(
    strange: Sequence[socket.socket], connection: socket.socket, parent: int, begin: Callable[[], Answering]
) -> None:
    """One rollout. Never returns. ``strange``: connections that are no affair of it."""
    code = 1
    try:
        leave_with(parent)
        os.setsid()
        for number in OF_THE_TRAINER:
            signal.signal(number, signal.SIG_DFL)
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # what a tool started stays below it
        for each in strange:
            each.close()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        _run(connection, begin())
        code = 0
    finally:
        os._exit(code)


def _limit_memory(megabytes: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + (megabytes << 20)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _run(connection: socket.socket, instance: Answering) -> None:
    me = os.getpid()
    while True:
        try:
            request = wire.receive(connection, None)
        except (EOFError, OSError):
            return
        reply = instance.answer(request)
        if os.getpid() != me:
            return  # a tool forked, and this is the copy
        try:
            data = wire.encoded(reply)
        except BaseException as error:
            data = wire.encoded({"failure": f"its result can't be sent: {type(error).__name__}: {error}"[:1000]})
        wire.send(connection, data, None)
        if request["do"] == "close":
            return
