"""Names of tools and arguments as the model sees them: one two-way table for a tool set.

JSON formats carry ``[A-Za-z0-9_-]{1,64}`` as tool names, and argument names without white space, quotes and the like.
Python text carries plain identifiers only. What a format can't carry gets a name that it can, everywhere: in prompts,
rollouts and traces. Conversations may have either name, for an endpoint may have refused the tool's own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pact_nemo.environments.base import MAX_NAME_CHARS, ToolCall, name_fault
from pact_nemo.environments.calls import is_plain
from pact_nemo.errors import ConfigError

_JSON_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def json_name(name: str) -> str:
    """A tool's name with ``_`` for what JSON formats can't carry, and at most 64 characters."""
    return name if _JSON_NAME.fullmatch(name) else re.sub(r"[^A-Za-z0-9_-]", "_", name)[:64]


def json_argument(name: str) -> str:
    """An argument's name with ``_`` for what no call can carry: white space, quotes, markup."""
    if name_fault(name, argument=True) is None:
        return name
    kept = "".join(one if name_fault(one, argument=True) is None else "_" for one in name)
    return kept[:MAX_NAME_CHARS]


def python_identifier(name: str) -> str:
    """A name as a plain Python identifier."""
    if is_plain(name):
        return name
    text = re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_") or "_"
    text = f"_{text}" if text[0].isdigit() else text
    return text if is_plain(text) else f"{text}_"


class Aliases:
    """The two-way table of a tool set.

    Attributes:
        schemas: the tools as the model sees them, in the order given.

    Args:
        schemas: the tools by their own names.
        python_names: the tool format writes calls as Python text.

    Raises:
        ConfigError: two tools, or two arguments of a tool, would get the same name; names both.
    """

    def __init__(self, schemas: Sequence[Mapping[str, Any]], python_names: bool):
        self._tools = _shown_names([tool["name"] for tool in schemas], _tool_name(python_names), "the tools")
        self._arguments = {
            tool["name"]: _shown_names(
                list(tool["parameters"].get("properties") or {}),
                python_identifier if python_names else json_argument,
                f"the arguments of {tool['name']!r},",
            )
            for tool in schemas
        }
        self._parameters = {tool["name"]: dict(tool["parameters"]) for tool in schemas}
        self._own = {alias: own for own, alias in self._tools.items()}
        self.schemas = [self._schema(tool) for tool in schemas]

    @property
    def own_names(self) -> set[str]:
        """The tools' own names."""
        return set(self._tools)

    def knows(self, name: str) -> bool:
        """Whether a tool has this name, its own or the one that the model sees."""
        return name in self._tools or name in self._own

    def own_name(self, name: str) -> str:
        """A tool's own name; an unknown one stays."""
        return name if name in self._tools else self._own.get(name, name)

    def by_own_name(self, name: str) -> dict[str, Any]:
        """The schema, as the model sees it, of a tool by its own name."""
        alias = self._tools[name]
        return next(schema for schema in self.schemas if schema["name"] == alias)

    def own_parameters(self, name: str) -> dict[str, Any]:
        """The parameters of a tool, by its own names."""
        return self._parameters[name]

    def shown(self, call: ToolCall) -> ToolCall:
        """A call as the model would write it, whichever of the two names it has. Unknown names stay."""
        call = self.own(call)
        table = self._arguments.get(call.name, {})
        arguments = {table.get(key, key): value for key, value in call.arguments.items()}
        return ToolCall(self._tools.get(call.name, call.name), arguments)

    def own(self, call: ToolCall) -> ToolCall:
        """A call by the tool's own names, whichever of the two names it has. Unknown names stay."""
        name = self.own_name(call.name)
        table = {alias: own for own, alias in self._arguments.get(name, {}).items()}
        return ToolCall(name, {table.get(key, key): value for key, value in call.arguments.items()})

    def shown_text(self, tool: str, text: str) -> str:
        """What a tool says of its arguments, with the quoted names as the model sees them."""
        for own, alias in self._arguments.get(tool, {}).items():
            if own != alias:
                for quote in "'\"":
                    text = text.replace(f"{quote}{own}{quote}", f"{quote}{alias}{quote}")
        return text

    def table(self) -> dict[str, dict[str, Any]]:
        """What differs, own name -> the name that the model sees: ``tools``, and ``arguments`` of each tool. Empty
        where nothing does.
        """
        tools = {own: alias for own, alias in self._tools.items() if own != alias}
        arguments = {
            tool: changed
            for tool, names in self._arguments.items()
            if (changed := {own: alias for own, alias in names.items() if own != alias})
        }
        parts: dict[str, dict[str, Any]] = {"tools": tools, "arguments": arguments}
        return {part: names for part, names in parts.items() if names}

    def _schema(self, tool: Mapping[str, Any]) -> dict[str, Any]:
        names, parameters = self._arguments[tool["name"]], dict(tool["parameters"])
        properties = parameters.get("properties") or {}
        parameters["properties"] = {names[key]: value for key, value in properties.items()}
        if "required" in parameters:
            parameters["required"] = [names.get(key, key) for key in parameters["required"]]
        return {"name": self._tools[tool["name"]], "description": tool.get("description", ""), "parameters": parameters}


def _tool_name(python_names: bool) -> Callable[[str], str]:
    return python_identifier if python_names else json_name


def _shown_names(names: Sequence[str], rename: Callable[[str], str], what: str) -> dict[str, str]:
    table: dict[str, str] = {}
    taken: dict[str, str] = {}
    for name in names:
        alias = rename(name)
        if alias in taken:
            raise ConfigError(
                f"{what} {taken[alias]!r} and {name!r} would both be shown to the model as {alias!r}; rename one of"
                " them (agent.mcp.rename), or leave one out (agent.include, agent.mcp.include)"
            )
        taken[alias], table[name] = name, alias
    return table
