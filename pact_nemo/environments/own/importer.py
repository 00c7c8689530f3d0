"""The trainer's side of the process that imports the user's file and starts a process for each rollout."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from pact_nemo.environments.own import confinement, wire
from pact_nemo.environments.own.settings import OwnConfig
from pact_nemo.errors import ConfigError

IMPORT_S = 120.0  #: for the user's file to be imported
_CONTROL_S = 30.0  #: for a child to be started or ended; both take milliseconds
_LEAVE_S = 5.0
_EXIT_S = 0.5  #: between the end of a connection and the end of its process
#: the same places for modules as in this process, and no other: a file ``json.py`` in the working folder stays out
_PROGRAM = (
    "import json, sys; settings = json.loads(sys.argv.pop(1)); sys.path[:] = settings['path'];"
    "from pact_nemo.environments.own.worker_process import main;"
    "main(settings['descriptor'], settings['parent'], settings)"
)


def _without_our_keys(config: OwnConfig) -> dict[str, str]:
    """The environment without the keys of the trainer's own endpoints: what a tool can read, a policy can ask for."""
    ours = {config.judge.key_env, config.user.key_env, "TEACHER_API_KEY"}
    return {
        name: value
        for name, value in os.environ.items()
        if name not in ours and not (name.startswith("PACT_") and name.endswith("_API_KEY"))
    }


class ImporterLost(Exception):
    """The importing process is dead or doesn't answer."""


class Lost(Exception):
    """A rollout's process is dead or late; the text says how."""


class Importer:
    """A process with the user's file in it. Thread-safe.

    Attributes:
        report: ``schemas``, ``offers``, ``warnings``, ``name``.

    Raises:
        ConfigError: the file can't be imported, or its tools can't be described.
    """

    def __init__(self, reference: str, config: OwnConfig):
        sandbox = confinement.plan(reference, config) if config.isolation == "sandbox" else None
        ours, theirs = socket.socketpair()
        settings = {
            "path": [str(place) for place in sys.path],
            "descriptor": theirs.fileno(),
            "parent": os.getpid(),
            "reference": reference if sandbox is None else sandbox["reference"],
            "sandbox": sandbox,
            "include": list(config.include),
            "memory_mb": config.memory_mb,
        }
        self._control, self._lock = ours, threading.Lock()
        self._children: set[int] = set()
        self._sandboxed = sandbox is not None
        environment = {"PYTHONHASHSEED": "0", **_without_our_keys(config)}  # a set has the same order in every run
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _PROGRAM, json.dumps(settings)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # Ctrl-C is for the trainer
                env=environment if sandbox is None else confinement.ENVIRONMENT,
            )
        try:
            what, seconds = f"agent.tools={reference!r}", max(IMPORT_S, config.timeout)
            self.report = self._first_report(what, seconds)
            if self._sandboxed:
                self.report = self._confined_report(what, seconds)
        except BaseException:
            _kill_group(self._process.pid)  # it may hang in the user's file
            self.close()
            raise

    def _first_report(self, what: str, seconds: float) -> dict[str, Any]:
        try:
            report = wire.receive(self._control, time.monotonic() + seconds)
        except TimeoutError:
            raise ConfigError(
                f"{what}: its import took longer than {seconds:g} s; what it waits for belongs into the constructor or"
                " into the tools"
            ) from None
        except (EOFError, OSError, ValueError):
            self._wait(_EXIT_S)
            how = described_exit(self._process.returncode)
            raise ConfigError(f"{what}: the process that imports it ended{how}; import it by hand to see why") from None
        if "error" in report:
            raise ConfigError(report["error"])
        return report

    def _confined_report(self, what: str, seconds: float) -> dict[str, Any]:
        """What a rollout's process finds: the importing process itself never runs the user's file."""
        try:
            child = self.fork()
            try:
                answer = child.ask({"do": "report"}, seconds)
            finally:
                child.end()
        except (Lost, ImporterLost) as error:
            raise ConfigError(f"{what}: its import in the sandbox: {error}") from error
        if "failure" in answer:
            raise ConfigError(f"{what}, in the sandbox: {answer['failure']}")
        report: dict[str, Any] = answer["value"]
        return report

    def fork(self) -> Child:
        """A process for a rollout.

        Raises:
            ImporterLost: no process can be started any more by this one.
            Lost: the system refuses another process.
        """
        answer, descriptors = self._ask({"do": "fork"})
        if "error" in answer:
            raise Lost(f"no process can be started: {answer['error']}")
        pid: int = answer["pid"]
        if len(descriptors) != 2:  # this process has as many files open as it may
            for each in descriptors:
                os.close(each)
            self._end(pid)
            raise Lost("no process can be started: there is no file descriptor left for its connection")
        with self._lock:
            self._children.add(pid)
        return Child(socket.socket(fileno=descriptors[0]), descriptors[1], lambda: self._end(pid))

    def _end(self, pid: int) -> int | None:
        """Kill a rollout's process and all that it started; the exit code, negative for a signal, where it had ended by
        itself.
        """
        with self._lock:
            self._children.discard(pid)
        try:
            status = self._ask({"do": "end", "pid": pid})[0].get("status")
        except ImporterLost:
            if not self._sandboxed:  # whose numbers are those of another namespace, which ends with its first process
                _kill_group(pid)
            return None
        return None if status is None else os.waitstatus_to_exitcode(status)

    def _ask(self, request: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
        with self._lock:
            deadline = time.monotonic() + _CONTROL_S
            try:
                wire.send(self._control, wire.encoded(request), deadline)
                return wire.receive_with_descriptors(self._control, deadline)
            except (OSError, EOFError, ValueError) as error:
                self._control.close()  # what comes later would answer another request
                raise ImporterLost(f"the process that imports the tools is lost ({error})") from error

    def close(self) -> None:
        """End it and every rollout's process; safe to call twice."""
        with self._lock:
            self._control.close()
        self._wait(_LEAVE_S)
        if self._process.poll() is None:
            _kill_group(self._process.pid)
            self._process.wait()
        with self._lock:
            left, self._children = self._children, set()
        for pid in left if not self._sandboxed else ():
            _kill_group(pid)

    def _wait(self, seconds: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)


class Child:
    """The connection to a rollout's process. For one thread at a time."""

    def __init__(self, connection: socket.socket, ended: int, end: Callable[[], int | None]):
        self._connection, self._ended, self._end = connection, ended, end
        self._open = True

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            Lost: there is none; the process is ended then.
        """
        deadline = time.monotonic() + seconds
        try:
            wire.send(self._connection, wire.encoded(request), deadline)
            return wire.receive(self._connection, deadline, self._ended)
        except TimeoutError:
            self.end()
            raise Lost(f"took longer than {seconds:g} s") from None
        except wire.TooLong as error:
            self.end()
            raise Lost(f"its message is too long ({error})") from None
        except ValueError as error:
            self.end()
            raise Lost(f"its process sent no message ({error})") from None
        except (OSError, EOFError):
            raise Lost(self._how_it_ended()) from None
        except BaseException:
            self.end()
            raise

    def _how_it_ended(self) -> str:
        if self._open and wire.has_ended(self._ended, _EXIT_S):
            return f"its process ended{described_exit(self.end())}"
        self.end()
        return "its process closed the connection"

    def end(self) -> int | None:
        """Kill it; safe to call twice. The exit code, where it had ended by itself."""
        if not self._open:
            return None
        self._open = False
        self._connection.close()
        code = self._end()
        os.close(self._ended)
        return code


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def described_exit(code: int | None) -> str:
    """`` (exit code 3)``, `` (signal 9, SIGKILL)``; empty where it isn't known."""
    if code is None:
        return ""
    if code >= 0:
        return f" (exit code {code})"
    try:
        name = f", {signal.Signals(-code).name}"
    except ValueError:
        name = ""
    return f" (signal {-code}{name})"
