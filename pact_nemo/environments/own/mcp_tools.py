"""The tools of an MCP server as the tools of an agent: each rollout with a server process of its own, or all with one.

Isolation is by process. A session of the protocol separates nothing, and newer versions of it have none.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import itertools
import os
import shutil
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pact_nemo.environments.own.mcp_pool import LoopThread, Pool, Servers, SharedServer
from pact_nemo.environments.own.mcp_server import Late, Lost, Server, Trade, need_package
from pact_nemo.environments.own.mcp_shapes import OfferedTool, as_text, offered_tools
from pact_nemo.environments.own.mcp_templates import LaunchPlan, Rollout
from pact_nemo.environments.own.settings import MCPConfig
from pact_nemo.errors import ConfigError, EnvironmentFailure


class MCPHost:
    """A :class:`~pact_nemo.environments.own.hosts.ToolHost` of an MCP server over stdio. Thread-safe.

    The first server is started at once, to read its tools; it serves the first rollout. Servers of later rollouts are
    started ahead, unless their command, environment or folder needs the task.

    A server gets PATH (with this environment's programs first), HOME and ``agent.mcp.env``, and no other variable of
    the trainer that could hold a secret.

    Args:
        workers: rollouts that may be open at once; no more servers than that run.
        example: a task's row, where ``{task[KEY]}`` stands in the command, env or cwd.

    Raises:
        ConfigError: the server can't be started, has no tools, or the settings name what it doesn't have.
        MissingDependency: the package ``mcp`` is absent.
    """

    def __init__(self, config: MCPConfig, workers: int, example: Mapping[str, Any] | None = None):
        plan = LaunchPlan(config)
        if plan.needs_task and example is None:
            raise ConfigError(
                "agent.mcp: {task[KEY]} stands in its command, env or cwd, and there is no task to read the tools with;"
                " give tasks.path, or take it out"
            )
        need_package()
        self.config, self._process = config, os.getpid()
        self._base = tempfile.mkdtemp(prefix="pact-mcp-")
        trade = Trade(plan.name, config.timeout, self._base, config.shared)
        self._servers: Servers = SharedServer(plan, trade) if config.shared else Pool(plan, trade, workers)
        self._numbers = itertools.count(1)
        self._lock, self._closed = threading.Lock(), False
        self._loop = LoopThread()
        atexit.register(self.close)
        try:
            self.tools = self._first(example)
        except BaseException:
            self.close()
            raise
        self.schemas: list[dict[str, Any]] = [tool.schema for tool in self.tools.values()]
        self.offers: frozenset[str] = frozenset()

    def _first(self, example: Mapping[str, Any] | None) -> dict[str, OfferedTool]:
        try:
            server = self._loop.run(self._servers.first(example))
        except (Lost, EnvironmentFailure, OSError) as error:
            raise ConfigError(f"agent.mcp.command={self.config.command}: {error}") from error
        return offered_tools(self.config, server.tools)

    def open(self, task: Mapping[str, Any]) -> OpenMCP:
        """See :class:`~pact_nemo.environments.own.hosts.ToolHost`. Waits where ``workers`` rollouts are open."""
        what = f"task {task.get('id', '?')!r}"
        try:
            server = self._loop.run(self._servers.take(task))
        except (Lost, EnvironmentFailure, OSError) as error:
            raise EnvironmentFailure(f"{what}: {error}") from error
        return OpenMCP(self, server, self._rollout(server, task), what)

    def _rollout(self, server: Server, task: Mapping[str, Any]) -> Rollout:
        """What hidden arguments may ask for. With a shared server, each rollout has a number and folder of its own."""
        if not self.config.shared:
            return dataclasses.replace(server.rollout, task=task)
        number = next(self._numbers)
        folder = Path(self._base) / f"rollout-{number}"
        if any("workdir" in each.needs for tool in self.tools.values() for each in tool.hidden.values()):
            folder.mkdir()
        return Rollout(number, str(folder), task)

    def ask(self, server: Server, name: str, arguments: Mapping[str, Any]) -> str:
        """The observation of a call by the server's name of a tool. Raises Lost, EnvironmentFailure."""
        from mcp import MCPError

        try:
            return as_text(self._loop.run(server.call(name, arguments)), name)
        except MCPError as error:  # e.g. invalid parameters: the server lives, and has refused this call
            return f"Error: {error}"

    def give_back(self, server: Server, rollout: Rollout) -> None:
        """A rollout has ended."""
        with contextlib.suppress(EnvironmentFailure):  # the host is closed, and has ended it
            self._loop.run(self._servers.give(server))
        if self.config.shared:
            shutil.rmtree(rollout.folder, ignore_errors=True)

    def close(self) -> None:
        """Stop every server, and wait until none is left; safe to call twice."""
        with self._lock:
            if self._closed or os.getpid() != self._process:  # a forked copy has no thread, and none of the servers
                return
            self._closed = True
        atexit.unregister(self.close)
        self._loop.close(self._servers.close())
        shutil.rmtree(self._base, ignore_errors=True)


class OpenMCP:
    """:class:`~pact_nemo.environments.own.hosts.OpenTools` of an MCP server."""

    opening = ""

    def __init__(self, host: MCPHost, server: Server, rollout: Rollout, task: str):
        self._host, self._server, self._rollout, self._task = host, server, rollout, task
        self._failure: str | None = None
        self._ended = False

    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        """See :class:`~pact_nemo.environments.own.hosts.OpenTools`. By the name that the tool is shown by."""
        if self._failure is not None:
            raise EnvironmentFailure(self._failure)
        tool = self._host.tools.get(name)
        if tool is None:
            known = ", ".join(self._host.tools)
            return f'Error: UnknownTool: there is no tool "{name[:60]}"; tools: {known}'
        fault = tool.fault(arguments)
        if fault is not None:
            return f"Error: ValidationError: {fault}"
        what = f"tool {name[:60]!r}"
        try:
            return self._host.ask(self._server, tool.own, tool.complete(arguments, self._rollout))
        except Late as error:
            raise self._failed(f"{what}: {error}; the server is shared and goes on") from error
        except (Lost, EnvironmentFailure) as error:
            raise self._failed(f"{what}: {error}") from error
        except BaseException:
            self._failed(f"{what} was broken off")
            raise

    def state(self) -> Any:
        """An MCP server has none to show."""
        raise EnvironmentFailure(f"{self._task}: an MCP server has no state()")

    def score(self, episode: Mapping[str, Any]) -> float:
        """An MCP server gives no reward."""
        raise EnvironmentFailure(f"{self._task}: an MCP server has no score()")

    def close(self) -> None:
        """See :class:`~pact_nemo.environments.own.hosts.OpenTools`."""
        if self._failure is None:
            self._failure = f"{self._task}: its tools are closed"
        self._end()

    def _failed(self, text: str) -> EnvironmentFailure:
        self._failure = f"{self._task}: {text}"
        self._end()
        return EnvironmentFailure(self._failure)

    def _end(self) -> None:
        if not self._ended:
            self._ended = True
            self._host.give_back(self._server, self._rollout)
