"""Reading what the ``bfcl-eval`` package ships: multi-turn entries, ground truth, function documents, method
signatures.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pact_nemo.environments.base import SCHEMA_TYPES, ToolCall, check_schema, json_type
from pact_nemo.environments.calls import parse_call
from pact_nemo.errors import ConfigError, DataError, MissingDependency, ToolCallError
from pact_nemo.runtime import strict_json
from pact_nemo.runtime.quarantine import BadRow, Quarantine

#: the multi-turn categories, which is what the environment has where no setting says otherwise
CATEGORIES = ("multi_turn_base", "multi_turn_miss_func", "multi_turn_miss_param", "multi_turn_long_context")


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


_REMEDY = "reinstall bfcl-eval"


def _read_rows(path: Path, quarantine: Quarantine) -> list[tuple[int, dict[str, Any]]]:
    """(line, object) of a JSONL file."""
    if not path.is_file():
        raise DataError("file is missing; this bfcl-eval version is not supported", file=str(path))
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):  # U+2028 is no line end in JSON
        if line.strip():
            row = quarantine.parse(lambda: _object(line, path, number), line.decode("utf-8", "backslashreplace"))  # noqa: B023 - called at once
            if row is not None:
                rows.append((number, row))
    return rows


def _object(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        row = strict_json.loads(line.decode("utf-8"), unique=True)
    except ValueError as error:  # UnicodeDecodeError is one
        raise DataError(f"not a JSON line: {error}; {_REMEDY}", file=str(path), line=number) from error
    if not isinstance(row, dict):
        raise DataError(f"expected an object, found {type(row).__name__}; {_REMEDY}", file=str(path), line=number)
    return row


def json_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """A parameter schema with BFCL's Python type names (``dict``, ``float`` …) turned into JSON schema types, at every
    depth.
    """
    result = copy.deepcopy(schema)
    kind = result.get("type", "string")
    if not isinstance(kind, str) or json_type(kind) not in SCHEMA_TYPES - {"null"}:
        raise DataError(f"unknown type {kind!r} in a function document; {_REMEDY}")
    kind = json_type(kind)
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
        path = data_dir() / "multi_turn_func_doc" / file_name
        result[class_name] = tuple(_document(row, path, line) for line, row in _read_rows(path, Quarantine()))
    return result


def _document(row: dict[str, Any], path: Path, line: int) -> dict[str, Any]:
    try:
        tool = {"name": row["name"], "description": row["description"], "parameters": json_schema(row["parameters"])}
        check_schema(tool)
    except (DataError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"not a function document: {error!r}; {_REMEDY}", file=str(path), line=line) from error
    return tool


@lru_cache(maxsize=32)
def method_parameters(class_name: str) -> dict[str, tuple[str, ...]]:
    """Argument names of each public method of a backend class, in the order of the Python signature."""
    from bfcl_eval.constants.executable_backend_config import CLASS_FILE_PATH_MAPPING

    backend = getattr(importlib.import_module(CLASS_FILE_PATH_MAPPING[class_name]), class_name)
    methods = inspect.getmembers(backend, inspect.isfunction)
    return {
        name: tuple(inspect.signature(method).parameters)[1:] for name, method in methods if not name.startswith("_")
    }


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


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _check_record(record: dict[str, Any], ground_truth: Any, path: str, line: int) -> None:
    """Raises DataError where a record is not what the code below and BFCL's own checker take for granted."""

    def need(holds: bool, message: str, field: str) -> None:
        if not holds:
            raise DataError(f"{message}; {_REMEDY}", file=path, line=line, field=field)

    identifier, question, classes = record.get("id"), record.get("question"), record.get("involved_classes")
    need(
        isinstance(identifier, str) and re.fullmatch(r"\w+_\w+", identifier) is not None,
        "expected an id such as multi_turn_base_0",
        "id",
    )
    need(isinstance(question, list) and len(question) > 0, "expected a list of user turns", "question")
    assert isinstance(question, list)
    for index, turn in enumerate(question):
        need(
            isinstance(turn, list) and all(map(_is_message, turn)),
            "expected messages with role and content",
            f"question[{index}]",
        )
    known = function_documents()
    need(
        isinstance(classes, list) and all(isinstance(name, str) and name in known for name in classes),
        f"expected names out of {', '.join(known)}",
        "involved_classes",
    )
    config = record.get("initial_config")
    need(
        isinstance(config, dict) and all(isinstance(value, dict) for value in config.values()),
        "expected an object of objects",
        "initial_config",
    )
    missed = record.get("missed_function", {})
    need(
        isinstance(missed, dict)
        and all(re.fullmatch(r"[1-9][0-9]{0,3}|0", turn) is not None for turn in missed)
        and all(map(_is_texts, missed.values())),
        "expected lists of tool names by turn number",
        "missed_function",
    )
    need(
        isinstance(ground_truth, list) and all(map(_is_texts, ground_truth)),
        "expected a list of call texts per turn",
        "ground_truth",
    )
    need(
        len(question) == len(ground_truth), "question and ground truth differ in their number of turns", "ground_truth"
    )


def _entry(record: dict[str, Any], ground_truth: list[list[str]], category: str, path: str, line: int) -> Entry:
    _check_record(record, ground_truth, path, line)
    tools = [tool for name in record["involved_classes"] for tool in function_documents()[name]]
    revealed: dict[int, tuple[dict[str, Any], ...]] = {}
    for turn, names in record.get("missed_function", {}).items():
        absent = sorted(set(names) - {tool["name"] for tool in tools})
        if absent or not 0 < int(turn) < len(record["question"]):
            what = f"holds back {', '.join(absent)}, not offered before" if absent else "tools can't come in that turn"
            raise DataError(f"{what}; {_REMEDY}", file=path, line=line, field=f"missed_function.{turn}")
        revealed[int(turn)] = tuple(tool for tool in tools if tool["name"] in names)
        tools = [tool for tool in tools if tool["name"] not in names]
    parameters = {name: names for cls in record["involved_classes"] for name, names in method_parameters(cls).items()}
    try:
        calls = tuple(tuple(parse_call(text, parameters) for text in turn) for turn in ground_truth)
    except ToolCallError as error:
        raise DataError(f"{error}; {_REMEDY}", file=path, line=line, field="ground_truth") from error
    for turn in calls:
        for call in turn:
            # BFCL evaluates these texts: a name that is no method would be looked up among Python's own,
            # ``open(file=..., mode='w')`` for one
            if call.name not in parameters:
                problem = f"{call.name} is no method of {', '.join(record['involved_classes'])}; {_REMEDY}"
                raise DataError(problem, file=path, line=line, field="ground_truth")
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


def load_category(category: str, quarantine: Quarantine | None = None) -> tuple[Entry, ...]:
    """All entries of a multi-turn category.

    Args:
        category: one of :data:`CATEGORIES`.
        quarantine: takes rows that are not as expected; None: the first one is refused.

    Raises:
        ConfigError: no such category.
        DataError: names file, line and field of a refused row.
        MissingDependency: ``bfcl-eval`` is not installed.
    """
    if category not in CATEGORIES:
        raise ConfigError(f"unknown BFCL category {category!r}; known: {', '.join(CATEGORIES)}")
    entries, bad = _load(data_dir(), category)
    quarantine = quarantine if quarantine is not None else Quarantine()
    for row in bad:
        quarantine.add(row.error, row.raw)
    return entries


@lru_cache(maxsize=len(CATEGORIES))
def _load(folder: Path, category: str) -> tuple[tuple[Entry, ...], tuple[BadRow, ...]]:
    """Entries and bad rows of a category; read once, whoever asks and with whatever policy."""
    file_name = f"BFCL_v4_{category}.json"
    path, found = folder / file_name, Quarantine("quarantine")
    answers: dict[str, Any] = {
        str(row.get("id")): row.get("ground_truth")
        for _, row in _read_rows(folder / "possible_answer" / file_name, found)
    }
    entries: dict[str, Entry] = {}

    def entry(record: dict[str, Any], line: int) -> Entry:
        name = record.get("id")
        if not isinstance(name, str) or name not in answers:
            raise DataError(f"{name!r} has no ground truth; {_REMEDY}", file=str(path), line=line, field="id")
        if name in entries:
            raise DataError(
                f"another row has the id {name!r} already; {_REMEDY}", file=str(path), line=line, field="id"
            )
        return _entry(record, answers[name], category, str(path), line)

    for line, record in _read_rows(path, found):
        made = found.parse(lambda: entry(record, line), record)  # noqa: B023 - called at once
        if made is not None:
            entries[made.id] = made
    return tuple(entries.values()), tuple(found.rows)
