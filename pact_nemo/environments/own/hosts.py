"""What runs the user's own tools: the interface between an episode and a Python class, a module or an MCP server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class OpenTools(Protocol):
    """The tools of one episode, with a state of their own. Used by one thread at a time.

    Whatever a tool does wrong is its observation, ``Error: Type: text``. Only what isn't the policy's fault raises
    EnvironmentFailure: a dead process, a timeout, a server that is lost. After one, every further use raises it, too.

    Attributes:
        opening: words for the end of the first user message, as TRL's ``reset()`` returns them; mostly empty.
    """

    opening: str

    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        """Run one call by the tool's own name; its observation."""
        ...

    def state(self) -> Any:
        """The state as a JSON value, where ``"state"`` is in the host's ``offers``."""
        ...

    def score(self, episode: Mapping[str, Any]) -> float:
        """The user's own reward in [0, 1], where ``"score"`` is in the host's ``offers``.

        Args:
            episode: ``task`` (the row), ``messages``, ``calls``, ``answer``; plain JSON values.

        Raises:
            EnvironmentFailure: it raised, or gave no finite number in [0, 1].
        """
        ...

    def close(self) -> None:
        """Release everything; safe to call twice."""
        ...


class ToolHost(Protocol):
    """Where the tools of every episode come from.

    Attributes:
        schemas: the tools by their own names, ``{"name", "description", "parameters"}``, in the order of their
            definition.
        offers: of ``"state"``, ``"score"`` and ``"opening"``, what the tools have; the last: ``reset()`` may say
            something that the request is to end with.
    """

    schemas: list[dict[str, Any]]
    offers: frozenset[str]

    def open(self, task: Mapping[str, Any]) -> OpenTools:
        """Tools for one episode of a task row.

        Raises:
            EnvironmentFailure: they can't be started for this task.
        """
        ...

    def close(self) -> None:
        """Stop whatever runs; safe to call twice."""
        ...
