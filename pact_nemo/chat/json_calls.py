"""Calls written as JSON, read where they are unambiguous: whatever names the keys have, nothing that was written is
dropped.

One place for every format and endpoint that writes calls as JSON. A call is an object with a ``name`` and one object of
arguments. Models drift from the keys of their own format, so all keys of :data:`ARGUMENT_KEYS` are read. Two of them
with different values, a key that no call has, or a key written twice make an error, which the policy sees. The OpenAI
wrapper and arguments as a JSON string are read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from json import JSONDecodeError
from typing import Any

from pact_nemo.chat.thoughts import CLOSING, VisibleText
from pact_nemo.environments.base import ToolCall
from pact_nemo.environments.calls import check_call
from pact_nemo.errors import ToolCallError
from pact_nemo.runtime import strict_json

Tools = Sequence[Mapping[str, Any]]

ARGUMENT_KEYS = ("arguments", "parameters", "args", "params", "kwargs", "input")
_PLAIN_ARGUMENT_KEYS = ("arguments", "parameters")  # what only a call has
_NAME_KEYS = ("name", "function", "tool", "tool_name", "function_name", "action", "recipient_name")
_NAMESPACE = "functions."  # before a tool's name, as GPT models write it
_CALL_LISTS = ("tool_calls", "tool_uses")
_WRAPPERS = ("function", "function_call")
_TYPES = ("function", "function_call", "tool_call", "tool_use")
_IDS = ("id", "call_id", "tool_call_id", "index")
_FENCE = re.compile(r"```[\w-]*[ \t]*\n?")
_SPACE = re.compile(r"\s*")
_Q = "[\"']?"  # keys and names as JSON has them, in Python's quotes, or in none
_CALL_HEAD = re.compile(
    rf"[\[\s]{{0,40}}\{{\s{{0,40}}{_Q}(?:{'|'.join(_NAME_KEYS)}|type|id|function_call|tool_calls|tool_uses|arguments|parameters){_Q}\s{{0,40}}:"
)
_NAMED = re.compile(rf"{_Q}\b(?:{'|'.join(_NAME_KEYS)}){_Q}\s{{0,40}}:\s{{0,40}}{_Q}([^\"'\\\s,}}]{{1,200}})")
_CALL_KEY = re.compile(r"""["'](?:arguments|parameters)["']\s{0,40}:""")
_WINDOW = 4000  # of broken JSON, read to tell a call from data
MAX_BROKEN = 200  #: places of one message that look like JSON and are none
LINE = rf"(?:^|(?<={CLOSING}))[ \t]*"  #: a line's start; what follows a thought begins one
LINE_OF_JSON = LINE + r"(?:```[\w-]*[ \t]*\n[ \t]*)?[\[{]"


def _same(left: Any, right: Any) -> bool:
    """Equality of JSON text, but for the order of keys: ``1`` is neither ``true`` nor ``1.0``."""
    return json.dumps(left, sort_keys=True) == json.dumps(right, sort_keys=True)


def _arguments(value: Any, key: str) -> dict[str, Any] | None:
    """An object of arguments, as it is or as a JSON string of it; None where nothing was written."""
    if isinstance(value, str):
        if not value.strip():
            return None
        try:
            text, (value, end) = value, strict_json.decode_at(value, skip_space(value, 0))
        except ValueError as error:
            raise ToolCallError(
                f'the text of "{key}" is not valid JSON: {getattr(error, "msg", None) or error}'
            ) from None
        if text[end:].strip():
            raise ToolCallError(f'the text of "{key}" is more than one JSON object')
    if value is not None and not isinstance(value, dict):
        raise ToolCallError(f'"{key}" must be a JSON object, not {_kind(value)}')
    return value


def _kind(value: Any) -> str:
    names = {
        str: "a text",
        bool: "a truth value",
        int: "a number",
        float: "a number",
        list: "a list",
        type(None): "null",
        dict: "an object",
    }
    return names.get(type(value), type(value).__name__)


def _required(name: str, tools: Tools) -> list[str]:
    return [key for tool in tools if tool["name"] == name for key in tool["parameters"].get("required") or ()]


def call_from(value: Any, tools: Tools = ()) -> ToolCall:
    """One call from a decoded JSON object.

    Raises:
        ToolCallError: it is none, is ambiguous, or names no arguments where its tool needs some. The text is meant for
            the policy.
    """
    if not isinstance(value, dict):
        raise ToolCallError(f'a call needs a "name": it is an object, not {_kind(value)}')
    rest = dict(value)
    if isinstance(rest.get("function"), dict) and "name" not in rest:
        inner = rest.pop("function")
        _refuse_keys(rest)
        rest = dict(inner)
    name = rest.pop("name", None)
    if not isinstance(name, str) or not name:
        raise ToolCallError('a call needs a "name", which is a text')
    given = {key: _arguments(rest.pop(key), key) for key in ARGUMENT_KEYS if key in rest}
    _refuse_keys(rest)
    written = {key: arguments for key, arguments in given.items() if arguments is not None}
    arguments = next(iter(written.values()), None)
    if any(not _same(arguments, other) for other in written.values()):
        raise ToolCallError(f"a call has one object of arguments; {' and '.join(written)} differ")
    if arguments is None:
        required = _required(name, tools)
        if required:
            raise ToolCallError(f"{name} needs arguments: {', '.join(required)}")
        arguments = {}
    call = ToolCall(name, arguments)
    check_call(call)
    return call


def _refuse_keys(rest: Mapping[str, Any]) -> None:
    """Refuse what is neither a call's own nor an envelope's: dropping it could drop an argument."""
    for key, value in rest.items():
        harmless = (key == "type" and value in _TYPES) or (
            key in _IDS and (value is None or isinstance(value, str | int))
        )
        if not harmless and not (key == "type" and value is None):
            raise ToolCallError(
                f'a call has a "name" and one object of arguments; the key {key[:60]!r} is none of these'
            )


def calls_from(value: Any, tools: Tools = ()) -> list[ToolCall]:
    """The calls of a decoded JSON value: one, a list of them, or ``{"tool_calls": [...]}``.

    Raises:
        ToolCallError: as :func:`call_from`, or the list is empty.
    """
    if isinstance(value, dict) and set(value) == {"tool_calls"}:
        value = value["tool_calls"]
    if isinstance(value, list):
        if not value:
            raise ToolCallError("a list of calls is empty")
        return [call_from(item, tools) for item in value]
    return [call_from(value, tools)]


def _offered(name: str, names: Collection[str]) -> bool:
    return name in names or name.removeprefix(_NAMESPACE) in names


def is_attempt(value: Any, names: Collection[str]) -> bool:
    """Whether a decoded JSON value is meant as a call: it names a known tool, or a name and arguments.
    ``{"name": "Bob", "age": 5}`` is data.

    Args:
        names: of the tools that are offered.
    """
    if isinstance(value, list):
        return any(is_attempt(item, names) for item in value if isinstance(item, dict))
    if not isinstance(value, dict):
        return False
    if isinstance(value.get("tool_calls"), list) or is_attempt(value.get("tool_uses"), names):
        return True
    inner = [value[key] for key in _WRAPPERS if isinstance(value.get(key), dict)]
    if any("name" in wrapped or is_attempt(wrapped, names) for wrapped in inner):
        return True
    said = [value[key] for key in _NAME_KEYS if isinstance(value.get(key), str)]
    if any(_offered(name, names) for name in said) or (
        len(value) == 1 and any(key in names and isinstance(value[key], dict) for key in value)
    ):
        return True
    return bool(said) and (
        any(key in value for key in _PLAIN_ARGUMENT_KEYS)
        or any(isinstance(value.get(key), dict) for key in ARGUMENT_KEYS)
    )


def calls_offered(value: Any, names: Collection[str]) -> bool:
    """Whether a decoded JSON value, wherever it stands, says an offered tool's name together with arguments."""
    if isinstance(value, list):
        return any(calls_offered(item, names) for item in value)
    if not isinstance(value, dict):
        return False
    if any(calls_offered(value.get(key), names) for key in (*_WRAPPERS, *_CALL_LISTS)):
        return True
    return any(isinstance(value.get(key), str) and _offered(value[key], names) for key in _NAME_KEYS) and any(
        key in value for key in ARGUMENT_KEYS
    )


def looks_like_attempt(text: str, position: int, names: Collection[str]) -> bool:
    """:func:`is_attempt` for JSON at ``position`` that can't be read: it begins as a call does and names a known tool,
    or arguments.
    """
    head = text[position : position + _WINDOW]
    if _CALL_HEAD.match(head) is None:
        return False
    return _CALL_KEY.search(head) is not None or any(_offered(match.group(1), names) for match in _NAMED.finditer(head))


def skip_space(text: str, position: int) -> int:
    """The first position from ``position`` on that holds no white space."""
    match = _SPACE.match(text, position)
    assert match is not None
    return match.end()


def skip_fence(text: str, position: int) -> int:
    """Behind white space and the line that opens or closes a code block, where one begins at ``position``."""
    position = skip_space(text, position)
    match = _FENCE.match(text, position)
    return skip_space(text, match.end()) if match is not None else position


def decode(text: str, position: int) -> tuple[Any, int]:
    """The JSON value at ``position`` and the position after it.

    Raises:
        ToolCallError: not JSON as its standard has it, or a key is there twice in one object. Its ``__cause__`` knows
            the place, if anyone does.
    """
    try:
        return strict_json.decode_at(text, position)
    except ValueError as error:
        raise ToolCallError(f"not valid JSON: {getattr(error, 'msg', None) or error}") from error


def parameter_names(tools: Tools) -> dict[str, list[str]]:
    """Argument names of each tool in schema order, by tool name."""
    return {tool["name"]: list(tool["parameters"].get("properties", {})) for tool in tools}


def json_attempt(
    reading: VisibleText, pattern: re.Pattern[str], names: Collection[str]
) -> tuple[int, Any, int | None] | None:
    """The first JSON value at a match of ``pattern`` that is meant as a call: (start of its line, value, end).

    Where it can't be read: (start, what is wrong, None). A match that ends in no bracket is a mark of calls: what
    follows it has to be one.
    """
    broken = 0
    while (match := reading.search(pattern)) is not None:
        marked = match.group()[-1] not in "[{"
        position = skip_fence(reading.text, match.end()) if marked else match.end() - 1
        try:
            value, end = decode(reading.text, position)
        except ToolCallError as error:
            broken += 1
            if marked or broken > MAX_BROKEN or looks_like_attempt(reading.text, position, names):
                return match.start(), str(error), None
            reading.position = after_broken(error, position)
            continue
        if marked or is_attempt(value, names):
            return match.start(), value, end
        reading.position = end
    return None


def after_broken(error: ToolCallError, position: int) -> int:
    """Where to look on behind JSON at ``position`` that can't be read: a value within what the decoder has read before
    it gave up is a part of these data, or breaks at the same place.
    """
    cause = error.__cause__
    return max(cause.pos if isinstance(cause, JSONDecodeError) else 0, position + 1)
