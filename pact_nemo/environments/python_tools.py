"""What FTRL and ToolHop share: tools given as Python source, run in the sandbox."""

from __future__ import annotations

import ast
import re
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pact_nemo.environments.base import ToolCall, check_schema, json_type
from pact_nemo.environments.calls import is_plain
from pact_nemo.environments.rows import Row
from pact_nemo.runtime import strict_json
from pact_nemo.sandbox import CallResult, Sandbox

_PARAMETERS = ("parameters", "input_schema", "inputSchema")
_NO_PARAMETERS = ("arguments", "args", "params", "properties", "inputs", "input", "schema")
#: of a published description, beside what :func:`tool_schema` reads: nothing of the arguments is lost without them
_HARMLESS = frozenset(
    "type strict title annotations returns return response responses result results output outputSchema output_schema"
    " examples input_examples cache_control defer_loading allowed_callers execution icons meta _meta id url version"
    " tags category deprecated".split()
)
_SCHEMA_WORDS = frozenset(
    "$defs definitions patternProperties additionalProperties propertyNames dependentSchemas not if then else".split()
)
_COUNTS = frozenset({"minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"})
_VALUES = frozenset(
    {"default", "const", "enum", "examples", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
)


def tool_schema(function: Any, *, names: bool = True) -> dict[str, Any]:
    """A published function description as ``{"name", "description", "parameters"}``.

    Taken off or undone: the OpenAI wrapper ``{"type", "function"}``, descriptions and parameters that are JSON strings,
    null for what is absent (``description: null``, ``parameters: null``, properties and keywords of other tools), whole
    numbers that a table made floats, BFCL's and Gemini's names of types (``dict``, ``OBJECT``), and the names that
    Anthropic and MCP have for parameters (``input_schema``, ``inputSchema``).

    Args:
        names: see :func:`~pact_nemo.environments.base.check_schema`.

    Raises:
        ValueError: it is none; says why, and of which tool and property.
    """
    function = _object(function, "a tool")
    inner = function if function.get("function") is None else _object(function["function"], "the function of a tool")
    if inner is not function:
        _refuse_unknown(function, inner, ("function",), "beside its 'function'")
    _refuse_unknown(
        inner, inner, ("name", "description", "function", *_PARAMETERS, *_NO_PARAMETERS), "in its description"
    )
    parameters = _parameters(inner)
    description = inner.get("description")
    schema = {
        "name": inner.get("name"),
        "description": "" if description is None else str(description),
        "parameters": _tidy(parameters),
    }
    check_schema(schema, names=names)
    return schema


def _refuse_unknown(part: dict[str, Any], function: dict[str, Any], known: Iterable[str], where: str) -> None:
    """Raises ValueError for a key that may say something of the arguments, and for another type of tool."""
    name = f"the tool {function.get('name', part.get('name'))!r}"
    kind = part.get("type")
    if kind not in (None, "function") and not (kind == "custom" and "input_schema" in part):
        raise ValueError(f"{name} is of type {kind!r}; only functions can be offered, as 'type': 'function'")
    told = [key for key, value in part.items() if value is not None and value not in ("", [], {})]
    odd = next((key for key in told if key not in known and key not in _HARMLESS), None)
    if odd is not None:
        raise ValueError(
            f"{name} has the unknown key {odd!r} {where}: a function is its name, description and parameters (a JSON"
            " schema of an object); rename it or take it out"
        )


def _parameters(function: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of a function's arguments; one without arguments where there is none."""
    what = f"the parameters of {function.get('name')!r}"
    given = {key: _object(function[key], what) for key in _PARAMETERS if function.get(key)}
    parameters = next(iter(given.values()), None)
    if any(other != parameters for other in given.values()):
        raise ValueError(f"{' and '.join(given)} of {function.get('name')!r} differ")
    odd = next((key for key in _NO_PARAMETERS if function.get(key)), None)
    if odd is not None:
        raise ValueError(
            f"{function.get('name')!r} has {odd!r}{' and no parameters' if parameters is None else ''}; its arguments"
            " are a JSON schema under 'parameters'"
        )
    if parameters is None:
        return {"type": "object", "properties": {}}
    loose = [key for key, value in parameters.items() if isinstance(value, dict) and key not in _SCHEMA_WORDS]
    if parameters.get("type") in ("string", "integer", "number", "boolean", "array") or (
        loose and "properties" not in parameters
    ):
        raise ValueError(
            f"{what} are no JSON schema of an object: expected {{'type': 'object', 'properties': {{...}}}}"
        )
    return parameters


def _object(value: Any, what: str) -> dict[str, Any]:
    """An object, as it is or as a JSON string of it."""
    if isinstance(value, str):
        try:
            value = strict_json.loads(value, unique=True)
        except ValueError as error:
            raise ValueError(f"{what} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{what} has to be an object, not {type(value).__name__}")
    return value


def _tidy(schema: dict[str, Any]) -> dict[str, Any]:
    """A JSON schema without nulls that stand for what is absent (a default or constant may be null), its whole numbers
    as such.
    """
    kind = schema.get("type")
    if isinstance(kind, str | list):
        kind = json_type(kind) if isinstance(kind, str) else [json_type(k) if isinstance(k, str) else k for k in kind]
        schema = {**schema, "type": kind}
    kinds = kind if isinstance(kind, list) else [kind]
    whole = "integer" in kinds and "number" not in kinds
    tidied: dict[str, Any] = {}
    for key, value in schema.items():
        if value is None and key not in ("default", "const"):
            continue
        if key in ("properties", "$defs", "definitions", "patternProperties") and isinstance(value, dict):
            value = {
                name: _tidy(part) if isinstance(part, dict) else part
                for name, part in value.items()
                if part is not None
            }
        elif key in _COUNTS or (whole and key in _VALUES):
            value = [_whole(item) for item in value] if isinstance(value, list) else _whole(value)
        elif key not in _VALUES and isinstance(value, dict):
            value = _tidy(value)
        elif key in ("anyOf", "oneOf", "allOf", "prefixItems") and isinstance(value, list):
            value = [_tidy(part) if isinstance(part, dict) else part for part in value]
        tidied[key] = value
    return tidied


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def as_schema(value: Any, schema: Any) -> Any:
    """An argument's value with whole numbers where its schema has integers: tables make 3.0 of 3."""
    if not isinstance(schema, Mapping):
        return value
    kind = schema.get("type")
    kinds = kind if isinstance(kind, list) else [kind]
    if isinstance(value, list):
        return [as_schema(item, schema.get("items")) for item in value]
    if isinstance(value, dict):
        parts = schema.get("properties") or {}
        return {key: as_schema(item, parts.get(key)) for key, item in value.items()}
    return _whole(value) if "integer" in kinds and "number" not in kinds else value


def tool_schemas(
    row: Row, tools: Iterable[tuple[str, Any]], *, names: bool = True, unique: bool = True
) -> list[dict[str, Any]]:
    """:func:`tool_schema` of each (field, description).

    Args:
        unique: no two tools have one name.

    Raises:
        DataError: one is none, or two have one name; names file, row and field.
    """
    schemas: list[dict[str, Any]] = []
    for where, tool in tools:
        try:
            schema = tool_schema(tool, names=names)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise row.complain(f"not a function description: {error}", where) from error
        name = schema["name"]
        if unique and any(other["name"] == name for other in schemas):
            raise row.complain(f"the tool {name!r} is there twice: a call of it could mean either", where)
        schemas.append(schema)
    return schemas


def python_name(name: str) -> str:
    """The function that stands for a tool in Python source: of the tool's name, or, where Python can't write that, with
    ``_`` for what it can't.
    """
    plain_name = re.sub(r"\W", "_", name)
    return (
        name
        if is_plain(name)
        else f"_{plain_name}"
        if plain_name[:1].isdigit() or not is_plain(plain_name)
        else plain_name
    )


def first_function(source: str) -> str:
    """The name behind the first ``def`` of a source, as ToolHop's evaluation script tells its functions apart; empty
    where there is none.
    """
    return source.partition("def")[2].partition("(")[0].strip()


def defined_functions(source: str) -> list[str]:
    """Names of the functions that a source defines at its top level; empty if it is not Python."""
    try:
        return [node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []


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
                result = CallResult(
                    f"unknown function {call.name!r}. Available: {', '.join(sorted(self._sources))}", "invalid", 0.0
                )
            else:
                result = self._sandbox.call(source, python_name(call.name), call.arguments)
            done = Executed(call, result)
            with self._lock:
                self.executed.append(done)
            observations.append(done.text)
        return observations
