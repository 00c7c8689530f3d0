"""The processes that run the user's class: one that imports the file once, and forks a child for each rollout.

Started by :class:`~pact_nemo.environments.own.importer.Importer`. The first one runs no tool and has no threads of
ours, so a fork takes milliseconds and is safe. It ends children, and everything that they left behind. It leaves when
the trainer is gone, however that died.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from pact_nemo.environments.own import confinement, wire
from pact_nemo.environments.own.classes import Instance, Offered
from pact_nemo.errors import ConfigError

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_REAP_S = 1.0  #: for a killed child to be gone; later it is looked after in passing
_LOOK_S = 1.0  #: between looks at whether the trainer is still there
#: what a scheduler sends to every process of a job; this one stays as long as the trainer does
_OF_THE_TRAINER = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_libc = ctypes.CDLL(None)


def main(descriptor: int, parent: int, settings: dict[str, Any]) -> None:
    """Import, say what there is, and start children until the trainer is gone.

    Args:
        descriptor: of the connection to the trainer.
        parent: the trainer's process id.
        settings: ``reference``, ``include``, ``memory_mb``; ``sandbox``: of :func:`confinement.plan`, or None.
    """
    _leave_with(parent)  # an import may hang
    with socket.socket(fileno=descriptor) as control:
        control.set_inheritable(False)
        tools: Imported | Confined
        try:
            if settings["sandbox"] is not None:
                _ignore_what_is_the_trainers()
                _libc.prctl(_PR_SET_PDEATHSIG, 0, 0, 0, 0)
                confinement.enter(settings["sandbox"], parent)
                tools, report = Confined(settings), {}
                parent = os.getppid()
            else:
                tools = Imported(settings)
                report = tools.report
        except ConfigError as error:
            report = {"error": str(error)}
        except BaseException as error:
            report = {"error": f"agent.tools={settings['reference']!r}: {type(error).__name__}: {error}"}
        wire.send(control, wire.encoded(report), None)
        if "error" in report:
            return
        # the thread of the trainer that started this process may end long before the trainer does
        _libc.prctl(_PR_SET_PDEATHSIG, 0, 0, 0, 0)
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        _ignore_what_is_the_trainers()
        gc.collect()
        gc.freeze()
        family = _Family(set(_children()))
        try:
            _serve(control, parent, tools, family)
        finally:
            family.end_all()
            os.killpg(os.getpid(), signal.SIGKILL)  # helpers, and this process itself


def _ignore_what_is_the_trainers() -> None:
    for number in _OF_THE_TRAINER:
        signal.signal(number, signal.SIG_IGN)


class Imported:
    """The user's file in the process that starts rollouts, which are forks of it."""

    def __init__(self, settings: dict[str, Any]):
        self._offered = Offered(settings["reference"], settings["include"])
        self._memory_mb: int | None = settings["memory_mb"]

    @property
    def report(self) -> dict[str, Any]:
        return _report(self._offered)

    def begin(self, number: int) -> Answering:
        """What answers the requests of a rollout, in its process."""
        if self._memory_mb is not None:
            _limit_memory(self._memory_mb)
        return Instance(self._offered)


class Confined:
    """The user's file in the confined process of a rollout, and nowhere else."""

    def __init__(self, settings: dict[str, Any]):
        self._settings = settings
        self._instance: Instance | None = None
        self._failure = ""

    def begin(self, number: int) -> Answering:
        """As :meth:`Imported.begin`; the process that it returns in is another one, without privileges."""
        try:
            confinement.become_rollout(self._settings["sandbox"], number)
        except OSError as error:
            self._failure = f"the sandbox can't be set up: {error}"
        return self

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """As :meth:`Instance.answer`; the first one imports the file. ``report``: what the file offers."""
        offered = None
        if self._instance is None and not self._failure:
            try:
                offered = Offered(self._settings["reference"], self._settings["include"])
                self._instance = Instance(offered)
            except ConfigError as error:
                self._failure = str(error)
            except BaseException as error:
                self._failure = f"{type(error).__name__}: {error}"
        if self._instance is None:
            return {"failure": self._failure}
        if request["do"] == "report":
            return {"value": _report(offered)} if offered is not None else {"failure": "it was asked for already"}
        return self._instance.answer(request)


def _report(offered: Offered) -> dict[str, Any]:
    return {key: getattr(offered, key) for key in ("schemas", "offers", "warnings", "name")}


def _serve(control: socket.socket, parent: int, tools: Imported | Confined, family: _Family) -> None:
    waiting = select.poll()
    waiting.register(control.fileno(), select.POLLIN)
    while True:
        if not waiting.poll(_LOOK_S * 1000):
            family.reap()
            if os.getppid() != parent:
                return
            continue
        try:
            request, descriptors = wire.receive_with_descriptors(control)
        except (EOFError, OSError, ValueError):
            return
        if request["do"] == "fork":
            reply = family.fork(control, descriptors[0], tools)
        else:
            reply = {"status": family.end(request["pid"])}
        # a process of another namespace has another number there: a descriptor of it goes along
        ended = [os.pidfd_open(reply["pid"])] if isinstance(tools, Confined) and "pid" in reply else []
        with contextlib.suppress(OSError):  # then the next look finds it gone
            wire.send(control, wire.encoded(reply), None, ended)
        for descriptor in ended:
            os.close(descriptor)


class _Family:
    """The children of this process.

    Args:
        helpers: those that the user's file started as it was imported; they stay.
    """

    def __init__(self, helpers: set[int]):
        self._helpers = helpers
        self._rollouts: set[int] = set()
        self._killed: set[int] = set()
        self._started = 0

    def fork(self, control: socket.socket, descriptor: int, tools: Imported | Confined) -> dict[str, Any]:
        try:
            me = os.getpid()
            self._started += 1
            pid = os.fork()
            if pid == 0:
                _child(control, descriptor, me, partial(tools.begin, self._started))
        except OSError as error:
            return {"error": f"{type(error).__name__}: {error}"}
        finally:
            os.close(descriptor)
        self._rollouts.add(pid)
        return {"pid": pid}

    def end(self, pid: int) -> int | None:
        """Kill a child and everything that it started. Its wait status, where it had ended by itself."""
        if pid not in self._rollouts:
            return None
        self._rollouts.remove(pid)
        done, status = os.waitpid(pid, os.WNOHANG)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        if not done:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # it may have no group of its own yet
            self._killed.add(pid)
            ended = os.pidfd_open(pid)
            wire.has_ended(ended, _REAP_S)
            os.close(ended)
        self.reap()
        return status if done else None

    def reap(self) -> None:
        """Bury the killed, and kill what they left: its new parent is this process."""
        for pid in list(self._killed):
            with contextlib.suppress(ChildProcessError):
                if os.waitpid(pid, os.WNOHANG)[0] == 0:
                    continue
            self._killed.discard(pid)
        for _ in range(50):  # children of what is killed come up one generation at a time
            strays = set(_children()) - self._helpers - self._rollouts - self._killed
            if not strays:
                return
            for pid in strays:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
            time.sleep(0.002)

    def end_all(self) -> None:
        for pid in list(self._rollouts):
            self.end(pid)
        self.reap()


def _children() -> Iterator[int]:
    with contextlib.suppress(OSError):
        yield from map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def _leave_with(parent: int) -> None:
    """End when the thread that started this process ends."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)


class Answering(Protocol):
    """What answers the requests of a rollout."""

    def answer(self, request: dict[str, Any]) -> dict[str, Any]: ...


def _child(control: socket.socket, descriptor: int, parent: int, begin: Callable[[], Answering]) -> None:
    """One rollout. Never returns."""
    code = 1
    try:
        _leave_with(parent)
        os.setsid()
        for number in _OF_THE_TRAINER:
            signal.signal(number, signal.SIG_DFL)
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # what a tool started stays below it
        control.close()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        connection = socket.socket(fileno=descriptor)
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
