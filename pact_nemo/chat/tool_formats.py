"""How tools are shown to a model, how it writes calls, and how observations come back: one class per format.

A format knows text only; token ids and chat templates are the business of :mod:`pact_nemo.chat.template`. The reading
of messages is in :mod:`pact_nemo.chat.parsing`.
An assistant message is ``reasoning + separator + calls``; the separator is one newline and is absent without reasoning.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pact_nemo.chat.json_calls import Tools
from pact_nemo.chat.parsing import ParsedTurn, parse, read_hermes, read_llama3_json, read_pythonic
from pact_nemo.environments.base import ToolCall
from pact_nemo.environments.calls import call_text, check_call, is_plain
from pact_nemo.errors import ConfigError, ToolCallError

SEPARATOR = "\n"

_PYTHON_TYPES = {
    "string": "str",
    "integer": "int",
    "number": "float",
    "boolean": "bool",
    "array": "list",
    "object": "dict",
    "null": "None",
}


class ToolFormat(Protocol):
    """Text conventions of one way to call tools.

    Attributes:
        name: key in :data:`TOOL_FORMATS`.
        native: prefer the chat template's own ``tools=`` rendering, where the template has one.
    """

    @property
    def name(self) -> str: ...

    @property
    def native(self) -> bool: ...

    def render_tools(self, tools: Tools) -> str:
        """System text that explains the format and lists the tools."""
        ...

    def render_new_tools(self, tools: Tools) -> str:
        """Text put before a later user message that reveals further tools."""
        ...

    def render_calls(self, calls: Sequence[ToolCall]) -> str:
        """Call text of one assistant turn; the inverse of :meth:`parse`. ToolCallError for a call that can't be
        written.
        """
        ...

    def parse(self, text: str, tools: Tools = (), in_thought: bool = False) -> ParsedTurn:
        """Read an assistant message. Never raises on policy text: what is malformed is listed in ``errors``.

        Args:
            text: the message as the policy wrote it, thoughts included.
            tools: that are offered. Without them a JSON object counts as a call only where it has a name and arguments.
            in_thought: the generation prompt has opened a thought, so the message begins inside it.
        """
        ...

    def check_tools(self, tools: Tools) -> None:
        """Refuse tools that can't be called in this format.

        Raises:
            ToolCallError: names the tool, the rule and the remedy.
        """
        ...

    def render_observation(self, observations: Sequence[str]) -> list[dict[str, str]]:
        """Chat messages that carry the observations of one assistant turn."""
        ...


def first_sentence(description: str) -> str:
    """The first sentence of a tool's own description, without a preamble about the tool collection that it belongs
    to.
    """
    text = description.rpartition("Tool description:")[2].strip()
    match = re.match(r"(.+?[.!?])(?=\s|$)", text, flags=re.DOTALL)
    return " ".join((match.group(1) if match else text).split())


def first_type(schema: Mapping[str, Any]) -> str:
    """JSON schema type of a parameter; of several (``["string", "null"]``) the first that isn't null."""
    kind = schema.get("type", "string")
    kinds = kind if isinstance(kind, list | tuple) else [kind]
    return next((str(item) for item in kinds if item != "null"), "string")


def python_type(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """A parameter's type as Python writes it. One ``type`` is its short name (``str``, ``list``), whatever it holds; a
    union, a reference or choices without a type are written out: ``int | None``, ``list[int] | str``,
    ``Literal['x', 'y']``.

    Args:
        definitions: what ``$ref`` may name.
    """
    kind = schema.get("type")
    return _PYTHON_TYPES.get(kind, "Any") if isinstance(kind, str) else _whole_type(schema, definitions, ())


def _whole_type(schema: Mapping[str, Any], definitions: Mapping[str, Any], within: tuple[str, ...]) -> str:
    if "$ref" in schema:
        name = str(schema["$ref"]).rpartition("/")[2]
        known = isinstance(definitions.get(name), Mapping) and name not in within
        return _whole_type(definitions[name], definitions, (*within, name)) if known else "Any"
    if choices := schema.get("enum") or ([schema["const"]] if "const" in schema else []):
        return f"Literal[{', '.join(map(repr, choices))}]"
    kind, items = schema.get("type"), schema.get("items")
    parts = schema.get("anyOf") or schema.get("oneOf") or schema.get("allOf") or []
    if isinstance(kind, list | tuple):
        parts = [{**schema, "type": one} for one in kind]
    if isinstance(kind, str):
        inner = _whole_type(items, definitions, within) if kind == "array" and isinstance(items, Mapping) else "Any"
        return f"list[{inner}]" if inner != "Any" else _PYTHON_TYPES.get(kind, "Any")
    shown = dict.fromkeys(_whole_type(part, definitions, within) for part in parts if isinstance(part, Mapping))
    if "allOf" in schema and not isinstance(kind, list | tuple):
        shown = dict.fromkeys([*(one for one in shown if one != "Any")][:1])
    return "Any" if "Any" in shown or not shown else " | ".join(sorted(shown, key=lambda one: one == "None"))


def signature_line(tool: Mapping[str, Any]) -> str:
    """One tool as ``name(a: str, b: bool = False): First sentence.``; required arguments keep schema order."""
    schema = tool["parameters"]
    definitions = {**(schema.get("definitions") or {}), **(schema.get("$defs") or {})}
    required = set(schema.get("required", []))
    parts = []
    for key, value in schema.get("properties", {}).items():
        part = f"{key}: {python_type(value, definitions)}"
        if key not in required:
            default = value.get("default")
            part += f" = {None if default == 'None' else default!r}"  # some documents write the default None as text
        parts.append(part)
    return f"{tool['name']}({', '.join(parts)}): {first_sentence(tool.get('description', ''))}"


def _json_line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


@dataclass(frozen=True)
class Pythonic:
    """``[f(a=1), g(b='x')]`` on its own line, which ends the turn.

    Attributes:
        compact: list the tools as one short signature line each instead of as JSON schemas.
    """

    compact: bool = True
    name: str = "pythonic"
    native: bool = False

    def _list(self, tools: Tools) -> str:
        return "\n".join(signature_line(tool) if self.compact else _json_line(tool) for tool in tools)

    def render_tools(self, tools: Tools) -> str:
        head = (
            "Use tools to do what the user asks. To call one, end with a line [name(argument=value)]. When done, answer"
            " without a call."
        )
        return f"{head}\nTools:\n{self._list(tools)}"

    def render_new_tools(self, tools: Tools) -> str:
        return f"New tools:\n{self._list(tools)}"

    def render_calls(self, calls: Sequence[ToolCall]) -> str:
        return f"[{', '.join(call_text(call) for call in calls)}]"

    def parse(self, text: str, tools: Tools = (), in_thought: bool = False) -> ParsedTurn:
        return parse(text, tools, in_thought, read_pythonic, "a last line [name(argument=value)]")

    def check_tools(self, tools: Tools) -> None:
        for tool in tools:
            for what, name in (
                ("name", tool["name"]),
                *(("argument", key) for key in tool["parameters"].get("properties") or {}),
            ):
                if not is_plain(name):
                    raise ToolCallError(
                        f"the tool {tool['name']!r} can't be called as Python text: its {what} {name!r} is not a plain"
                        " identifier; set model.tool_format=hermes or model.tool_format=llama3_json, which carry any"
                        " name"
                    )

    def render_observation(self, observations: Sequence[str]) -> list[dict[str, str]]:
        return [{"role": "tool", "content": "\n".join(observations)}]


@dataclass(frozen=True)
class Hermes:
    """``<tool_call>\\n{"name": …, "arguments": {…}}\\n</tool_call>`` blocks, as Qwen models write them."""

    name: str = "hermes"
    native: bool = True

    def render_tools(self, tools: Tools) -> str:
        return (
            "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with"
            f" function signatures within <tools></tools> XML tags:\n{self._block(tools)}\n\nFor each function call,"
            " return a json object with function name and arguments within <tool_call></tool_call> XML"
            ' tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
        )

    @staticmethod
    def _block(tools: Tools) -> str:
        lines = "\n".join(_json_line({"type": "function", "function": tool}) for tool in tools)
        return f"<tools>\n{lines}\n</tools>"

    def render_new_tools(self, tools: Tools) -> str:
        return self._block(tools)

    def render_calls(self, calls: Sequence[ToolCall]) -> str:
        for call in calls:
            check_call(call)
        rows = (_json_line({"name": call.name, "arguments": call.arguments}) for call in calls)
        return "\n".join(f"<tool_call>\n{row}\n</tool_call>" for row in rows)

    def parse(self, text: str, tools: Tools = (), in_thought: bool = False) -> ParsedTurn:
        return parse(
            text, tools, in_thought, read_hermes, '<tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>'
        )

    def check_tools(self, tools: Tools) -> None:
        """JSON carries every name that a schema can have."""

    def render_observation(self, observations: Sequence[str]) -> list[dict[str, str]]:
        return [{"role": "tool", "content": text} for text in observations]


@dataclass(frozen=True)
class Llama3Json:
    """``{"name": …, "parameters": {…}}`` objects at the end of the turn, ``; `` between several, as Llama 3 writes
    them.
    """

    name: str = "llama3_json"
    native: bool = True

    def render_tools(self, tools: Tools) -> str:
        return (
            "You have access to the following functions. To call a function, respond with JSON for a function call.\n"
            'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}. '
            f"Do not use variables.\n\n{self._list(tools)}"
        )

    @staticmethod
    def _list(tools: Tools) -> str:
        return "\n".join(_json_line({"type": "function", "function": tool}) for tool in tools)

    def render_new_tools(self, tools: Tools) -> str:
        return self._list(tools)

    def render_calls(self, calls: Sequence[ToolCall]) -> str:
        for call in calls:
            check_call(call)
        return "; ".join(_json_line({"name": call.name, "parameters": call.arguments}) for call in calls)

    def parse(self, text: str, tools: Tools = (), in_thought: bool = False) -> ParsedTurn:
        return parse(text, tools, in_thought, read_llama3_json, 'a line {"name": ..., "parameters": {...}}')

    def check_tools(self, tools: Tools) -> None:
        """JSON carries every name that a schema can have."""

    def render_observation(self, observations: Sequence[str]) -> list[dict[str, str]]:
        return [{"role": "tool", "content": text} for text in observations]


TOOL_FORMATS: dict[str, ToolFormat] = {
    "pythonic": Pythonic(),
    "pythonic_schema": Pythonic(compact=False, name="pythonic_schema"),
    "hermes": Hermes(),
    "llama3_json": Llama3Json(),
}


def tool_format(name: str) -> ToolFormat:
    """The format of that name.

    Raises:
        ConfigError: no such format; the message lists the known ones.
    """
    if name not in TOOL_FORMATS:
        raise ConfigError(f"unknown tool format {name!r}; known: {', '.join(sorted(TOOL_FORMATS))}")
    return TOOL_FORMATS[name]
