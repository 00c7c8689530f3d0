"""The trainer's side of the sandbox: workers, their deadlines, their replacement."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import logging
import os
import queue
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from pact_nemo.errors import EnvironmentFailure, MissingDependency
from pact_nemo.sandbox import confine
from pact_nemo.sandbox.limits import CallResult, Limits

log = logging.getLogger(__name__)

GRACE_S = 5.0  #: what a worker may take beyond a call's own limit before it counts as lost
START_S = 30.0
FIRST_UID = 1_000_000_000  #: of tool processes where the trainer is root: far above any account
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "HOME": "/tmp",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONHASHSEED": "0",  # a set has the same order in every run
}
_WORKER = Path(__file__).with_name("worker.py")
_numbers = iter(range(1 << 30))


class Worker:
    """One worker process. For one thread at a time."""

    def __init__(self, unconfined: bool):
        self._uid = FIRST_UID + (os.getpid() % 100_000) * 10_000 + next(_numbers) % 10_000
        self._process = subprocess.Popen(
            [sys.executable, "-s", "-P", str(_WORKER)],  # not -I: that would pass over the hash seed
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_ENVIRONMENT,
            bufsize=0,
            start_new_session=True,
        )
        self._send({"unconfined": unconfined, "read_only": [*confine.interpreter_folders(), str(_WORKER.parent)]})
        answer = self._receive(START_S)
        if not answer.get("ready"):
            self.kill()
            raise MissingDependency(
                f"this system can't confine untrusted tools ({answer.get('error', 'the worker did not start')}). Allow"
                " user namespaces (sysctl kernel.unprivileged_userns_clone=1; a container needs --security-opt"
                " seccomp=unconfined or CAP_SYS_ADMIN), or run tools without confinement on purpose:"
                " sandbox.unconfined=true"
            )
        self.seccomp = bool(answer["seccomp"])

    def call(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Raises OSError or EOFError when the worker is lost; kill it then."""
        request["limits"]["uid"] = self._uid
        self._send(request)
        return self._receive(seconds + GRACE_S)

    def _send(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode()
        data = struct.pack(">I", len(data)) + data
        assert self._process.stdin is not None
        view = memoryview(data)
        while view:
            view = view[self._process.stdin.write(view) or 0 :]

    def _receive(self, seconds: float) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        (size,) = struct.unpack(">I", self._read(4, deadline))
        message: dict[str, Any] = json.loads(self._read(size, deadline))
        return message

    def _read(self, size: int, deadline: float) -> bytes:
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        waiting = select.poll()  # not select(): a trainer may well have more than 1024 files open
        waiting.register(fd, select.POLLIN)
        data = b""
        while len(data) < size:
            left = deadline - time.monotonic()
            if left <= 0 or not waiting.poll(left * 1000):
                raise TimeoutError("the worker does not answer")
            part = os.read(fd, size - len(data))
            if not part:
                raise EOFError("the worker is gone")
            data += part
        return data

    def kill(self) -> None:
        """End it and everything in it; safe to call twice."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


class Sandbox:
    """Runs Python tools that nobody vouches for. Thread-safe; a call waits until a worker is free.

    Each worker has a read-only root with the interpreter and system libraries in it, no network, no view of other
    processes, and an empty environment; each call runs in a fork of its own with an empty scratch folder and the limits
    given. What a call does (crash, hang, fork, flood, reach for the network) ends with it.

    Args:
        workers: calls that may run at the same time.
        limits: of every call that brings none of its own.
        unconfined: run without namespaces, with resource limits only. Only for sources you trust as you trust the
            trainer.

    Workers start at :meth:`start`, on entering it as a context manager, or at the first call.
    """

    def __init__(self, workers: int = 2, limits: Limits | None = None, *, unconfined: bool = False):
        self.limits = limits or Limits()
        self._unconfined = unconfined
        self._lock = threading.Lock()
        self._idle: queue.LifoQueue[Worker] = queue.LifoQueue()
        self._all: list[Worker] = []
        self._closed = False
        self.replaced = 0
        if unconfined:
            log.warning("untrusted tools run WITHOUT confinement (sandbox.unconfined=true)")
        self._workers = workers
        self._started = False
        atexit.register(self.close)

    def start(self) -> None:
        """Start the workers now instead of at the first call, e.g. to learn early that this system can't confine.

        Raises:
            MissingDependency: the system can't confine, and ``unconfined`` was not asked for.
        """
        with self._lock:
            if self._started:
                return
            self._started = True
        for _ in range(self._workers):
            self._idle.put(self._start())

    def _start(self) -> Worker:
        worker = Worker(self._unconfined)
        with self._lock:
            self._all.append(worker)
        return worker

    def enforced(self) -> dict[str, bool]:
        """What holds on this machine, by name."""
        confined = not self._unconfined
        fence = confined and bool(self._all) and self._all[0].seccomp
        names = ("network", "files", "environment", "other processes")
        return dict.fromkeys(names, confined) | {
            "time": True,
            "memory": True,
            "process count": True,
            "output": True,
            "system calls (seccomp)": fence,
        }

    def call(self, source: str, function: str, arguments: dict[str, Any], limits: Limits | None = None) -> CallResult:
        """Define ``source`` and call ``function(**arguments)`` in it. Whatever the tool does is in the result.

        Raises:
            EnvironmentFailure: the sandbox is closed, or no worker can be started any more.
        """
        limits = limits or self.limits
        if self._closed:
            raise EnvironmentFailure("the sandbox is closed")
        self.start()
        worker = self._idle.get()
        request = {"source": source, "function": function, "arguments": arguments, "limits": dataclasses.asdict(limits)}
        started = time.perf_counter()
        try:
            answer = worker.call(request, limits.seconds)
        except (OSError, EOFError, ValueError) as error:
            worker.kill()
            self.replaced += 1
            with self._lock:
                self._all.remove(worker)
            try:
                self._idle.put(self._start())
            except (MissingDependency, OSError, EOFError) as fatal:
                raise EnvironmentFailure(f"a sandbox worker was lost and can't be replaced: {fatal}") from fatal
            return CallResult(f"the sandbox worker was lost ({error})", "lost", time.perf_counter() - started)
        except BaseException:
            self._idle.put(worker)
            raise
        self._idle.put(worker)
        text = (
            answer["text"].encode("utf-8", "replace").decode("utf-8")
        )  # a tool may return half a surrogate pair, which is no text
        return CallResult(text, answer["kind"], float(answer["seconds"]))

    def close(self) -> None:
        """Stop all workers; safe to call twice."""
        self._closed = True
        with self._lock:
            for worker in self._all:
                worker.kill()
            self._all.clear()
        atexit.unregister(self.close)

    def __enter__(self) -> Sandbox:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
