"""Standard output and error that can get lost without ending what a process does.

A reader can be gone, a disk full, a descriptor closed, a terminal hung up, and training for days must not depend on who
reads its lines. :func:`guarded_output` puts streams in place of ``sys.stdout`` and ``sys.stderr`` whose writes never
raise. The first loss is told once, on the other stream and to whoever :func:`on_loss` names (the run folder's log).
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_MAY_COME_BACK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  #: somebody may make room: each later line is tried again
_LOG_BYTES = 64 * 2**20  #: a longer log goes on in a new file
_listeners: list[Callable[[str], None]] = []


class GuardedStream:
    """A text stream whose ``write`` and ``flush`` never raise. Everything else is the stream's own.

    Attributes:
        lost: the first error of a write; None while all went well.
        expendable: what is written here is not what the command is for.
    """

    def __init__(self, stream: Any, name: str):
        self._stream, self._name = stream, name
        self.lost: OSError | None = None
        self.expendable = False

    def write(self, text: str) -> int:
        if self._stream is not None:
            try:
                self._stream.write(text)
            except (OSError, ValueError) as error:
                self._lose(error)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if self._stream is not None:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._lose(error)

    def isatty(self) -> bool:
        try:
            return self._stream is not None and bool(self._stream.isatty())
        except (OSError, ValueError):
            return False

    def fileno(self) -> int:
        if self._stream is None:
            raise OSError(errno.EBADF, f"{self._name} is closed")
        return int(self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or self._stream is None:
            raise AttributeError(name)
        return getattr(self._stream, name)

    @property
    def encoding(self) -> str:
        return getattr(self._stream, "encoding", None) or "utf-8"

    def drain(self) -> None:
        """Before the process ends: what still can't be written is dropped, or the interpreter would end with exit code
        120 over it.
        """
        self.flush()
        if self.lost is not None:
            self._drop()

    def _lose(self, error: Exception) -> None:
        first, problem = self.lost is None, error if isinstance(error, OSError) else OSError(errno.EBADF, str(error))
        self.lost = self.lost or problem
        if problem.errno not in _MAY_COME_BACK:
            self._drop()
        if first:
            text = (
                f"{self._name} can't be written ({problem.strerror or problem}); what it would have shown is left out"
            )
            for listener in list(_listeners):
                listener(text)
            if self._name == "standard output" and problem.errno != errno.EPIPE:  # `| head` means it
                with contextlib.suppress(OSError, ValueError):
                    print(text, file=sys.stderr, flush=True)

    def _drop(self) -> None:
        """Lead the descriptor to /dev/null, for the bytes that Python still holds and for whatever else writes to
        it.
        """
        with contextlib.suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            self._stream.flush()


@contextlib.contextmanager
def guarded_output() -> Iterator[None]:
    """``sys.stdout`` and ``sys.stderr`` as :class:`GuardedStream` inside the block. Nested blocks change nothing."""
    if isinstance(sys.stdout, GuardedStream) and isinstance(sys.stderr, GuardedStream):
        yield
        return
    _occupy_descriptors()
    before = sys.stdout, sys.stderr
    out, err = GuardedStream(sys.stdout, "standard output"), GuardedStream(sys.stderr, "standard error")
    sys.stdout, sys.stderr = out, err  # type: ignore[assignment]
    try:
        yield
    finally:
        out.drain()
        err.drain()
        sys.stdout, sys.stderr = before


def _occupy_descriptors() -> None:
    """Closed standard descriptors lead to /dev/null: the next file that is opened would get their number, and
    strangers' lines with it.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            with contextlib.suppress(OSError):
                opened = os.open(os.devnull, os.O_RDWR)
                if opened != number:
                    os.dup2(opened, number)
                    os.close(opened)


@contextlib.contextmanager
def on_loss(listener: Callable[[str], None]) -> Iterator[None]:
    """``listener`` hears of streams that get lost inside the block, and at once of those that are lost already."""
    _listeners.append(listener)
    try:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, GuardedStream) and stream.lost is not None:
                listener(
                    f"{stream._name} can't be written ({stream.lost.strerror or stream.lost}); what it would have shown"
                    " is left out"
                )
        yield
    finally:
        _listeners.remove(listener)


@contextlib.contextmanager
def expendable_output() -> Iterator[None]:
    """The block's result is in files, and a standard output that can't be written is no failure of the command."""
    if isinstance(sys.stdout, GuardedStream):
        sys.stdout.expendable = True
    yield


def command(main: Callable[[], Any]) -> None:
    """Run a command line's ``main`` with guarded output and leave with the exit code that it returns or raises.

    A reader that has seen enough (``| head``) is no failure. Output that a full disk refused is one: exit code 1, with
    the reason on standard error.
    """
    code: Any = 0
    with guarded_output():
        try:
            code = main()
        except SystemExit as end:
            code = end.code
        out = sys.stdout
        out.flush()
        if (
            not code
            and isinstance(out, GuardedStream)
            and out.lost is not None
            and out.lost.errno != errno.EPIPE
            and not out.expendable
        ):
            code = 1  # told on standard error when it happened
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    raise SystemExit(code)


class RunLog:
    """``run.log`` of a run folder: every line that a run shows, with the time of day, also those that no terminal got.
    Never raises.
    """

    def __init__(self, path: Path):
        self.path = path
        self._handle: Any = None

    def write(self, line: str) -> None:
        with contextlib.suppress(
            OSError, ValueError
        ):  # a full disk is met, with its remedy, where something is written that a run needs
            if self._handle is None:
                self._handle = open(self.path, "a", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed by close()
            elif self._handle.tell() > _LOG_BYTES:
                self._handle.close()
                os.replace(self.path, self.path.with_name(self.path.name + ".1"))
                self._handle = open(self.path, "a", encoding="utf-8", errors="replace")  # noqa: SIM115
            self._handle.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
            self._handle.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            if self._handle is not None:
                self._handle.close()
        self._handle = None
