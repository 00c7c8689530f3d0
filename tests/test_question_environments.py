"""FTRL and ToolHop on published rows: loading, the sandboxed tools, and metrics against cases computed by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pact_nemo.environments.base import ToolCall
from pact_nemo.environments.ftrl import FTRLEnvironment, solve_metrics
from pact_nemo.environments.python_tools import contains_answer
from pact_nemo.environments.rows import read_rows
from pact_nemo.environments.toolhop import ToolHopEnvironment, defined_functions
from pact_nemo.errors import ConfigError, DataError
from pact_nemo.sandbox import Limits, Sandbox

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the published sample files are not beside the project")

FIND = "def find(place):\n    return {'capital': {'France': 'Paris', 'Peru': 'Lima'}.get(place, 'unknown')}\n"
POP = "def population(city, year=2020):\n    if city == 'Paris': return 'about 2,161,000 people'\n    raise KeyError(city)\n"


def function(name: str, **properties: str) -> dict[str, Any]:
    schema = {"type": "object", "properties": {key: {"type": kind} for key, kind in properties.items()}, "required": list(properties)[:1]}
    return {"type": "function", "function": {"name": name, "description": f"{name} it", "parameters": schema}}


def ftrl_row(**changes: Any) -> dict[str, Any]:
    row = {
        "messages": [{"role": "user", "content": "Question: how many people live in the capital of France?"}],
        "tools": json.dumps([function("find", place="string"), function("population", city="string", year="integer")]),
        "codes": json.dumps({"find": FIND, "population": POP}),
        "unsolved_set": json.dumps({"find": ["Paris", "Lima"], "population": ["2161000"]}),
        "solve_rate": 0.0,
        "data_source": "self/multi_hop",
        "split": "test",
        "answer": "2161000",
    }
    return row | changes


def toolhop_row(**changes: Any) -> dict[str, Any]:
    row = {
        "id": 7,
        "question": "How many people live in the capital of France?",
        "answer": "2161000",
        "answer_type": "number",
        "sub_task": {"What is the capital of France?": "Paris", "How many people live in Paris?": "2161000"},
        "tools": {
            "What is the capital of France?": function("find", place="string")["function"],
            "How many people live in Paris?": function("population", city="string")["function"],
        },
        "functions": [FIND, POP],
    }
    return row | changes


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(2, Limits(seconds=3.0)) as box:
        yield box


@pytest.mark.parametrize(
    ("text", "answer", "found"),
    [
        ("The capital is PARIS.", "paris", True),
        ("about 2,161,000 people", "2161000", True),
        ("Paris and Lima", "Lima, Paris", True),  # every part, in any order
        ("Paris", "Lima, Paris", False),
        ("", "x", False),
        ("anything", "", True),
    ],
)
def test_the_published_rule_of_containment(text: str, answer: str, found: bool) -> None:
    assert contains_answer(text, answer) is found


@pytest.mark.parametrize(
    ("solved", "calls", "questions", "expected"),
    [(0, 0, 3, (1.0, 0.0, 0.0)), (2, 4, 3, (0.5, 2 / 3, 4 / 7)), (3, 3, 3, (1.0, 1.0, 1.0)), (0, 5, 2, (0.0, 0.0, 0.0)), (1, 1, 4, (1.0, 0.25, 0.4))],
)
def test_solve_metrics_by_hand(solved: int, calls: int, questions: int, expected: tuple[float, float, float]) -> None:
    metrics = solve_metrics(solved, calls, questions)
    assert (metrics["solve_p"], metrics["solve_r"], metrics["solve_f1"]) == pytest.approx(expected)


def test_an_ftrl_episode_is_scored_by_hand(tmp_path: Path, sandbox: Sandbox) -> None:
    environment = FTRLEnvironment(write(tmp_path / "x.jsonl", ftrl_row()), sandbox)
    (task,) = environment.tasks()
    assert (task.id, task.category, [tool["name"] for tool in task.tools]) == ("x_0", "multi_hop", ["find", "population"])
    session = environment.start(task)
    assert session.outcome().metrics["solve_p"] == 1.0 and session.outcome().score == 0.0
    texts = session.execute([ToolCall("find", {"place": "France"}), ToolCall("find", {"place": "France"}), ToolCall("population", {"city": "Rome"})])
    assert texts == ['{"capital": "Paris"}', '{"capital": "Paris"}', "Error: KeyError: 'Rome'"]
    outcome = session.outcome()  # 1 of 3 solved by 3 calls: the second find brings nothing new
    assert outcome.metrics == pytest.approx(
        {"solve_p": 1 / 3, "solve_r": 1 / 3, "solve_f1": 1 / 3, "questions": 3, "calls": 3, "invocation_errors": 1}
    )
    assert outcome.solved == (True, False, False)
    session.execute([ToolCall("find", {"place": "Peru"}), ToolCall("population", {"city": "Paris"}), ToolCall("nothing", {})])
    outcome = session.outcome()
    assert outcome.success and outcome.score == pytest.approx(2 * 0.5 / 1.5)  # 3 of 3 by 6 calls
    assert outcome.solved == (True, False, False, True, True, False)
    assert session.next_user_turn("2161000") is None
    session.close()


@pytest.mark.parametrize(
    ("message", "calls", "correct"),
    [
        ("<answer>2,161,000</answer>", [], True),
        ("I don't know", [ToolCall("population", {"city": "Paris"})], True),  # the last observation has it
        ("I don't know", [ToolCall("population", {"city": "Paris"}), ToolCall("find", {"place": "Peru"})], False),
        ("", [ToolCall("population", {"city": "Paris"})], False),
        ("wrong", [], False),
    ],
)
def test_a_toolhop_answer_is_judged_by_hand(tmp_path: Path, sandbox: Sandbox, message: str, calls: list[ToolCall], correct: bool) -> None:
    environment = ToolHopEnvironment(write(tmp_path / "x.jsonl", toolhop_row()), sandbox)
    (task,) = environment.tasks()
    assert (task.id, task.category, task.tags) == ("toolhop_7", "2 hops", ("answer type: number",))
    session = environment.start(task)
    if calls:
        session.execute(calls)
    assert not session.outcome().success, "before the final message"
    assert session.next_user_turn(message) is None
    assert session.outcome().success is correct
    assert session.outcome().metrics["calls"] == len(calls)
    session.close()


def test_toolhop_scenarios(tmp_path: Path, sandbox: Sandbox) -> None:
    path = write(tmp_path / "x.jsonl", toolhop_row())
    prompts = {}
    for scenario in ("direct", "mandatory", "free"):
        (task,) = ToolHopEnvironment(path, sandbox, scenario).tasks()  # type: ignore[arg-type]
        prompts[scenario] = task.user_turns[0][0]["content"]
        assert bool(task.tools) is (scenario != "direct")
        session = ToolHopEnvironment(path, sandbox, scenario).start(task)  # type: ignore[arg-type]
        if scenario == "direct":
            assert "unknown function" in session.execute([ToolCall("find", {"place": "Peru"})])[0]
    assert len(set(prompts.values())) == 3
    with pytest.raises(ConfigError, match="scenario"):
        ToolHopEnvironment(path, sandbox, "other")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (ftrl_row(tools="[{]"), "tools"),
        (ftrl_row(tools=json.dumps([{"no": "name"}])), r"tools\[0\]"),
        (ftrl_row(codes=json.dumps({"find": FIND})), "no source for the tool 'population'"),
        (ftrl_row(codes="7"), "codes"),
        (ftrl_row(unsolved_set=json.dumps({"find": "Paris"})), "unsolved_set.find"),
        (ftrl_row(messages=[{"role": "assistant", "content": "x"}]), r"messages\[0\]"),
        (ftrl_row(messages=None), "messages"),
    ],
)
def test_bad_ftrl_rows_are_named(tmp_path: Path, sandbox: Sandbox, row: dict[str, Any], words: str) -> None:
    path = write(tmp_path / "x.jsonl", ftrl_row(), row)
    with pytest.raises(DataError, match=words) as caught:
        FTRLEnvironment(path, sandbox).tasks()
    assert (caught.value.file, caught.value.line) == (str(path), 2)


def test_bad_files_are_named(tmp_path: Path) -> None:
    for name, content, words in (
        ("a.jsonl", b"{}\n{oops\n", "a.jsonl:2"),
        ("b.json", b"{}", "list of rows"),
        ("c.json", b"[1]", "row is int"),
        ("d.csv", b"x", "can't read .csv"),
        ("e.parquet", b"PAR1 not really", "parquet"),
        ("f.jsonl", b"\xff\xfe", "UTF-8"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=words):
            read_rows(tmp_path / name)
    with pytest.raises(DataError, match="does not exist"):
        read_rows(tmp_path / "none.jsonl")


def test_function_names_of_a_source() -> None:
    assert defined_functions("import os\ndef a(): pass\nclass B:\n    def c(self): pass\ndef d(): pass\n") == ["a", "d"]
    assert defined_functions("def (") == []


@needs_data
def test_the_published_ftrl_file_loads_and_its_tools_run(sandbox: Sandbox) -> None:
    environment = FTRLEnvironment(DATA / "ftrl_test.parquet", sandbox)
    tasks = environment.tasks()
    assert len(tasks) == 200
    assert {task.category for task in tasks} == {"single_hop", "multi_hop", "parallel_single_hop", "parallel_multi_hop"}
    for task in tasks[::40]:
        session = environment.start(task)
        tool = task.tools[0]
        (text,) = session.execute([ToolCall(tool["name"], {key: "x" for key in tool["parameters"].get("required", [])})])
        assert text
        assert session.outcome().metrics["calls"] == 1
        session.close()


@needs_data
def test_the_published_toolhop_sample_loads_and_every_tool_has_a_source(sandbox: Sandbox) -> None:
    tasks = ToolHopEnvironment(DATA / "toolhop_100.jsonl", sandbox).tasks()
    assert len(tasks) == 100
    missing = [(task.id, tool["name"]) for task in tasks for tool in task.tools if tool["name"] not in task.data["functions"]]
    assert len(missing) <= 2, missing
    assert all(len(task.data["sub_task"]) >= 2 for task in tasks)
