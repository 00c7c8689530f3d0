"""Rows of data: what writers of tables make of Python values is undone, so that every kind of file gives the same
tasks; the rest is named.
"""

from __future__ import annotations

import copy
import json
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from pact_nemo.environments.base import Task, ToolCall
from pact_nemo.environments.ftrl import FTRLEnvironment
from pact_nemo.environments.python_tools import as_schema, python_name
from pact_nemo.environments.rows import Row, as_json, number_text, read_rows
from pact_nemo.environments.toolhop import ToolHopEnvironment
from pact_nemo.errors import DataError
from pact_nemo.runtime.quarantine import Quarantine
from pact_nemo.sandbox import Limits, Sandbox
from tests.workers.question_rows import toolhop_row

BOX = Sandbox(1, Limits())  # starts when it is first called


def row(name: str, argument: str, answer: Any, **changes: Any) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": {argument: {"type": "integer", "description": "a number"}},
        "required": [argument],
    }
    return {
        "messages": [{"role": "user", "content": f"Use {name} for 3."}],
        "tools": [
            {"type": "function", "function": {"name": name, "description": f"Does {name}.", "parameters": parameters}}
        ],
        "codes": {name: f"def {name}({argument}):\n    return {argument}\n"},
        "unsolved_set": {name: [answer]},
        "answer": answer,
        "data_source": "ftrl",
        "split": "train",
        "solve_rate": 0.5,
    } | changes


ROWS = [row("double", "x", 6), row("square", "n", 9), row("half", "y", 1)]


def tasks(path: Path) -> list[Task]:
    return FTRLEnvironment(path, BOX).tasks()


def shown_rows(found: list[Task]) -> list[Any]:
    return [(task.tools, task.data, task.user_turns, task.reference_answer) for task in found]


def saved(path: Path, rows: list[dict[str, Any]], schema: pa.Schema | None = None) -> Path:
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    else:
        path.write_text(json.dumps(rows))
    return path


def with_nulls(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows as a table's JSON export has them: every object has the keys of all rows."""
    table: list[dict[str, Any]] = pa.Table.from_pylist(rows).to_pylist()
    return table


def test_struct_columns_their_json_export_and_json_strings_give_the_same_tasks(tmp_path: Path) -> None:
    wanted = shown_rows(tasks(saved(tmp_path / "a.json", ROWS)))
    assert wanted[0][0][0]["parameters"]["properties"] == {"x": {"type": "integer", "description": "a number"}}
    assert shown_rows(tasks(saved(tmp_path / "a.parquet", ROWS))) == wanted
    (tmp_path / "n").mkdir()
    assert shown_rows(tasks(saved(tmp_path / "n" / "a.json", with_nulls(ROWS)))) == wanted
    texts = [r | {key: json.dumps(r[key]) for key in ("messages", "tools", "codes", "unsolved_set")} for r in ROWS]
    (tmp_path / "s").mkdir()
    assert shown_rows(tasks(saved(tmp_path / "s" / "a.parquet", texts))) == wanted
    parts = copy.deepcopy(ROWS)
    for part in parts:
        function = part["tools"][0]["function"]
        function["parameters"] = json.dumps(function["parameters"])
    (tmp_path / "p").mkdir()
    assert shown_rows(tasks(saved(tmp_path / "p" / "a.parquet", parts))) == wanted


def test_maps_floats_and_gaps_of_a_table_are_undone(tmp_path: Path) -> None:
    wanted = shown_rows(tasks(saved(tmp_path / "a.json", ROWS)))
    table = pa.Table.from_pylist([r | {"answer": float(r["answer"])} for r in ROWS])
    codes = pa.array([list(r["codes"].items()) for r in ROWS], pa.map_(pa.string(), pa.string()))
    unsolved = pa.array(
        [[(k, [float(v[0])]) for k, v in r["unsolved_set"].items()] for r in ROWS],
        pa.map_(pa.string(), pa.list_(pa.float64())),
    )
    table = table.set_column(table.column_names.index("codes"), "codes", codes)
    table = table.set_column(table.column_names.index("unsolved_set"), "unsolved_set", unsolved)
    (tmp_path / "m").mkdir()
    parquet.write_table(table, tmp_path / "m" / "a.parquet")
    assert shown_rows(tasks(tmp_path / "m" / "a.parquet")) == wanted
    gaps = [r | {"data_source": None, "answer": None} for r in ROWS]
    assert [(task.category, task.reference_answer) for task in tasks(saved(tmp_path / "g.json", gaps))] == [
        ("ftrl", None)
    ] * 3


def test_numbers_and_types_of_tables_become_those_of_json() -> None:
    value = {
        "a": np.int64(3),
        "b": np.array([[1.5], [2.0]]),
        "c": (1, np.bool_(True)),
        "d": Decimal("6"),
        "e": Decimal("1.5"),
        "f": [None, "x"],
    }
    assert repr(as_json(value)) == repr(
        {"a": 3, "b": [[1.5], [2.0]], "c": [1, True], "d": 6, "e": 1.5, "f": [None, "x"]}
    )
    assert [number_text(number) for number in (6.0, 6, 1.5, -2.0, 1e300, 0.1)] == [
        "6",
        "6",
        "1.5",
        "-2",
        "1e+300",
        "0.1",
    ]
    read = Row({"t": 6.0, "n": None, "o": {"a": 1, "b": None}}, "x.parquet", 3)
    assert (read.text("t"), read.text("n", "default"), read.mapping("o"), read.json("o", dict)) == (
        "6",
        "default",
        {"a": 1},
        {"a": 1, "b": None},
    )
    with pytest.raises(DataError, match=r"x\.parquet:3: expected text, found nothing.*repair.*\[field n\]"):
        read.text("n")


def test_dates_and_short_floats_of_a_table_become_what_json_has(tmp_path: Path) -> None:
    columns = {
        "day": pa.array([date(2026, 5, 1)]),
        "at": pa.array([datetime(2026, 5, 1, 12, 30)]),
        "hour": pa.array([[time(12, 30)]]),
        "price": pa.array([4.1], pa.float32()),
        "prices": pa.array([{"a": [0.1]}], pa.struct([("a", pa.list_(pa.float32()))])),
        "gap": pa.array([None], pa.float32()),
    }
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    (read,) = read_rows(tmp_path / "a.parquet")
    assert read.values == {
        "day": "2026-05-01",
        "at": "2026-05-01T12:30:00",
        "hour": ["12:30:00"],
        "price": 4.1,
        "prices": {"a": [0.1]},
        "gap": None,
    }
    assert as_json({"a": np.array([4.1], np.float32), "b": np.float16(0.1), "c": np.array(2)}) == {
        "a": [4.1],
        "b": 0.1,
        "c": 2,
    }


@pytest.mark.parametrize("held", [b"\x00", {"a": [b"x"]}])
def test_bytes_of_a_table_are_refused_with_row_and_field(tmp_path: Path, held: Any) -> None:
    parquet.write_table(pa.table({"q": ["a", "b"], "answer": [None, held]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet:2: holds bytes, .* write it as text.*\[field answer\]"):
        read_rows(tmp_path / "a.parquet")
    quarantine = Quarantine("quarantine")
    assert [kept.number for kept in read_rows(tmp_path / "a.parquet", quarantine)] == [1]
    quarantine.write(tmp_path / "bad")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tools": ROWS[0]["tools"] * 2}, r"'double' is there twice.*tools\[1\]"),
        (
            {"tools": [{"name": "double", "parameters": {"properties": ["x"]}}]},
            r"tool 'double': parameters.properties has to be.*not list",
        ),
        ({"tools": [{"name": "double", "parameters": {"properties": {"x": "int"}}}]}, r"tool 'double'.*'x' is str"),
        ({"tools": [{"name": "double", "parameters": "{"}]}, "the parameters of 'double' is not valid JSON"),
        ({"tools": [{"name": "double it"}]}, "tool name 'double it' holds white space"),
        (
            {"tools": [{"name": "double", "parameters": {"properties": {"x); y": {}}}}]},
            r"argument name 'x\); y' holds the character",
        ),
        (
            {"tools": [{"name": "a.b"}], "codes": {"a.b": "def ab(): pass"}},
            "the source of the tool 'a.b' has to define the function a_b",
        ),
        ({"unsolved_set": {"double": [None]}}, "expected text, found nothing"),
        ({"unsolved_set": {"double": [True]}}, "expected text, found true or false"),
        ({"unsolved_set": {"double": []}}, "no sub-question, so doing nothing would solve the task"),
        ({"unsolved_set": {}}, "no sub-question"),
        ({"codes": {"double": None}}, "no source for the tool 'double'"),
        ({"messages": None}, "expected a list, found nothing"),
        ({"messages": [{"role": "user", "content": " "}]}, "needs a user's message with text"),
        ({"unsolved_set": {"double": [" , "]}}, "an answer is empty"),
        ({"unsolved_set": {"triple": ["6"]}}, "the row offers no tool 'triple'"),
    ],
)
def test_a_row_that_stays_wrong_is_refused_by_row_field_and_tool(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = saved(tmp_path / "bad.json", [ROWS[1], ROWS[0] | changes])
    with pytest.raises(DataError, match=rf"(?s)bad\.json:2: .*{message}"):
        FTRLEnvironment(path, BOX).tasks()
    quarantine = Quarantine("quarantine")
    assert len(FTRLEnvironment(path, BOX, quarantine=quarantine).tasks()) == len(quarantine) == 1


@pytest.mark.parametrize("where", ["row", "string", "list"])
def test_a_key_twice_in_a_row_is_refused_by_row(tmp_path: Path, where: str) -> None:
    good, text = json.dumps(ROWS[1]), json.dumps(ROWS[0])
    twice = (
        text[:-1] + ', "answer": "7"}'
        if where != "string"
        else json.dumps(ROWS[0] | {"codes": '{"double": "a", "double": "b"}'})
    )
    path = tmp_path / ("a.json" if where == "list" else "a.jsonl")
    path.write_text(f"[{good},\n{twice}]" if where == "list" else f"{good}\n{twice}\n")
    with pytest.raises(DataError, match=rf"{path.name}:2: .*the key '(answer|double)' is there twice"):
        FTRLEnvironment(path, BOX).tasks()


def test_reference_calls_hold_whole_numbers_where_their_tools_take_integers(tmp_path: Path) -> None:
    calls = [{"name": "double", "parameters": {"x": 3.0}}]
    (task,) = tasks(saved(tmp_path / "a.json", [ROWS[0] | {"ground_truth": calls}]))
    assert repr(task.reference_calls[0][0].arguments) == "{'x': 3}"
    schema = {
        "type": "object",
        "properties": {"n": {"type": "number"}, "l": {"type": "array", "items": {"type": "integer"}}},
    }
    assert (
        repr(as_schema({"n": 3.0, "l": [1.0, 1.5], "other": 2.0}, schema)) == "{'n': 3.0, 'l': [1, 1.5], 'other': 2.0}"
    )


def test_of_two_toolhop_tools_of_one_name_the_last_source_runs_and_the_row_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tool = {"name": "who", "description": "d", "parameters": {"type": "object", "properties": {}}}
    sources = [
        "def who():\n    return 1\n",
        "def who():\n    return 2\n",
        "def other():\n    return who()\ndef who():\n    return 3\n",
    ]
    rows = [
        toolhop_row(id=1, tools={"a": tool, "b": tool | {"description": "e"}}, functions=sources),
        toolhop_row(id=2, tools={"a": tool, "b": tool}, functions=sources[:1] * 2),
        toolhop_row(id=3, tools={"a": tool}, functions=[]),
    ]
    differ, same, none = ToolHopEnvironment(saved(tmp_path / "a.json", rows), BOX).tasks()
    assert (
        differ.data["functions"] == {"who": sources[1]} and len(differ.tools) == 2
    )  # as the benchmark's own script runs them
    assert len(same.tools) == 1 and same.data["tool_of"] == {"a": "who", "b": "who"} and not none.data["functions"]
    assert "2 of 3 rows" in caplog.text and "row 1: more than one tool 'who'" in caplog.text


def test_toolhop_rows_read_from_struct_columns_as_from_json(tmp_path: Path) -> None:
    who = {"Who?": {"name": "who", "description": None, "parameters": None}}
    other = toolhop_row(id=8, tools=who, sub_task={"Who?": "Ann"}, functions=["def who(): return 1"])
    rows = [toolhop_row(), other]
    wanted = shown_rows(ToolHopEnvironment(saved(tmp_path / "a.json", rows), BOX).tasks())
    table = [r | {"tools": json.loads(json.dumps(r["tools"]))} for r in rows]
    assert shown_rows(ToolHopEnvironment(saved(tmp_path / "a.parquet", table), BOX).tasks()) == wanted
    assert wanted[1][0][0] == {"name": "who", "description": "", "parameters": {"type": "object", "properties": {}}}


@pytest.mark.parametrize("answer", [["Ann"], True, {"name": "Ann"}])
def test_a_toolhop_sub_answer_that_is_no_text_is_refused_by_name(tmp_path: Path, answer: Any) -> None:
    path = saved(tmp_path / "rows.json", [toolhop_row(id=7, sub_task={"Who?": answer})])
    with pytest.raises(DataError, match=r"rows\.json:1: expected text, found .*sub_task\.Who\?"):
        ToolHopEnvironment(path, BOX).tasks()


def test_a_map_with_a_key_twice_is_refused(tmp_path: Path) -> None:
    table = pa.table({"m": pa.array([[("a", 1), ("a", 2)]], pa.map_(pa.string(), pa.int64()))})
    parquet.write_table(table, tmp_path / "m.parquet")
    (read,) = read_rows(tmp_path / "m.parquet")
    with pytest.raises(DataError, match="expected an object, found a list"):
        read.mapping("m")


def test_a_tool_with_a_name_that_python_cannot_write_runs_under_one_that_it_can(tmp_path: Path) -> None:
    source = "def flights_search_v2(**given):\n    return sorted(given)\n"
    schema = {
        "name": "flights.search-v2",
        "parameters": {"type": "object", "properties": {"from": {"type": "string"}, "content-type": {}}},
    }
    asked = {"flights.search-v2": ["from"]}
    path = saved(
        tmp_path / "odd.json",
        [row("double", "x", 6, tools=[schema], codes={"flights.search-v2": source}, unsolved_set=asked)],
    )
    with Sandbox(1, Limits(seconds=5.0)) as box:
        environment = FTRLEnvironment(path, box)
        (task,) = environment.tasks()
        session = environment.start(task)
        assert session.execute([ToolCall("flights.search-v2", {"from": "a", "content-type": "b"})]) == [
            '["content-type", "from"]'
        ]
        session.close()
    assert [python_name(name) for name in ("f", "a.b-c", "from", "2d")] == ["f", "a_b_c", "_from", "_2d"]
