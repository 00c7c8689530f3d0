"""One MCP server over stdio: its process, its connection, its end. For the event loop that it is started in."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pact_nemo.environments.own.mcp_stderr import NOT_STARTED, ErrorLog
from pact_nemo.environments.own.mcp_templates import Launch, Rollout
from pact_nemo.errors import MissingDependency

if TYPE_CHECKING:  # importing it takes more than a second
    from mcp import Client
    from mcp.types import CallToolResult, Tool

log = logging.getLogger(__name__)

_GUARD = Path(__file__).with_name("mcp_guard.py")
_LEAVE_S = 1.5  #: for a server to leave by itself once its input is closed
_GONE_S = 6.0  #: for a killed one to be gone
_ANSWER_S = 5.0  #: for a shared server to show that it isn't stuck
_MAX_PAGES = 1000


class Lost(Exception):
    """The server can't be used, or didn't answer; not the policy's fault."""


class Late(Lost):
    """A shared server didn't answer one call in time, and answers others."""


@dataclass
class Spoken:
    """What the first server said about the protocol; later ones are asked no more."""

    mode: str = "auto"
    discovered: Any = None

    def learn(self, client: Client) -> None:
        """Keep it."""
        if client.session.initialize_result is not None:
            self.mode = "legacy"
        elif client.session.discover_result is not None:
            self.mode, self.discovered = client.protocol_version, client.session.discover_result


@dataclass(frozen=True)
class Trade:
    """What all servers of a host share.

    Attributes:
        name: for messages.
        seconds: for the start, and for a call.
        base: the folder that theirs are in.
    """

    name: str
    seconds: float
    base: str
    shared: bool = False
    spoken: Spoken = field(default_factory=Spoken)


class Server:
    """A server process and the connection to it.

    Attributes:
        tools: as the server describes them.
        lost: why it can't be used any more; None while it can.
    """

    def __init__(self, trade: Trade, rollout: Rollout, launch: Launch):
        self.rollout, self._trade, self._launch = rollout, trade, launch
        self.tools: list[Tool] = []
        self.lost: str | None = None
        self._log = ErrorLog()
        self._leave, self._ready = asyncio.Event(), asyncio.Event()
        self._fault: BaseException | None = None
        self._noise = 0
        self._client: Client | None = None
        self._actor: asyncio.Task[None] | None = None

    @property
    def alive(self) -> bool:
        """Whether it can be used, as far as is known."""
        return self.lost is None and self._client is not None and not self._log.ended.is_set()

    async def start(self) -> None:
        """Start it and read its tools.

        Raises:
            Lost: it can't be started; nothing is left of it.
        """
        try:
            os.makedirs(self.rollout.folder)
            self._actor = asyncio.create_task(self._live())
            ready = asyncio.create_task(self._ready.wait())
            await asyncio.wait({self._actor, ready}, timeout=self._trade.seconds, return_when=asyncio.FIRST_COMPLETED)
            ready.cancel()
            if not self._ready.is_set():
                late = not self._actor.done()
                if not late:
                    await self._end_known()
                await self.stop(kill=True)
                raise Lost(self._why_not(late))
        except Lost:
            raise
        except BaseException:
            await self.stop(kill=True)
            raise

    def _why_not(self, late: bool) -> str:
        name, log = f"the MCP server {self._trade.name!r}", self._log
        if late:
            noise = ", and what it writes to its standard output is no message of the protocol" if self._noise else ""
            return f"{name} did not answer within agent.mcp.timeout={self._trade.seconds:g} s{noise}{log.words()}"
        if log.status == NOT_STARTED:
            return f"{name} can't be started{log.words()}"
        if log.status is not None:
            return f"{name} ended at start{log.how}{log.words()}{log.hint()}"
        return f"{name} can't be used: {_cause(self._fault)}{log.words()}{log.hint()}"

    async def _live(self) -> None:
        """The connection from start to end: it has to be opened and closed by one task."""
        Client, parameters = _connection(self._launch, self._trade.base, self.rollout.folder)
        spoken = self._trade.spoken
        try:
            async with Client(
                self._streams(parameters),
                mode=spoken.mode,
                prior_discover=spoken.discovered,
                message_handler=self._other,
                cache=None,
            ) as client:
                self.tools = await _all_tools(client)
                spoken.learn(client)
                self._client = client
                self._ready.set()
                await self._leave.wait()
                self._client = None
        except Exception as error:
            self._fault = error
            log.debug("the MCP server %r: %r", self._trade.name, error)

    @contextlib.asynccontextmanager
    async def _streams(self, parameters: Any) -> AsyncIterator[Any]:
        from mcp import stdio_client

        errors = self._log.open()
        with errors:
            async with stdio_client(parameters, errors) as streams:
                errors.close()
                yield streams

    async def _other(self, message: Any) -> None:
        """What came without being asked for: notifications, and lines that are no message."""
        if isinstance(message, Exception):
            self._noise += 1
            if self._noise == 1:
                log.warning(
                    "the MCP server %r writes to its standard output what is no message of the protocol: %s",
                    self._trade.name,
                    " ".join(str(message).split())[:300],
                )

    async def call(self, name: str, arguments: Mapping[str, Any]) -> CallToolResult:
        """The result of a tool.

        Raises:
            MCPError: the server refuses the call.
            Lost: there is no answer, and the server is killed; where it is shared and answers others, it is not.
        """
        from mcp import MCPError

        client, seconds = self._client, self._trade.seconds
        if self.lost is not None or client is None:
            raise Lost(self.lost or f"the MCP server {self._trade.name!r} has ended{self._log.how}")
        try:
            async with asyncio.timeout(seconds):
                return await client.call_tool(name, dict(arguments))
        except TimeoutError:
            text = f"took longer than agent.mcp.timeout={seconds:g} s"
            if self._trade.shared and await self._answers():
                raise Late(text) from None
            raise self._lose(text) from None
        except MCPError as error:
            if str(error) == "Connection closed":  # its code is also what many servers use for errors of their own
                await self._end_known()
                text = f"the MCP server {self._trade.name!r} ended{self._log.how}{self._log.words()}"
                raise self._lose(text) from error
            raise
        except Exception as error:
            raise self._lose(f"the MCP server {self._trade.name!r} gave no valid answer: {_cause(error)}") from error

    async def _answers(self) -> bool:
        client = self._client
        with contextlib.suppress(Exception):
            async with asyncio.timeout(_ANSWER_S):
                if client is not None:
                    await client.list_tools()
                    return True
        return False

    def _lose(self, text: str) -> Lost:
        if self.lost is None:
            self.lost = text
        self.kill()
        return Lost(text)

    async def _end_known(self) -> None:
        """Wait a moment for the guard to say how it ended."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await self._log.ended.wait()

    def kill(self) -> None:
        """Have the guard end it now, with everything that it started."""
        if self._log.guard is not None and not self._log.ended.is_set():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._log.guard, signal.SIGUSR2)

    async def stop(self, kill: bool) -> None:
        """End it, and wait until nothing is left. It may leave by itself first, unless ``kill``. Safe to call twice."""
        self.lost = self.lost or "it was stopped"
        self._leave.set()
        if kill:
            self.kill()
        if self._actor is not None and not self._actor.done():
            await asyncio.wait({self._actor}, timeout=_LEAVE_S)
            self.kill()
            await asyncio.wait({self._actor}, timeout=_GONE_S)
            if not self._actor.done():
                log.warning("the MCP server %r can't be ended", self._trade.name)
                self._actor.cancel()
        shutil.rmtree(self.rollout.folder, ignore_errors=True)  # the guard has mostly done it


def need_package() -> None:
    """Raises MissingDependency where the package ``mcp`` is absent, or is another version."""
    try:
        from mcp import Client  # noqa: F401
    except ImportError as error:
        raise MissingDependency(
            f"agent.mcp needs the Python package mcp, version 2: pip install 'mcp>=2,<3' ({error})"
        ) from error


def _connection(launch: Launch, base: str, folder: str) -> tuple[type[Client], Any]:
    """The client's class, and what it starts: the server behind its guard."""
    from mcp import Client, StdioServerParameters

    logging.getLogger("mcp.client.stdio").setLevel(logging.CRITICAL)  # a traceback for each line that is no message
    guard = ["-I", "-S", str(_GUARD), str(os.getpid()), base, folder]
    return Client, StdioServerParameters(
        command=sys.executable,
        args=[*guard, *launch.command],
        env=launch.env,
        cwd=launch.cwd,
        encoding_error_handler="replace",
    )


async def _all_tools(client: Client) -> list[Tool]:
    """Every page of the list."""
    tools: list[Tool] = []
    cursor: str | None = None
    for _ in range(_MAX_PAGES):
        page = await client.list_tools(cursor=cursor)
        tools += page.tools
        cursor = page.next_cursor
        if not cursor:
            return tools
    raise Lost(f"its list of tools has more than {_MAX_PAGES} pages")


def _cause(error: BaseException | None) -> str:
    """The first failure of a group, in one line."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if error is None:
        return "no reason given"
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]
