"""How tools are shown to a model, how it writes calls, and how observations come back: one class per format.

A format knows text only; token ids and chat templates are the business of :mod:`pact_nemo.chat.template`.
An assistant message is ``reasoning + separator + calls``; the separator is one newline and is absent without reasoning.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pact_nemo.environments.base import ToolCall
from pact_nemo.environments.calls import call_text, check_call, parse_call_list
from pact_nemo.errors import ConfigError, ToolCallError

SEPARATOR = "\n"
Tools = Sequence[Mapping[str, Any]]

_PYTHON_TYPES = {"string": "str", "integer": "int", "number": "float", "boolean": "bool", "array": "list", "object": "dict", "null": "None"}


@dataclass(frozen=True)
class ParsedTurn:
    """What an assistant message says.

    Attributes:
        reasoning: text before the calls (the whole message when there is none), outer whitespace removed.
        calls: well-formed calls in order.
        errors: one message per malformed call text. With neither calls nor errors the message is a final answer.
    """

    reasoning: str
    calls: list[ToolCall] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


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
        """Call text of one assistant turn; the inverse of :meth:`parse`. ToolCallError for a call that can't be written."""
        ...

    def parse(self, text: str, tools: Tools = ()) -> ParsedTurn:
        """Read an assistant message. Never raises on policy text: what is malformed is listed in ``errors``."""
        ...

    def render_observation(self, observations: Sequence[str]) -> list[dict[str, str]]:
        """Chat messages that carry the observations of one assistant turn."""
        ...


def parameter_names(tools: Tools) -> dict[str, list[str]]:
    """Argument names of each tool in schema order, by tool name."""
    return {tool["name"]: list(tool["parameters"].get("properties", {})) for tool in tools}


def first_sentence(description: str) -> str:
    """The first sentence of a tool's own description, without a preamble about the tool collection that it belongs to."""
    text = description.rpartition("Tool description:")[2].strip()
    match = re.match(r"(.+?[.!?])(?=\s|$)", text, flags=re.DOTALL)
    return " ".join((match.group(1) if match else text).split())


def first_type(schema: Mapping[str, Any]) -> str:
    """JSON schema type of a parameter; of several (``["string", "null"]``) the first that isn't null."""
    kind = schema.get("type", "string")
    kinds = kind if isinstance(kind, list | tuple) else [kind]
    return next((str(item) for item in kinds if item != "null"), "string")


def signature_line(tool: Mapping[str, Any]) -> str:
    """One tool as ``name(a: str, b: bool = False): First sentence.``; required arguments keep schema order."""
    schema = tool["parameters"]
    required = set(schema.get("required", []))
    parts = []
    for key, value in schema.get("properties", {}).items():
        part = f"{key}: {_PYTHON_TYPES.get(first_type(value), 'str')}"
        if key not in required:
            default = value.get("default")
            part += f" = {None if default == 'None' else default!r}"  # some documents write the default None as text
        parts.append(part)
    return f"{tool['name']}({', '.join(parts)}): {first_sentence(tool.get('description', ''))}"


def _json_line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _refuse_constant(token: str) -> Any:
    raise ValueError(f"{token} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _call_from_json(value: Any, arguments_key: str) -> ToolCall:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ToolCallError('a call needs a "name"')
    arguments = value.get(arguments_key, {})
    if not isinstance(arguments, dict):
        raise ToolCallError(f'"{arguments_key}" must be a JSON object')
    call = ToolCall(value["name"], arguments)
    check_call(call)
    return call


def _decode_json(text: str, position: int, arguments_key: str) -> tuple[ToolCall, int]:
    """One JSON call at ``position`` (leading whitespace skipped) and the position after it."""
    while position < len(text) and text[position].isspace():
        position += 1
    try:
        value, end = _DECODER.raw_decode(text, position)
    except (ValueError, RecursionError) as error:
        raise ToolCallError(f"not valid JSON: {getattr(error, 'msg', None) or error}") from None
    return _call_from_json(value, arguments_key), end


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
        head = "Use tools to do what the user asks. To call one, end with a line [name(argument=value)]. When done, answer without a call."
        return f"{head}\nTools:\n{self._list(tools)}"

    def render_new_tools(self, tools: Tools) -> str:
        return f"New tools:\n{self._list(tools)}"

    def render_calls(self, calls: Sequence[ToolCall]) -> str:
        return f"[{', '.join(call_text(call) for call in calls)}]"

    def parse(self, text: str, tools: Tools = ()) -> ParsedTurn:
        match = re.search(r"^[ \t]*\[\s*[A-Za-z_]\w*\s*\(", text, flags=re.MULTILINE)
        if match is None:
            return ParsedTurn(text.strip())
        reasoning = text[: match.start()].strip()
        try:
            return ParsedTurn(reasoning, parse_call_list(text[match.start() :], parameter_names(tools)))
        except ToolCallError as error:
            return ParsedTurn(reasoning, [], [str(error)])

    def render_observation(self, observations: Sequence[str]) -> list[dict[str, str]]:
        return [{"role": "tool", "content": "\n".join(observations)}]


@dataclass(frozen=True)
class Hermes:
    """``<tool_call>\\n{"name": …, "arguments": {…}}\\n</tool_call>`` blocks, as Qwen models write them."""

    name: str = "hermes"
    native: bool = True

    def render_tools(self, tools: Tools) -> str:
        return (
            "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
            f"You are provided with function signatures within <tools></tools> XML tags:\n{self._block(tools)}\n\n"
            "For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n"
            '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
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

    def parse(self, text: str, tools: Tools = ()) -> ParsedTurn:
        opening, closing = "<tool_call>", "</tool_call>"
        start = text.find(opening)
        if start < 0:
            return ParsedTurn(text.strip())
        calls: list[ToolCall] = []
        errors: list[str] = []
        position = start
        while position >= 0:
            position += len(opening)
            try:
                # the JSON decoder, not a search, finds the end: an argument may contain the closing tag
                call, end = _decode_json(text, position, "arguments")
                if not text[end:].lstrip().startswith(closing):
                    raise ToolCallError(f"{closing} is missing after the call")
                calls.append(call)
            except ToolCallError as error:
                errors.append(str(error))
                end = position
            position = text.find(opening, end)
        return ParsedTurn(text[:start].strip(), calls, errors)

    def render_observation(self, observations: Sequence[str]) -> list[dict[str, str]]:
        return [{"role": "tool", "content": text} for text in observations]


@dataclass(frozen=True)
class Llama3Json:
    """``{"name": …, "parameters": {…}}`` objects at the end of the turn, ``; `` between several, as Llama 3 writes them."""

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

    def parse(self, text: str, tools: Tools = ()) -> ParsedTurn:
        match = re.search(r'^\s*(?:<\|python_tag\|>)?\s*\{\s*"name"', text, flags=re.MULTILINE)
        if match is None:
            return ParsedTurn(text.strip())
        calls: list[ToolCall] = []
        position = text.index("{", match.start())
        try:
            while position < len(text):
                call, position = _decode_json(text, position, "parameters")
                calls.append(call)
                rest = text[position:].lstrip("; \t\r\n")
                if rest and not rest.startswith("{"):
                    raise ToolCallError("there is text after the calls")
                position = len(text) - len(rest)
        except ToolCallError as error:
            return ParsedTurn(text[: match.start()].strip(), calls, [str(error)])
        return ParsedTurn(text[: match.start()].strip(), calls)

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
