"""Type hints for pydantic, and its JSON schemas for models: no references, no titles, no nulls that mean absence."""

from __future__ import annotations

import functools
import operator
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any

import typing_extensions

_NAMED = ("properties", "patternProperties")  #: their keys are names, and no words of JSON schema
_VALUES = ("default", "const", "enum", "examples", "required")  #: they hold values, and no schemas
_MARKS: tuple[Any, Any] = (typing_extensions.Required, typing_extensions.NotRequired)


def inlined(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema with what ``$ref`` names in its place, without ``title``, and without null where null is only the
    default.

    Raises:
        ValueError: a type holds itself.
    """
    definitions = schema.get("$defs", {})
    found = _inlined({key: value for key, value in schema.items() if key != "$defs"}, definitions, ())
    assert isinstance(found, dict)
    return found


def _inlined(schema: Any, definitions: Mapping[str, Any], within: tuple[str, ...]) -> Any:
    if isinstance(schema, list):
        return [_inlined(item, definitions, within) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        if name in within:
            raise ValueError(f"{name} holds itself, so that its schema has no end")
        rest = {key: value for key, value in schema.items() if key != "$ref"}
        return _inlined({**definitions[name], **rest}, definitions, (*within, name))
    found: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _NAMED:
            found[key] = {name: _inlined(part, definitions, within) for name, part in value.items()}
        elif key in _VALUES:
            found[key] = value
        elif key not in ("title", "discriminator"):
            found[key] = _inlined(value, definitions, within)
    return _without_null(found) if found.get("default", ...) is None else found


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """``Optional[int] = None`` as an integer."""
    rest = {key: value for key, value in schema.items() if key != "default"}
    if None in rest.get("enum", ()):
        rest["enum"] = [value for value in rest["enum"] if value is not None]
    kinds = rest.get("anyOf")
    if not kinds:
        return rest
    kinds = [kind for kind in kinds if kind != {"type": "null"}]
    if len(kinds) == 1:
        rest.pop("anyOf")
        return {**kinds[0], **rest}
    return {**rest, "anyOf": kinds}


def portable(hint: Any) -> Any:
    """A hint with ``typing_extensions.TypedDict`` for ``typing.TypedDict``, which pydantic only takes from Python 3.12
    on.
    """
    if sys.version_info >= (3, 12):
        return hint
    if typing.is_typeddict(hint):
        return _typed_dict(hint) if type(hint).__module__ == "typing" else hint
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is None or origin is typing.Literal:
        return hint
    if origin is typing.Annotated:
        return typing.Annotated[(portable(arguments[0]), *hint.__metadata__)]  # type: ignore[return-value]
    parts = tuple(portable(part) if not isinstance(part, list) else part for part in arguments)
    if parts == arguments:
        return hint
    if origin in (typing.Union, types.UnionType):
        return functools.reduce(operator.or_, parts)
    return origin[parts]


def _typed_dict(hint: Any) -> Any:
    fields = {}
    for name, part in typing_extensions.get_type_hints(hint, include_extras=True).items():
        needed: Any = typing_extensions.get_origin(part)
        if needed in _MARKS:
            part = typing_extensions.get_args(part)[0]
        else:
            needed = _MARKS[0 if name in hint.__required_keys__ else 1]
        fields[name] = needed[portable(part)]
    made: Any = typing_extensions.TypedDict(hint.__name__, fields)  # type: ignore[misc]
    made.__doc__ = hint.__doc__
    return made
