"""Between the trainer and an MCP server: ends the server with everything that it started, and removes its folder.

Started as a script: ``python -I -S mcp_guard.py PARENT BASE FOLDER PROGRAM [ARGUMENT...]``. Standard library only. The
server has this process's standard input and output. This process stays behind it, and leaves when the server ended,
when the trainer says so (SIGUSR2), or when the trainer is gone, however that died. On standard error it says its own
process id, and how the server ended, in lines that begin with a zero byte.

Args:
    PARENT: the trainer's process id.
    BASE: the folder of all servers of the trainer; removed once the trainer is gone.
    FOLDER: the server's own folder in it; removed at the end.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_LOOK_S = 0.5  #: between looks at whether the trainer is still there
_REAP_S = 2.0  #: for killed processes to be gone
_NOT_STARTED = 127
#: what a scheduler sends to every process of a job; this one stays as long as the trainer does
_OF_THE_TRAINER = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_libc = ctypes.CDLL(None)


def main(parent: int, base: str, folder: str, command: list[str]) -> int:
    """Run the server to its end; how it ended, as a shell would say it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, signal.SIGUSR2, *_OF_THE_TRAINER})
    _say(f"pid {os.getpid()}")
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    server = os.fork()
    if server == 0:
        _become(command)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)  # so that the trainer sees it when the server closes its pipes
    os.dup2(nothing, 1)
    status = _watch(server, parent)
    _end_all(server)
    _remove(folder)
    if os.getppid() != parent:
        _remove(base)
    code = 0 if status is None else os.waitstatus_to_exitcode(status)
    if status is not None:
        _say(f"status {code}")
    return code if code >= 0 else 128 - code


def _become(command: list[str]) -> None:
    """Be the server."""
    try:
        os.setpgid(0, 0)
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # the guard has one thread, which is what is meant here
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, set())
        os.execvp(command[0], command)
    except BaseException as error:
        os.write(2, f"can't run {command[0]!r}: {error}\n".encode("utf-8", "replace"))
    finally:
        os._exit(_NOT_STARTED)


def _watch(server: int, parent: int) -> int | None:
    """Wait for the end. The server's status, or None where it is to be ended."""
    while os.getppid() == parent:
        came = signal.sigtimedwait({signal.SIGCHLD, signal.SIGUSR2, *_OF_THE_TRAINER}, _LOOK_S)
        if came is not None and came.si_signo == signal.SIGUSR2:
            return None
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return 0
            if pid == server:
                return status
            if pid == 0:
                break
    return None


def _end_all(server: int) -> None:
    """Kill the server's group, and what comes to this process as an orphan from other groups."""
    deadline = time.monotonic() + _REAP_S
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(server, signal.SIGKILL)
    while time.monotonic() < deadline:
        for child in _children():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(child, signal.SIGKILL)
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.005)
        except ChildProcessError:
            return


def _children() -> list[int]:
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return [int(pid) for pid in file.read().split()]
    except OSError:
        return []


def _remove(folder: str) -> None:
    import shutil  # only here: a start takes half as long without it

    shutil.rmtree(folder, ignore_errors=True)


def _say(words: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"\n\0{words}\n".encode())


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:]))
