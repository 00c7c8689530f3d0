"""What a tool call may hold, and tool calls as Python call text: reading literals only, writing ``repr`` only.

Nothing here evaluates anything. A call is data: names that Python can't write (``from``, ``content-type``,
``flights.search``) are fine in it (:func:`check_call`). Python call text has a rule of its own (:func:`check_plain`),
and whoever evaluates text takes it from :func:`call_text`.
"""

from __future__ import annotations

import ast
import json
import keyword
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pact_nemo.environments.base import ToolCall, name_fault
from pact_nemo.errors import ToolCallError
from pact_nemo.runtime import strict_json

_MAX_DEPTH = 20
_MAX_CALL_CHARS = 20_000


def is_plain(name: object) -> bool:
    """Whether Python call text can write a tool's or an argument's name."""
    return isinstance(name, str) and name.isascii() and name.isidentifier() and not keyword.iskeyword(name)


def _check_value(value: Any, depth: int = 0) -> None:
    if depth > _MAX_DEPTH:
        raise ToolCallError(f"an argument is nested deeper than {_MAX_DEPTH} levels")
    if value is None or type(value) is bool:
        return
    if type(value) is int:
        if value.bit_length() > strict_json.MAX_BITS:
            raise ToolCallError("a whole number in an argument is longer than any float")
        return
    if type(value) is str:
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            raise ToolCallError("an argument holds half a surrogate pair, which is no text")
        return
    if type(value) is float:
        if not math.isfinite(value):
            raise ToolCallError("an argument is not a finite number")
    elif type(value) is list:
        for item in value:
            _check_value(item, depth + 1)
    elif type(value) is dict:
        for key, item in value.items():
            if type(key) is not str:
                raise ToolCallError("a dictionary key in an argument is not a string")
            _check_value(key, depth)
            _check_value(item, depth + 1)
    else:
        raise ToolCallError(f"an argument of type {type(value).__name__} is not a JSON value")


def check_call(call: ToolCall) -> None:
    """Refuse a call whose names no tool can have (:func:`~pact_nemo.environments.base.name_fault`) or whose values
    aren't finite JSON values.

    Raises:
        ToolCallError: says which part is wrong.
    """
    fault = name_fault(call.name)
    if fault is not None:
        raise ToolCallError(f"the function name {str(call.name)[:60]!r} {fault}")
    for key, value in call.arguments.items():
        fault = name_fault(key, argument=True)
        if fault is not None:
            raise ToolCallError(f"the argument name {str(key)[:60]!r} {fault}")
        _check_value(value)


def check_plain(call: ToolCall) -> None:
    """:func:`check_call`, and the names have to be identifiers: they end up in call text, and that may be evaluated.

    ``__import__('os')`` as an argument *name* must stop here, whatever format it came in.

    Raises:
        ToolCallError: says which part is wrong.
    """
    check_call(call)
    for what, name in (("function name", call.name), *(("argument name", key) for key in call.arguments)):
        if not is_plain(name):
            raise ToolCallError(f"{what} {name[:60]!r} is not a plain identifier")


def call_text(call: ToolCall) -> str:
    """``name(key=repr(value), …)``: the call as Python source with literal arguments only.

    Raises:
        ToolCallError: the call can't be written as a literal call, or is longer than 20,000 characters.
    """
    check_plain(call)
    try:
        text = f"{call.name}({', '.join(f'{key}={value!r}' for key, value in call.arguments.items())})"
    except ValueError as error:  # an int beyond Python's digit limit has no repr
        raise ToolCallError(f"an argument can't be written out: {error}") from None
    if len(text) > _MAX_CALL_CHARS:
        raise ToolCallError(f"the call is {len(text)} characters long; the limit is {_MAX_CALL_CHARS}")
    return text


def shown(call: ToolCall) -> str:
    """A call for people to read: as :func:`call_text`, or as JSON where it can't be written so."""
    try:
        return call_text(call)
    except ToolCallError:
        return json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False, default=repr)


def literal(node: ast.expr, depth: int = 0) -> Any:
    """JSON value of a literal syntax node; tuples become lists.

    Raises:
        ToolCallError: the node is anything but a literal (a name, a call, an operator, an f-string …).
    """
    if depth > _MAX_DEPTH:
        raise ToolCallError(f"an argument is nested deeper than {_MAX_DEPTH} levels")
    if isinstance(node, ast.Constant) and (node.value is None or type(node.value) in (str, bool, int, float)):
        _check_value(node.value)
        return node.value
    if (
        isinstance(node, ast.UnaryOp)
        and isinstance(node.op, ast.USub | ast.UAdd)
        and isinstance(node.operand, ast.Constant)
    ):
        value = literal(node.operand, depth + 1)
        if type(value) in (int, float):
            return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.List | ast.Tuple):
        return [literal(item, depth + 1) for item in node.elts]
    if isinstance(node, ast.Dict):
        result: dict[str, Any] = {}
        for key, item in zip(node.keys, node.values, strict=True):
            if not isinstance(key, ast.Constant) or type(key.value) is not str:
                raise ToolCallError("a dictionary key in an argument is not a string")
            if key.value in result:
                raise ToolCallError(f"the key {key.value[:60]!r} is there twice in one dictionary")
            result[key.value] = literal(item, depth + 1)
        return result
    raise ToolCallError(f"an argument is not a literal value: {type(node).__name__}")


def call_from_node(node: ast.expr, parameters: Mapping[str, Sequence[str]]) -> ToolCall:
    """One call from its syntax node; positional arguments get their names from ``parameters[function name]``.

    Raises:
        ToolCallError: not a plain call of a bare name with literal arguments, or the positional arguments can't be
            named.
    """
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise ToolCallError("expected calls such as name(argument=value)")
    name = node.func.id
    arguments: dict[str, Any] = {}
    if node.args:
        names = parameters.get(name)
        if names is None:
            raise ToolCallError(f"unknown function {name!r}: its positional arguments have no names")
        if len(node.args) > len(names):
            raise ToolCallError(
                f"{name} takes at most {len(names)} arguments, {len(node.args)} were given without a name"
            )
        for key, argument in zip(names, node.args, strict=False):
            arguments[key] = literal(argument)
    for item in node.keywords:
        if item.arg is None:
            raise ToolCallError(f"{name}: ** is not allowed in a call")
        if item.arg in arguments:
            raise ToolCallError(f"{name}: argument {item.arg!r} is given twice")
        arguments[item.arg] = literal(item.value)
    call = ToolCall(name, arguments)
    check_plain(call)
    return call


def _parse_expression(text: str) -> ast.expr:
    if len(text) > _MAX_CALL_CHARS:
        raise ToolCallError(f"the call text is {len(text)} characters long; the limit is {_MAX_CALL_CHARS}")
    text = text.strip()
    if "\r" in text and ("'''" in text or '"""' in text):
        raise ToolCallError("a carriage return in a text of three quotes would be lost: write it as \\r")
    try:
        node = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ToolCallError(f"not valid call syntax: {getattr(error, 'msg', None) or error}") from None
    if not text.isascii():
        _check_letters(node, text)
    return node


def _check_letters(node: ast.expr, text: str) -> None:
    """Refuse names that Python reads as others than were written: it takes ``ａ`` for ``a``."""
    lines = [line.encode() for line in re.split(r"\r\n?|\n", text)]
    for part in ast.walk(node):
        if isinstance(part, ast.Name | ast.keyword):
            name = part.id if isinstance(part, ast.Name) else part.arg
            if name is not None and not lines[part.lineno - 1].startswith(name.encode(), part.col_offset):
                raise ToolCallError(f"the name {name[:60]!r} is written in other letters: use plain ones")


def parse_call(text: str, parameters: Mapping[str, Sequence[str]]) -> ToolCall:
    """Read one call, e.g. ``sort('a.txt')`` with ``parameters={'sort': ['file_name']}``.

    Raises:
        ToolCallError: see :func:`call_from_node`, or the text is no expression.
    """
    return call_from_node(_parse_expression(text), parameters)


def parse_call_list(text: str, parameters: Mapping[str, Sequence[str]]) -> list[ToolCall]:
    """Read ``[f(a=1), g()]``.

    Raises:
        ToolCallError: the text is no list of literal calls; see :func:`call_from_node`.
    """
    return _calls_of(_parse_expression(text), ast.List, parameters)


def parse_calls(text: str, parameters: Mapping[str, Sequence[str]]) -> list[ToolCall]:
    """Read ``[f(a=1), g()]`` or ``(f(a=1), g())``: what is meant as several calls, or as a list of one.

    Raises:
        ToolCallError: the text is no list or tuple of literal calls; see :func:`call_from_node`.
    """
    return _calls_of(_parse_expression(text), ast.List | ast.Tuple, parameters)


def _calls_of(node: ast.expr, kind: Any, parameters: Mapping[str, Sequence[str]]) -> list[ToolCall]:
    if not isinstance(node, kind):
        raise ToolCallError("expected one list of calls: [name(argument=value)]")
    return [call_from_node(item, parameters) for item in node.elts]
