"""The worker process: reads one call at a time, runs it in a forked child, answers, and leaves nothing of it behind.

Started as a script by :mod:`pact_nemo.sandbox.pool` with a clean environment. Standard library only. Messages both ways
are a 4-byte big-endian length and JSON. The child has none of the worker's file descriptors but the one that its result
goes into.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import confine  # noqa: E402

sys.path.pop(0)
CONTROL_IN, CONTROL_OUT = 0, 1
RESULT_FD = 3


def _read_exactly(fd: int, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = os.read(fd, size - len(data))
        if not part:
            raise EOFError
        data += part
    return data


def receive(fd: int) -> dict[str, Any]:
    """One message. Raises EOFError when the other side is gone."""
    (size,) = struct.unpack(">I", _read_exactly(fd, 4))
    message: dict[str, Any] = json.loads(_read_exactly(fd, size))
    return message


def send(fd: int, message: dict[str, Any]) -> None:
    data = json.dumps(message).encode()
    data = struct.pack(">I", len(data)) + data
    while data:
        data = data[os.write(fd, data) :]


# -- in the child
# ---------------------------------------------------------------------------------------------------------------------


def as_text(value: object) -> str:
    """What the model gets to see, as FTRL's public code has it: strings as they are, JSON for dictionaries and lists,
    ``str`` for the rest.
    """
    if isinstance(value, dict | list):
        with contextlib.suppress(TypeError, ValueError, RecursionError):
            return json.dumps(value, ensure_ascii=False)
    return str(value)


def call(request: dict[str, Any]) -> tuple[str, str]:
    """Define the tool and call it. Returns (kind, text)."""
    namespace: dict[str, Any] = {"__name__": "tool"}
    try:
        code = compile(request["source"], "<tool>", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return "invalid", f"the tool's source doesn't compile: {error}"
    try:
        exec(code, namespace)
    except Exception as error:  # examples under the definition may fail; the function counts
        if not callable(namespace.get(request["function"])):
            return "invalid", f"the tool's source failed: {type(error).__name__}: {error}"
    function = namespace.get(request["function"])
    if not callable(function):
        return "invalid", f"the source defines no function {request['function']!r}"
    try:
        return "ok", as_text(function(**request["arguments"]))
    except TypeError as error:
        inside = error.__traceback__ is not None and error.__traceback__.tb_next is not None
        return ("raised" if inside else "invalid"), f"{type(error).__name__}: {error}"
    except Exception as error:
        return "raised", f"{type(error).__name__}: {error}"


def child(request: dict[str, Any], result: int, scratch: str | None) -> None:
    """Never returns. ``scratch`` is the folder to work in where there is no confinement."""
    try:
        os.setsid()
        null = os.open("/dev/null", os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.dup2(result, RESULT_FD)
        os.closerange(RESULT_FD + 1, 256)
        if scratch is not None:
            os.chdir(scratch)
        confine.drop(request["limits"], scratch is None)
    except BaseException as error:
        os.write(RESULT_FD, json.dumps(["lost", f"the sandbox could not be set up: {error}"]).encode())
        os._exit(1)
    kind, text = "raised", ""
    try:
        kind, text = call(request)
    except SystemExit as error:
        kind, text = "exited", f"the tool called exit({error.code!r})"
    except MemoryError:
        kind, text = "killed", "the tool used more memory than it may"
    except BaseException as error:
        kind, text = "raised", f"{type(error).__name__}: {str(error)[:500]}"
    try:
        limit = request["limits"]["output_chars"]
        if kind == "ok" and len(text) > 10 * limit:
            kind, text = "output", f"the tool returned {len(text)} characters; the limit is {limit}"
        data = json.dumps([kind, text[:limit]]).encode("utf-8", "replace")
        while data:
            data = data[os.write(RESULT_FD, data) :]
    except BaseException:
        os._exit(1)
    os._exit(0)


# -- in the worker
# --------------------------------------------------------------------------------------------------------------------


def read_result(fd: int, pid: int, deadline: float, most: int) -> tuple[bytes, str]:
    """What the child wrote until it ended, and what cut it short: ``""``, ``time``, ``size`` or ``closed`` (it gave its
    end up and lives on).

    Other processes that hold the pipe open don't count.
    """
    data = b""
    os.set_blocking(fd, False)
    ended = os.pidfd_open(pid)
    try:
        while True:
            left = deadline - time.monotonic()
            ready = select.select([fd, ended], [], [], left)[0] if left > 0 else []
            if not ready:
                return data, "time"
            try:
                part = os.read(fd, 65536)
            except BlockingIOError:
                return data, ""  # it has ended and the pipe is empty
            if not part:
                gone = ended in ready or select.select([ended], [], [], min(left, 0.5))[0]
                return data, "" if gone else "closed"
            data += part
            if len(data) > most:
                return data, "size"
    finally:
        os.close(ended)


def end_children(pid: int, confined: bool) -> int | None:
    """Kill everything the call started. Returns the child's wait status if it had ended by itself."""
    done, status = os.waitpid(pid, os.WNOHANG)
    if confined:
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)  # process 1 reaches every other process of its namespace
    else:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if not done:
        os.waitpid(pid, 0)
    if confined:
        with contextlib.suppress(ChildProcessError):
            while True:
                os.waitpid(-1, 0)
    return status if done else None


def run(request: dict[str, Any], confined: bool) -> dict[str, Any]:
    """Play one call."""
    started = time.monotonic()
    limits = request["limits"]
    scratch = None if confined else tempfile.mkdtemp(prefix="tool-")
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        child(request, writer, scratch)
    os.close(writer)
    data, cut = read_result(reader, pid, started + limits["seconds"], 6 * 10 * int(limits["output_chars"]) + 4096)
    os.close(reader)
    status = end_children(pid, confined)
    seconds = time.monotonic() - started
    if scratch is not None:
        shutil.rmtree(scratch, ignore_errors=True)
    try:
        kind, text = json.loads(data)
        if kind in ("ok", "raised", "invalid", "exited", "killed", "output", "lost") and isinstance(text, str):
            return {"kind": kind, "text": text, "seconds": seconds}
    except (ValueError, TypeError):
        pass
    if cut == "time":
        return {"kind": "timeout", "text": f"the tool was stopped after {limits['seconds']:g} s", "seconds": seconds}
    if cut == "size":
        return {"kind": "output", "text": "the tool wrote far more than a result", "seconds": seconds}
    if status is not None and os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        return {"kind": "killed", "text": f"the tool was ended by {name}", "seconds": seconds}
    return {"kind": "exited", "text": "the tool ended its process without a result", "seconds": seconds}


def main() -> None:
    settings = receive(CONTROL_IN)
    confined = not settings["unconfined"]
    for name in (
        "ast",
        "collections",
        "datetime",
        "decimal",
        "itertools",
        "math",
        "random",
        "re",
        "statistics",
        "string",
    ):
        importlib.import_module(name)  # once here, not in every call
    if confined:
        confine.has_seccomp()
        try:
            confine.enter(settings["read_only"])
        except OSError as error:
            send(CONTROL_OUT, {"ready": False, "error": str(error)})
            return
    send(CONTROL_OUT, {"ready": True, "seccomp": confined and confine.has_seccomp()})
    while True:
        try:
            request = receive(CONTROL_IN)
        except EOFError:
            return
        send(CONTROL_OUT, run(request, confined))


if __name__ == "__main__":
    main()
