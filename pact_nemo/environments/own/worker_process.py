"""The processes that run the user's class: one that imports the file once, and forks a child for each rollout.

Started by :class:`~pact_nemo.environments.own.importer.Importer`. The first one runs no tool and has no threads of
ours, so a fork takes milliseconds and is safe. It ends children, and everything that they left behind. It leaves when
the trainer is gone, however that died.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pact_nemo.environments.own import confinement, wire
from pact_nemo.environments.own.rollout_process import (
    OF_THE_TRAINER,
    PR_SET_CHILD_SUBREAPER,
    PR_SET_PDEATHSIG,
    Confined,
    Imported,
    begin_rollout,
    leave_with,
    libc,
)
from pact_nemo.errors import ConfigError

_REAP_S = 1.0  #: for a killed child to be gone; later it is looked after in passing
_MOST = 256  #: processes that are kept for rollouts, open ones included
_QUIET_S = 0.02  #: without a request, before what can wait is done
_LOOK_S = 1.0  #: between looks at whether the trainer is still there


def main(descriptor: int, parent: int, settings: dict[str, Any]) -> None:
    """Import, say what there is, and start children until the trainer is gone.

    Args:
        descriptor: of the connection to the trainer.
        parent: the trainer's process id.
        settings: ``reference``, ``include``, ``memory_mb``; ``sandbox``: of :func:`confinement.plan`, or None.
    """
    leave_with(parent)  # an import may hang
    with socket.socket(fileno=descriptor) as control:
        control.set_inheritable(False)
        tools: Imported | Confined
        try:
            if settings["sandbox"] is not None:
                _ignore_what_is_the_trainers()
                libc.prctl(PR_SET_PDEATHSIG, 0, 0, 0, 0)
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
        if settings["sandbox"] is None:
            # the thread of the trainer that started this process may end long before the trainer does
            libc.prctl(PR_SET_PDEATHSIG, 0, 0, 0, 0)
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        _ignore_what_is_the_trainers()
        gc.collect()
        gc.freeze()
        family = _Family(set(_children()), settings["sandbox"] is not None)
        try:
            _serve(control, parent, tools, family)
        finally:
            family.end_all()
            os.killpg(os.getpid(), signal.SIGKILL)  # helpers, and this process itself


def _ignore_what_is_the_trainers() -> None:
    for number in OF_THE_TRAINER:
        signal.signal(number, signal.SIG_IGN)


def _serve(control: socket.socket, parent: int, tools: Imported | Confined, family: _Family) -> None:
    waiting = select.poll()
    waiting.register(control.fileno(), select.POLLIN)
    pause = _LOOK_S
    while True:
        if not waiting.poll(pause * 1000):
            if os.getppid() != parent:
                return
            pause = family.when_idle(control, tools)
            continue
        try:
            request = wire.receive(control, None)
        except (EOFError, OSError, ValueError):
            return
        if request["do"] == "fork":
            _hand_over(control, family, family.take(control, tools))
        else:
            status = family.end(request["pid"])
            with contextlib.suppress(OSError):  # then the next look finds the trainer gone
                wire.send(control, wire.encoded({"status": status}), None)
        pause = _QUIET_S


def _hand_over(control: socket.socket, family: _Family, found: _Begun | OSError) -> None:
    """Give the trainer the connection to a rollout's process, and a descriptor that says when it has ended: a process
    of another namespace has another number there.
    """
    descriptors: list[int] = []
    reply: dict[str, Any]
    try:
        if isinstance(found, OSError):
            raise found
        ended = os.pidfd_open(found.pid)
        descriptors = [found.connection.detach(), ended]
        reply = {"pid": found.pid}
    except OSError as error:
        reply = {"error": f"{type(error).__name__}: {error}"}
        if isinstance(found, _Begun):
            family.end(found.pid)
    with contextlib.suppress(OSError):  # then the next look finds the trainer gone
        wire.send(control, wire.encoded(reply), None, descriptors)
    for descriptor in descriptors:
        os.close(descriptor)


@dataclass(frozen=True)
class _Begun:
    """A rollout's process that waits for its first request, and the trainer's end of the connection to it."""

    pid: int
    connection: socket.socket


class _Family:
    """The children of this process. As many as were open at once are kept: those that aren't open are spares, started
    while nobody waits, so that a phase of many rollouts finds its processes there.

    Args:
        helpers: those that the user's file started as it was imported; they stay.
        apart: each rollout has a PID namespace of its own, which ends with it.
    """

    def __init__(self, helpers: set[int], apart: bool):
        self._apart = apart
        self._helpers = helpers
        self._rollouts: set[int] = set()
        self._killed: set[int] = set()
        self._started = 0
        self._spares: list[_Begun] = []
        self._most, self._refused = 1, False

    def when_idle(self, control: socket.socket, tools: Imported | Confined) -> float:
        """Do what can wait for a moment in which nobody asks for anything: bury the killed, or start one process ahead.
        Where the system refuses that, none is until a rollout ends. Returns the seconds until there is more to do.
        """
        self.reap()
        if self._killed:
            return _QUIET_S
        if self._refused or len(self._rollouts) >= min(self._most, _MOST):
            return _LOOK_S
        found = self._fork(control, tools)
        if isinstance(found, OSError):
            self._refused = True
        else:
            self._spares.append(found)
        return 0.0

    def take(self, control: socket.socket, tools: Imported | Confined) -> _Begun | OSError:
        """A process for a rollout: a spare that lives, else a new one; or why there is none."""
        found: _Begun | OSError | None = None
        while self._spares and found is None:
            found = self._spares.pop(0)
            if os.waitid(os.P_PID, found.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                found.connection.close()
                self.end(found.pid)
                found = None
        found = found if found is not None else self._fork(control, tools)
        self._most = max(self._most, len(self._rollouts) - len(self._spares))
        return found

    def _fork(self, control: socket.socket, tools: Imported | Confined) -> _Begun | OSError:
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            return error
        me = os.getpid()
        self._started += 1
        with theirs:
            try:
                pid = os.fork()
            except OSError as error:
                ours.close()
                return error
            if pid == 0:
                strange = [control, ours, *(spare.connection for spare in self._spares)]
                begin_rollout(strange, theirs, me, partial(tools.begin, self._started))
        self._rollouts.add(pid)
        return _Begun(pid, ours)

    def end(self, pid: int) -> int | None:
        """Kill a child and everything that it started. Its wait status, where it had ended by itself. One that started
        nothing, or has a namespace of its own, is buried later.
        """
        if pid not in self._rollouts:
            return None
        self._rollouts.remove(pid)
        self._refused = False
        done, status = os.waitpid(pid, os.WNOHANG)
        alone = self._apart or (not done and not any(_children(pid)))
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        if not done:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # it may have no group of its own yet
            self._killed.add(pid)
        if alone:
            return status if done else None
        if not done:
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


def _children(pid: int | None = None) -> Iterator[int]:
    """Of this process, or of another one."""
    for thread in Path(f"/proc/{pid if pid is not None else os.getpid()}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            yield from map(int, thread.read_text().split())
