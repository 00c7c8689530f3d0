"""Tools of an MCP server as the model sees them, the arguments that it never sees, and results as text."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pact_nemo.environments.own.classes import MAX_CHARS
from pact_nemo.environments.own.mcp_templates import Rollout, Template
from pact_nemo.environments.own.schema_checks import argument_error, validator_of
from pact_nemo.environments.own.settings import MCPConfig
from pact_nemo.environments.python_tools import tool_schema
from pact_nemo.errors import ConfigError, EnvironmentFailure
from pact_nemo.runtime import strict_json

if TYPE_CHECKING:
    from mcp.types import CallToolResult, Tool


class Hidden:
    """The value of an argument that the model never sees. It is JSON, unless the argument may be a text.

    Raises:
        ConfigError: it isn't.
    """

    def __init__(self, name: str, text: str, schema: Any):
        self._where = f"agent.mcp.hidden.{name}"
        self._template = Template(text, self._where)
        kinds = _kinds(schema)
        self._json = bool(kinds) and "string" not in kinds
        self._kinds = " or ".join(sorted(kinds))
        if self._json and not self._template.needs:
            try:
                strict_json.loads(text)
            except ValueError as error:
                raise ConfigError(f"{self._where}={text!r}: has to be {self._kinds}, as JSON: {error}") from error

    @property
    def needs(self) -> frozenset[str]:
        """The placeholders in it."""
        return self._template.needs

    def value(self, rollout: Rollout) -> Any:
        """The value in a rollout. Raises EnvironmentFailure where its task has none."""
        text = self._template.fill(rollout)
        try:
            return strict_json.loads(text) if self._json else text
        except ValueError as error:
            raise EnvironmentFailure(f"{self._where}: {text[:80]!r} has to be {self._kinds}: {error}") from error


def _kinds(schema: Any) -> set[str]:
    """The types that a value may have; empty where any is fine."""
    if not isinstance(schema, Mapping):
        return set()
    given = schema.get("type") or []
    kinds = {given} if isinstance(given, str) else set(given)
    for word in ("anyOf", "oneOf"):
        kinds = kinds.union(*(_kinds(part) for part in schema.get(word) or []))
    return kinds


@dataclass(frozen=True)
class OfferedTool:
    """A tool: the server's name of it, its schema as shown, and what is added to each call."""

    own: str
    schema: dict[str, Any]
    hidden: dict[str, Hidden]
    validator: Any

    def fault(self, arguments: Mapping[str, Any]) -> str | None:
        """What is wrong with the model's arguments; None where nothing is."""
        try:
            strict_json.check(dict(arguments))
        except ValueError as error:
            return str(error)
        worst = argument_error(self.validator, arguments, f"the tool {self.own!r}")
        if worst is None:
            return None
        return f"{worst.place.removeprefix('.')}: {worst.text}" if worst.place else worst.text

    def complete(self, arguments: Mapping[str, Any], rollout: Rollout) -> dict[str, Any]:
        """The arguments with the hidden ones."""
        return {**arguments, **{name: hidden.value(rollout) for name, hidden in self.hidden.items()}}


def offered_tools(config: MCPConfig, tools: list[Tool]) -> dict[str, OfferedTool]:
    """The tools by the names that they are shown by, in the server's order.

    Raises:
        ConfigError: ``include``, ``rename`` or ``hidden`` name what isn't there, two tools have one name, or one can't
            be described to a model.
    """
    there = {tool.name: tool for tool in tools}
    if not there:
        raise ConfigError(f"agent.mcp.command={config.command}: the server has no tools")
    _known("include", config.include, there)
    _known("rename", config.rename, there)
    kept = [tool for name, tool in there.items() if not config.include or name in config.include]
    schemas = [_schema(tool) for tool in kept]
    arguments = {name: None for schema in schemas for name in _properties(schema)}
    _known("hidden", config.hidden, arguments)
    offered: dict[str, OfferedTool] = {}
    for tool, schema in zip(kept, schemas, strict=True):
        name = config.rename.get(tool.name, tool.name)
        if name in offered:
            raise ConfigError(
                f"agent.mcp.rename: {offered[name].own!r} and {tool.name!r} would both be shown as {name!r}"
            )
        offered[name] = _offered(config, schema, name)
    return offered


def _known(key: str, asked: Iterable[str], there: Mapping[str, Any]) -> None:
    for name in asked:
        if name not in there:
            what = "argument of its tools" if key == "hidden" else "tool of the server"
            raise ConfigError(f"agent.mcp.{key}: {name!r} is no {what}; there are: {', '.join(there) or 'none'}")


def _schema(tool: Tool) -> dict[str, Any]:
    try:
        return tool_schema(
            {"name": tool.name, "description": tool.description, "inputSchema": copy.deepcopy(tool.input_schema)},
            names=False,  # the table of names gives it others
        )
    except ValueError as error:
        raise ConfigError(
            f"the MCP server's tool {tool.name!r} can't be described to a model: {error}; leave it out with"
            " agent.mcp.include"
        ) from error


def _properties(schema: Mapping[str, Any]) -> dict[str, Any]:
    properties: dict[str, Any] = schema["parameters"].get("properties") or {}
    return properties


def _offered(config: MCPConfig, schema: dict[str, Any], name: str) -> OfferedTool:
    parameters, properties = schema["parameters"], _properties(schema)
    hidden = {key: Hidden(key, text, properties[key]) for key, text in config.hidden.items() if key in properties}
    if hidden:
        parameters["properties"] = {key: value for key, value in properties.items() if key not in hidden}
        required = [key for key in parameters.pop("required", []) if key not in hidden]
        parameters |= {"required": required} if required else {}
    shown = {**schema, "name": name}
    try:
        tool_schema(shown, names=False)
    except ValueError as error:
        raise ConfigError(f"agent.mcp.rename.{schema['name']}={name!r}: {error}") from error
    return OfferedTool(
        schema["name"], shown, hidden, validator_of(parameters, f"the MCP server's tool {schema['name']!r}")
    )


def as_text(result: CallToolResult, tool: str) -> str:
    """A result as an observation."""
    texts = [_part(part) for part in result.content]
    text = "\n".join(texts)
    if result.structured_content is not None and not any(part.type == "text" for part in result.content):
        text = "\n".join([json.dumps(result.structured_content, ensure_ascii=False), *texts])
    if result.is_error:  # the official server class says the server's own name of the tool, which may not be shown
        text = f"Error: {text.removeprefix(f'Error executing tool {tool}: ')}"
    return text.encode("utf-8", "replace").decode()[:MAX_CHARS]


def _part(part: Any) -> str:
    """Text as it is, the rest by name."""
    if part.type == "text":
        return str(part.text)
    if part.type in ("image", "audio"):
        return f"[{part.type}, {part.mime_type}, {len(part.data) * 3 // 4} bytes: not shown]"
    if part.type == "resource_link":
        return f"[resource {part.name}: {part.uri}]"
    resource: Any = getattr(part, "resource", None)
    if hasattr(resource, "text"):
        return str(resource.text)
    if hasattr(resource, "blob"):
        kind = resource.mime_type or "of an unknown kind"
        return f"[resource {resource.uri}, {kind}, {len(resource.blob) * 3 // 4} bytes: not shown]"
    return f"[{part.type}: not shown]"
