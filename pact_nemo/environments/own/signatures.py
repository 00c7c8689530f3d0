"""Plain Python callables as tools: the schema that a model sees, the check of its arguments, and results as text.

Types come from type hints, through pydantic. Words come from the docstring. Imported by the processes that run tools,
so it imports little.
"""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import docstring_parser
from pydantic import ConfigDict, TypeAdapter, ValidationError

from pact_nemo.environments.base import check_schema
from pact_nemo.environments.own.hints import inlined, portable
from pact_nemo.errors import ConfigError
from pact_nemo.runtime import strict_json

_MAX_FAULTS = 5  #: of one call's arguments that are told
_MAX_FAULT_CHARS = 300
_ANY: TypeAdapter[Any] = TypeAdapter(Any, config=ConfigDict(ser_json_inf_nan="constants"))
_NO_HINT = "no type hint, which the model's schema is made of; write e.g. {name}: str"
_VARIABLE = "takes any number of arguments, which no schema can name; give each argument a name and a type hint"


class ArgumentFault(Exception):
    """Arguments that don't fit; the text has a line for each."""


@dataclass(frozen=True)
class _Argument:
    """One argument: its type, and whether it may be left out or be null."""

    adapter: TypeAdapter[Any]
    required: bool
    nullable: bool


@dataclass(frozen=True)
class Signature:
    """What a callable takes.

    Attributes:
        schema: ``{"name", "description", "parameters"}``.
        warnings: what is no mistake and makes a tool worse, e.g. that it has no docstring.
    """

    schema: dict[str, Any]
    warnings: tuple[str, ...]
    _arguments: Mapping[str, _Argument]

    def bind(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """JSON values as what the hints say: 3 is a float, ``"3"`` is no int, ``"2026-01-31"`` is a date.

        Raises:
            ArgumentFault: they don't fit.
        """
        faults: list[str] = []
        values: dict[str, Any] = {}
        for name, given in arguments.items():
            argument = self._arguments.get(name)
            if argument is None:
                known = ", ".join(self._arguments) or "it takes none"
                faults.append(f'unknown argument "{name[:60]}"; arguments: {known}')
            elif given is None and argument.nullable:
                values[name] = None
            else:
                try:
                    values[name] = _validated(argument.adapter, given)
                except ValidationError as error:
                    faults += _told(name, error)
                except (ValueError, RecursionError) as error:
                    faults.append(f'argument "{name}": {error}')
        faults += [
            f'argument "{name}": it is missing'
            for name, one in self._arguments.items()
            if one.required and name not in arguments
        ]
        if faults:
            more = [f"and {len(faults) - _MAX_FAULTS} more"] if len(faults) > _MAX_FAULTS else []
            raise ArgumentFault("\n".join([*(fault[:_MAX_FAULT_CHARS] for fault in faults[:_MAX_FAULTS]), *more]))
        return values


def _validated(adapter: TypeAdapter[Any], given: Any) -> Any:
    """A JSON value as the hint says. 3.0 is an integer, as JSON Schema has it, where 3.0 as it stands doesn't fit."""
    text = json.dumps(given)
    try:
        return adapter.validate_json(text, strict=True)
    except ValidationError:
        whole = json.dumps(_whole(given))
        if whole == text:
            raise
        return adapter.validate_json(whole, strict=True)


def _whole(value: Any) -> Any:
    """A JSON value with its whole numbers written without a point."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    if isinstance(value, list):
        return [_whole(each) for each in value]
    return {key: _whole(each) for key, each in value.items()} if isinstance(value, dict) else value


def _told(name: str, error: ValidationError) -> list[str]:
    """One line a fault, each once."""
    lines = []
    for fault in error.errors(include_url=False, include_context=False, include_input=False):
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in fault["loc"])
        lines.append(f'argument "{name}"{place}: {" ".join(fault["msg"].split())}')
    return list(dict.fromkeys(lines))


def signature(function: Callable[..., Any], name: str, where: str, *, method: bool = False) -> Signature:
    """What a callable takes, as a tool.

    Args:
        name: the tool's.
        where: file and name, e.g. ``shop.py:Shop.lookup``; for messages.
        method: the first argument is the instance or class, and no argument of the tool.

    Raises:
        ConfigError: an argument can't be described to a model; names it and the remedy.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())[int(method) :]
        hints = typing.get_type_hints(function, include_extras=True)
    except Exception as error:  # hints are code
        raise ConfigError(f"{where}: its type hints can't be read: {type(error).__name__}: {error}") from error
    summary, words = _docstring(function)
    arguments, properties = {}, {}
    for parameter in parameters:
        argument, shown = _argument(parameter, hints, where)
        if text := words.get(parameter.name):
            shown = {**shown, "description": text}
        arguments[parameter.name], properties[parameter.name] = argument, shown
    required = [key for key, argument in arguments.items() if argument.required]
    schema = {
        "name": name,
        "description": summary,
        "parameters": {"type": "object", "properties": properties, **({"required": required} if required else {})},
    }
    try:
        check_schema(schema)
        strict_json.check(schema)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error
    warnings = [] if summary else [f"{where} has no docstring; the model sees its name only"]
    warnings += [
        f"{where}: its docstring describes {key!r}, which is no argument" for key in words if key not in arguments
    ]
    return Signature(schema, tuple(warnings), arguments)


def _argument(parameter: inspect.Parameter, hints: Mapping[str, Any], where: str) -> tuple[_Argument, dict[str, Any]]:
    name, here = parameter.name, f"{where}: argument {parameter.name!r}"
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        stars = "*" if parameter.kind is parameter.VAR_POSITIONAL else "**"
        raise ConfigError(f"{where}: {stars}{name} {_VARIABLE}")
    if parameter.kind is parameter.POSITIONAL_ONLY:
        raise ConfigError(f"{here} is positional-only, and calls give names; leave the / out")
    if name not in hints:
        raise ConfigError(f"{here} has {_NO_HINT.format(name=name)}")
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(portable(hints[name]))
        shown = inlined(adapter.json_schema())
    except Exception as error:  # a type may say of itself what its schema is
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"{here} has a type that JSON has no form for, {_readable(hints[name])} ({reason}); take str, int, float,"
            " bool, list, dict, Literal, an Enum, a date, a dataclass, a TypedDict or a pydantic model"
        ) from error
    required = parameter.default is parameter.empty
    if not required and parameter.default is not None:
        try:
            shown = {**shown, "default": as_json(parameter.default)}
        except ValueError:
            pass  # it has no JSON form, and works all the same
    nullable = parameter.default is None
    return _Argument(adapter, required, nullable), _without_null(shown) if nullable else shown


def _without_null(shown: dict[str, Any]) -> dict[str, Any]:
    """The schema of what an argument is where it is given: null is its absence."""
    return inlined({"properties": {"it": {**shown, "default": None}}})["properties"]["it"]


def _readable(hint: Any) -> str:
    return hint.__qualname__ if isinstance(hint, type) else str(hint)


def _docstring(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """The words before the sections, and those of each argument, in Google's, NumPy's or Sphinx's style."""
    text = inspect.getdoc(function) or ""
    try:
        parsed = docstring_parser.parse(text)
    except docstring_parser.ParseError:
        return text.strip(), {}
    parts = [" ".join(part.split()) for part in (parsed.short_description or "").split("\n\n")]
    parts += [(parsed.long_description or "").strip()]
    words = {one.arg_name.lstrip("*"): " ".join((one.description or "").split()) for one in parsed.params}
    return "\n\n".join(part for part in parts if part), words


def as_json(value: Any) -> Any:
    """A value as JSON has it: dataclasses, models, enums, dates and the like are converted. A set is a sorted list.

    Raises:
        ValueError: it has no JSON form.
    """
    try:
        plain = _sorted_sets(_ANY.dump_python(value))  # first, so that sets in dataclasses and models are seen
        found = _ANY.dump_python(plain, mode="json", fallback=_array)
        strict_json.check(found)
    except (ValueError, RecursionError) as error:
        raise ValueError(str(error).splitlines()[0] if str(error) else type(error).__name__) from error
    return found


def _sorted_sets(value: Any) -> Any:
    """Two equal sets may hold their elements in another order."""
    if isinstance(value, set | frozenset):
        return sorted(map(_sorted_sets, value), key=repr)
    if isinstance(value, dict):
        return {key: _sorted_sets(item) for key, item in value.items()}
    return [_sorted_sets(item) for item in value] if isinstance(value, list | tuple) else value


def as_text(value: Any) -> str:
    """What a tool returned as the model sees it: a text as it is, everything else as JSON, a set as a sorted list. What
    JSON doesn't know is there by ``str``.
    """
    if type(value) is str:
        return value
    try:
        found = _ANY.dump_python(_sorted_sets(value), mode="json", fallback=lambda item: _array(item, str))
        return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)
    except (ValueError, RecursionError):
        return str(value)


def _array(item: Any, otherwise: Callable[[Any], Any] | None = None) -> Any:
    """Arrays and scalars of NumPy and its like as lists and numbers."""
    if callable(getattr(item, "tolist", None)):
        return item.tolist()
    if otherwise is None:
        raise ValueError(f"{type(item).__name__} has no JSON form")
    return otherwise(item)
