"""Reading what the ``bfcl-eval`` package ships: multi-turn entries, ground truth, function documents, method signatures."""

from __future__ import annotations

import copy
import importlib
import inspect
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pact_nemo.environments.base import ToolCall
from pact_nemo.environments.calls import parse_call
from pact_nemo.errors import ConfigError, DataError, MissingDependency, ToolCallError

CATEGORIES = ("multi_turn_base", "multi_turn_miss_func", "multi_turn_miss_param", "multi_turn_long_context")

_JSON_TYPES = {"dict": "object", "float": "number", "tuple": "array", "list": "array", "any": "string", "bool": "boolean"}
_SCHEMA_TYPES = {"string", "integer", "number", "boolean", "array", "object"}


@lru_cache(maxsize=1)
def data_dir() -> Path:
    """Folder of the package's data files.

    Raises:
        MissingDependency: ``bfcl-eval`` is not installed.
    """
    try:
        package = importlib.import_module("bfcl_eval")
    except ImportError as error:
        raise MissingDependency("BFCL needs the package bfcl-eval: pip install --no-deps bfcl-eval mpmath") from error
    if package.__file__ is None:
        raise MissingDependency("bfcl-eval is installed without its files; reinstall it")
    return Path(package.__file__).parent / "data"


def _read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise DataError("file is missing; this bfcl-eval version is not supported", file=str(path))
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):  # U+2028 is no line end in JSON
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise DataError(f"not a JSON line: {error}", file=str(path), line=number) from error
    return rows


def json_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """A parameter schema with BFCL's Python type names (``dict``, ``float`` …) turned into JSON schema types, at every depth."""
    result = copy.deepcopy(schema)
    kind = _JSON_TYPES.get(result.get("type", "string"), result.get("type", "string"))
    if kind not in _SCHEMA_TYPES:
        raise DataError(f"unknown type {kind!r} in a function document")
    if result.get("type") == "float":
        result["format"] = "float"
    result["type"] = kind
    if "properties" in result:
        result["properties"] = {key: json_schema(value) for key, value in result["properties"].items()}
    if "items" in result:
        result["items"] = json_schema(result["items"])
    return result


@lru_cache(maxsize=1)
def function_documents() -> dict[str, tuple[dict[str, Any], ...]]:
    """Tool schemas ``{"name", "description", "parameters"}`` of each backend class, in the package's order."""
    from bfcl_eval.constants.executable_backend_config import MULTI_TURN_FUNC_DOC_FILE_MAPPING

    result = {}
    for class_name, file_name in MULTI_TURN_FUNC_DOC_FILE_MAPPING.items():
        rows = _read_rows(data_dir() / "multi_turn_func_doc" / file_name)
        result[class_name] = tuple(
            {"name": row["name"], "description": row["description"], "parameters": json_schema(row["parameters"])} for row in rows
        )
    return result


@lru_cache(maxsize=32)
def method_parameters(class_name: str) -> dict[str, tuple[str, ...]]:
    """Argument names of each public method of a backend class, in the order of the Python signature."""
    from bfcl_eval.constants.executable_backend_config import CLASS_FILE_PATH_MAPPING

    backend = getattr(importlib.import_module(CLASS_FILE_PATH_MAPPING[class_name]), class_name)
    methods = inspect.getmembers(backend, inspect.isfunction)
    return {name: tuple(inspect.signature(method).parameters)[1:] for name, method in methods if not name.startswith("_")}


@dataclass(frozen=True)
class Entry:
    """One multi-turn entry with its ground truth.

    Attributes:
        id, category: the benchmark's own; ``number`` is the scenario that the four categories share.
        record: the benchmark's record, handed unchanged to its checker.
        tools: schemas offered in the first turn.
        revealed: schemas revealed at the start of a later user turn, by turn index (``multi_turn_miss_func``).
        ground_truth: the benchmark's call strings per user turn.
        reference_calls: the same, parsed.
    """

    id: str
    category: str
    number: str
    record: dict[str, Any]
    tools: tuple[dict[str, Any], ...]
    revealed: dict[int, tuple[dict[str, Any], ...]]
    ground_truth: tuple[tuple[str, ...], ...]
    reference_calls: tuple[tuple[ToolCall, ...], ...]

    @property
    def classes(self) -> list[str]:
        """Backend classes that the entry involves."""
        return list(self.record["involved_classes"])

    @property
    def long_context(self) -> bool:
        """Whether the backends load their long-context variants."""
        return self.category == "multi_turn_long_context"


def _entry(record: dict[str, Any], ground_truth: list[list[str]], category: str, path: str, line: int) -> Entry:
    if len(record["question"]) != len(ground_truth):
        raise DataError("question and ground truth differ in their number of turns", file=path, line=line, field="ground_truth")
    tools = [tool for name in record["involved_classes"] for tool in function_documents()[name]]
    revealed: dict[int, tuple[dict[str, Any], ...]] = {}
    for turn, names in record.get("missed_function", {}).items():
        revealed[int(turn)] = tuple(tool for tool in tools if tool["name"] in names)
        tools = [tool for tool in tools if tool["name"] not in names]
    parameters = {name: names for cls in record["involved_classes"] for name, names in method_parameters(cls).items()}
    try:
        calls = tuple(tuple(parse_call(text, parameters) for text in turn) for turn in ground_truth)
    except ToolCallError as error:
        raise DataError(str(error), file=path, line=line, field="ground_truth") from error
    return Entry(
        id=record["id"],
        category=category,
        number=record["id"].rsplit("_", 1)[1],
        record=record,
        tools=tuple(tools),
        revealed=revealed,
        ground_truth=tuple(tuple(turn) for turn in ground_truth),
        reference_calls=calls,
    )


@lru_cache(maxsize=len(CATEGORIES))
def load_category(category: str) -> tuple[Entry, ...]:
    """All entries of a multi-turn category.

    Raises:
        ConfigError: no such category.
        DataError: names file, line and field of a row that is not as expected.
        MissingDependency: ``bfcl-eval`` is not installed.
    """
    if category not in CATEGORIES:
        raise ConfigError(f"unknown BFCL category {category!r}; known: {', '.join(CATEGORIES)}")
    file_name = f"BFCL_v4_{category}.json"
    answers = {row["id"]: row["ground_truth"] for row in _read_rows(data_dir() / "possible_answer" / file_name)}
    path = data_dir() / file_name
    entries = []
    for line, record in enumerate(_read_rows(path), start=1):
        if record["id"] not in answers:
            raise DataError(f"{record['id']} has no ground truth", file=str(path), line=line, field="id")
        entries.append(_entry(record, answers[record["id"]], category, str(path), line))
    return tuple(entries)
