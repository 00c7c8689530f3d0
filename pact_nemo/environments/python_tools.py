"""What FTRL and ToolHop share: tools given as Python source, run in the sandbox."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pact_nemo.environments.base import ToolCall, check_schema
from pact_nemo.sandbox import CallResult, Sandbox


def tool_schema(function: Mapping[str, Any]) -> dict[str, Any]:
    """A published function description as ``{"name", "description", "parameters"}``; the OpenAI wrapper ``{"type", "function"}`` is taken off.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: it is none.
    """
    inner = function.get("function", function)
    parameters = dict(inner.get("parameters") or {"type": "object", "properties": {}})
    schema = {"name": inner["name"], "description": str(inner.get("description", "")), "parameters": parameters}
    check_schema(schema)
    return schema


@dataclass(frozen=True)
class Executed:
    """One executed call and what came of it."""

    call: ToolCall
    result: CallResult

    @property
    def text(self) -> str:
        """The observation."""
        return self.result.text if self.result.ok else f"Error: {self.result.text}"


class PythonTools:
    """The tools of one episode. Sources are untrusted and only ever run in the sandbox."""

    def __init__(self, sandbox: Sandbox, sources: Mapping[str, str]):
        self._sandbox = sandbox
        self._sources = sources
        self._lock = threading.Lock()
        self.executed: list[Executed] = []

    def execute(self, calls: list[ToolCall]) -> list[str]:
        """One observation a call; a failing, hanging or unknown tool is an observation that says so."""
        observations = []
        for call in calls:
            source = self._sources.get(call.name)
            if source is None:
                result = CallResult(f"unknown function {call.name!r}. Available: {', '.join(sorted(self._sources))}", "invalid", 0.0)
            else:
                result = self._sandbox.call(source, call.name, call.arguments)
            done = Executed(call, result)
            with self._lock:
                self.executed.append(done)
            observations.append(done.text)
        return observations
