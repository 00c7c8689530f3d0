"""What an MCP server, and its guard, write to standard error."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from collections import deque
from importlib.metadata import version
from typing import TextIO

NOT_STARTED = 127  #: the guard's status where the program can't be run
_LOG_LINES, _LINE_BYTES = 60, 2_000
_SHOWN_LINES, _SHOWN_CHARS = 8, 1_500
#: the last line of a crash of what was written for version 1: names that are gone, by import or as attributes
_OLD_SDK = re.compile(
    r"""^(?:ImportError|ModuleNotFoundError): .*['"]mcp['".]"""
    r"""|^(?:AttributeError|TypeError): .*(?:Server|FastMCP|\bmcp\b)""",
    re.MULTILINE,
)


class ErrorLog:
    """The last lines of a server's standard error, and what its guard says there."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=_LOG_LINES)
        self._rest = b""
        self.guard: int | None = None
        self.status: int | None = None
        self.ended = asyncio.Event()

    def open(self) -> TextIO:
        """The end for the server to write to."""
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        asyncio.get_running_loop().add_reader(reader, self._read, reader)
        return os.fdopen(writer, "w")

    def _read(self, reader: int) -> None:
        try:
            data = os.read(reader, 1 << 16)
        except BlockingIOError:
            return
        *lines, rest = (self._rest + data).split(b"\n")
        self._rest = rest[-_LINE_BYTES:]
        for line in lines if data else [rest]:
            self._take(line)
        if not data:
            asyncio.get_running_loop().remove_reader(reader)
            os.close(reader)
            self.ended.set()

    def _take(self, line: bytes) -> None:
        said = re.fullmatch(rb"\0(pid|status) (-?\d+)", line)
        if said is None:
            if line.strip():
                self._lines.append(line[:_LINE_BYTES].decode("utf-8", "replace").rstrip())
        elif said[1] == b"pid" and self.guard is None:  # the guard's comes first, before there is a server
            self.guard = int(said[2])
        elif said[1] == b"status":
            self.status = int(said[2])

    @property
    def how(self) -> str:
        """How the process ended, where that is known: `` (exit 1)``."""
        if self.status is None:
            return ""
        with contextlib.suppress(ValueError):
            return f" ({signal.Signals(-self.status).name})" if self.status < 0 else f" (exit {self.status})"
        return f" (signal {-self.status})"

    def words(self) -> str:
        """The last lines for a message; empty where there are none."""
        text = "\n".join(list(self._lines)[-_SHOWN_LINES:])[-_SHOWN_CHARS:]
        return f": {text}" if text else ""

    def hint(self) -> str:
        """What to do about a crash that comes of the version of the package ``mcp``."""
        if not _OLD_SDK.search("\n".join(self._lines)):
            return ""
        return (
            "\nIt seems to be written for version 1 of the Python package mcp, and this environment has"
            f" {version('mcp')}. Give it an environment of its own: python -m venv server; server/bin/pip install"
            " 'mcp<2' PACKAGE, and the whole path of server/bin/PROGRAM in agent.mcp.command"
        )
