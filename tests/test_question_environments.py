"""FTRL and ToolHop on published rows: loading, the sandboxed tools, and metrics against cases computed by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pact_nemo.environments.base import ToolCall
from pact_nemo.environments.ftrl import ANSWER_RULE, FTRLConfig, FTRLEnvironment, solve_metrics, with_answer_rule
from pact_nemo.environments.rows import read_rows
from pact_nemo.environments.toolhop import INSTRUCTIONS, ToolHopConfig, ToolHopEnvironment, defined_functions
from pact_nemo.errors import ConfigError, DataError
from pact_nemo.runtime.quarantine import Quarantine
from pact_nemo.sandbox import Limits, Sandbox
from tests.workers.question_rows import FIND, ftrl_row, toolhop_row, write

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the published sample files are not beside the project")


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(2, Limits(seconds=3.0)) as box:
        yield box


@pytest.mark.parametrize(
    ("solved", "calls", "questions", "expected"),
    [
        (0, 0, 3, (1.0, 0.0, 0.0)),
        (2, 4, 3, (0.5, 2 / 3, 4 / 7)),
        (3, 3, 3, (1.0, 1.0, 1.0)),
        (0, 5, 2, (0.0, 0.0, 0.0)),
        (1, 1, 4, (1.0, 0.25, 0.4)),
    ],
)
def test_solve_metrics_by_hand(solved: int, calls: int, questions: int, expected: tuple[float, float, float]) -> None:
    metrics = solve_metrics(solved, calls, questions)
    assert (metrics["solve_p"], metrics["solve_r"], metrics["solve_f1"]) == pytest.approx(expected)


def test_an_ftrl_episode_is_scored_by_hand(tmp_path: Path, sandbox: Sandbox) -> None:
    environment = FTRLEnvironment(write(tmp_path / "x.jsonl", ftrl_row()), sandbox)
    (task,) = environment.tasks()
    assert (task.id, task.category, [tool["name"] for tool in task.tools]) == (
        "x_0",
        "multi_hop",
        ["find", "population"],
    )
    session = environment.start(task)
    assert session.outcome().metrics["solve_p"] == 1.0 and session.outcome().score == 0.0
    texts = session.execute(
        [
            ToolCall("find", {"place": "France"}),
            ToolCall("find", {"place": "France"}),
            ToolCall("population", {"city": "Rome"}),
        ]
    )
    assert texts == ['{"capital": "Paris"}', '{"capital": "Paris"}', "Error: KeyError: 'Rome'"]
    outcome = session.outcome()  # 1 of 3 solved by 3 calls: the second find brings nothing new
    assert outcome.metrics == pytest.approx(
        {"solve_p": 1 / 3, "solve_r": 1 / 3, "solve_f1": 1 / 3, "questions": 3, "calls": 3, "invocation_errors": 1}
    )
    assert outcome.solved == (True, False, False)
    session.execute(
        [ToolCall("find", {"place": "Peru"}), ToolCall("population", {"city": "Paris"}), ToolCall("nothing", {})]
    )
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
        (
            "<think>2161000 or 3? I say 3.</think> <answer>3</answer>",
            [],
            False,
        ),  # what a thought weighs up is no answer
        ("2161000 or 3?</think>\n\n<answer>3</answer>", [], False),  # the generation prompt opened the thought
        ("<think>3?</think>\n\n<answer>2161000</answer>", [], True),
        ("<think>2161000", [ToolCall("population", {"city": "Paris"})], False),  # never closed: nothing is said
    ],
)
def test_a_toolhop_answer_is_judged_by_hand(
    tmp_path: Path, sandbox: Sandbox, message: str, calls: list[ToolCall], correct: bool
) -> None:
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
        (task,) = ToolHopEnvironment(path, sandbox, ToolHopConfig(scenario)).tasks()
        prompts[scenario] = task.user_turns[0][0]["content"]
        assert bool(task.tools) is (scenario != "direct")
        session = ToolHopEnvironment(path, sandbox, ToolHopConfig(scenario)).start(task)
        if scenario == "direct":
            assert "unknown function" in session.execute([ToolCall("find", {"place": "Peru"})])[0]
        assert prompts[scenario] == INSTRUCTIONS[scenario] + toolhop_row()["question"]  # type: ignore[index]
    assert prompts["direct"] == (  # as published
        "You will be asked a question, and should provide a short answer.\nIf the answer is a date, format is as"
        " follows: YYYY-MM-DD (ISO standard)\nIf the answer is a name, format it as follows: Firstname Lastname\nIf the"
        " answer contains any number, format it as a number, not a word, and only output that number. Do not include"
        " leading 0s.\n\nPlease provide the answer in the following format: <answer>your answer here</answer>\nAnswer"
        " as short as possible.\nQuestion: How many people live in the capital of France?"
    )
    every_step = "Please note that you must call the tool at every step, you must not use your own knowledge. "
    assert (
        prompts["mandatory"].replace(f"{every_step}Your final answer must also be returned from the tool.\n", "")
        == prompts["free"]
    )
    assert "<answer>final answer here</answer>\nAnswer as short as possible.\nQuestion: " in prompts["free"]
    with pytest.raises(ConfigError, match="scenario"):
        ToolHopEnvironment(path, sandbox, ToolHopConfig("other"))


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
        (ftrl_row(ground_truth="find()"), "ground_truth"),
        (
            ftrl_row(ground_truth="7"),
            "expected a list of calls, found int.*ground_truth|ground_truth.*expected a list of calls",
        ),
        (ftrl_row(ground_truth=["find"]), r"ground_truth\[0\]"),
        (ftrl_row(ground_truth=[{"parameters": {}}]), r"ground_truth\[0\]"),
        (
            ftrl_row(ground_truth=[{"name": "find", "parameters": {}}, {"name": "gone", "parameters": {}}]),
            r"ground_truth\[1\].name",
        ),
        (ftrl_row(ground_truth=[{"name": "find", "parameters": [1]}]), r"ground_truth\[0\].parameters"),
        (ftrl_row(ground_truth=[{"name": "find", "parameters": "{"}]), r"ground_truth\[0\].parameters"),
        (
            ftrl_row(ground_truth=[{"name": "find", "parameters": {}, "arguments": {"place": "Peru"}}]),
            r"ground_truth\[0\]",
        ),
        (ftrl_row(ground_truth=[{"name": "find", "parameter": {"place": "Peru"}}]), r"ground_truth\[0\]"),
        (ftrl_row(ground_truth={"name": ["find"], "parameters": []}), "ground_truth"),
    ],
)
def test_bad_ftrl_rows_are_named(tmp_path: Path, sandbox: Sandbox, row: dict[str, Any], words: str) -> None:
    path = write(tmp_path / "x.jsonl", ftrl_row(), row)
    with pytest.raises(DataError, match=words) as caught:
        FTRLEnvironment(path, sandbox).tasks()
    assert (caught.value.file, caught.value.line) == (str(path), 2)


CALLS = [{"name": "find", "parameters": {"place": "France"}}, {"name": "population", "parameters": {"city": "Paris"}}]
WANTED = (ToolCall("find", {"place": "France"}), ToolCall("population", {"city": "Paris"}))


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        (json.dumps(CALLS), WANTED),  # as published
        (CALLS, WANTED),
        ([{"name": call["name"], "arguments": json.dumps(call["parameters"])} for call in CALLS], WANTED),
        ({"name": [call["name"] for call in CALLS], "parameters": [call["parameters"] for call in CALLS]}, WANTED),
        (
            {
                "name": [call["name"] for call in CALLS],
                "parameters": [json.dumps(call["parameters"]) for call in CALLS],
            },
            WANTED,
        ),
        (CALLS[0], WANTED[:1]),
        (json.dumps(CALLS[0]), WANTED[:1]),
        (
            [{"name": "find", "parameters": {"place": "France", "city": None}, "arguments": None}],
            WANTED[:1],
        ),  # a struct's nulls
        ([{"name": "find", "parameters": None}], (ToolCall("find", {}),)),
        ([], ()),
        ("[]", ()),
        (None, ()),
    ],
)
def test_reference_calls_come_from_the_row_in_every_form(
    tmp_path: Path, sandbox: Sandbox, written: Any, wanted: tuple[ToolCall, ...]
) -> None:
    (task,) = FTRLEnvironment(write(tmp_path / "x.jsonl", ftrl_row(ground_truth=written)), sandbox).tasks()
    assert task.reference_calls == (wanted,)


def test_rows_without_reference_calls_and_rows_of_a_parquet_file(tmp_path: Path, sandbox: Sandbox) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (task,) = FTRLEnvironment(write(tmp_path / "x.jsonl", ftrl_row()), sandbox).tasks()
    assert task.reference_calls == ((),)
    for name, written in (("structs", CALLS), ("text", json.dumps(CALLS))):
        rows = [ftrl_row(ground_truth=written), ftrl_row(ground_truth=None)]
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
        first, second = FTRLEnvironment(tmp_path / f"{name}.parquet", sandbox).tasks()
        assert first.reference_calls == (WANTED,) and second.reference_calls == ((),), name


def test_a_row_with_bad_reference_calls_is_quarantined_by_name(tmp_path: Path, sandbox: Sandbox) -> None:
    quarantine = Quarantine("quarantine")
    path = write(
        tmp_path / "x.jsonl", ftrl_row(ground_truth=CALLS), ftrl_row(ground_truth=[{"name": "gone", "parameters": {}}])
    )
    tasks = FTRLEnvironment(path, sandbox, quarantine=quarantine).tasks()
    assert [task.reference_calls for task in tasks] == [(WANTED,)]
    (bad,) = quarantine.rows
    assert (bad.error.file, bad.error.line, bad.error.field) == (
        str(path),
        2,
        "ground_truth[0].name",
    ) and "'gone'" in str(bad.error)


def test_the_prompt_asks_for_a_tagged_answer_once(tmp_path: Path, sandbox: Sandbox) -> None:
    asked = (
        "Please call given tools to answer the question.\nIf the call fails, you need to try to correct it.\nQuestion:"
        " who?"
    )
    tagged = f"Please call given tools. {ANSWER_RULE}\nQuestion: who?"
    rows = [ftrl_row(messages=[{"role": "user", "content": text}]) for text in (asked, tagged, "who?")]
    rows.append(ftrl_row(messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "who?"}]))
    path = write(tmp_path / "x.jsonl", *rows)
    prompts = [task.user_turns[0] for task in FTRLEnvironment(path, sandbox).tasks()]
    assert (
        prompts[0][0]["content"]
        == "Please call given tools to answer the question.\nIf the call fails, you need to try to correct it."
        f" {ANSWER_RULE}\nQuestion: who?"
    )
    assert prompts[1][0]["content"] == tagged  # the published training prompts have it
    assert prompts[2][0]["content"] == f"who?\n{ANSWER_RULE}" == with_answer_rule("who?")
    assert prompts[3][0]["content"] == "Be brief." and prompts[3][1]["content"] == f"who?\n{ANSWER_RULE}"
    as_written = FTRLEnvironment(path, sandbox, settings=FTRLConfig("as_written")).tasks()
    assert [task.user_turns[0][-1]["content"] for task in as_written] == [asked, tagged, "who?", "who?"]


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
        (text,) = session.execute(
            [ToolCall(tool["name"], {key: "x" for key in tool["parameters"].get("required", [])})]
        )
        assert text
        assert session.outcome().metrics["calls"] == 1
        session.close()


@needs_data
def test_the_published_toolhop_sample_loads_and_every_tool_has_a_source(sandbox: Sandbox) -> None:
    tasks = ToolHopEnvironment(DATA / "toolhop_100.jsonl", sandbox).tasks()
    assert len(tasks) == 100
    missing = [
        (task.id, tool["name"]) for task in tasks for tool in task.tools if tool["name"] not in task.data["functions"]
    ]
    assert len(missing) <= 2, missing
    assert all(len(task.data["sub_task"]) >= 2 for task in tasks)
