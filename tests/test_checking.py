"""``tools/check.py``: every planted fault is found by name, and sound data raises no alarm."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pact_nemo.chat.template import ChatFormat
from pact_nemo.checking.findings import Finding, grouped, listed
from pact_nemo.checking.plays import Script
from pact_nemo.checking.reward_checks import _holds
from pact_nemo.checkout import ROOT
from pact_nemo.environments.base import ToolCall
from tests.fixtures.planted_faults import FAULTS
from tests.fixtures.planted_row_faults import ROW_FAULTS
from tests.fixtures.shop_rows import Data, instead, method, run, wrong_expected_call


def test_there_are_enough_faults() -> None:
    assert len(FAULTS) >= 45


@pytest.mark.parametrize("name", [*FAULTS, *ROW_FAULTS])
def test_a_planted_fault_is_found_by_name(name: str, tmp_path: Path, chat: ChatFormat) -> None:
    change, level, kind, said = (FAULTS | ROW_FAULTS)[name]
    data = Data()
    change(data)
    found = run(data, tmp_path, chat)
    matching = [one for one in found.findings if (one.level, one.kind) == (level, kind)]
    assert any(all(part in str(one) for part in said) for one in matching), "\n".join(listed(found.findings))
    if level != "note":
        assert any(one.remedy or ";" in one.text or ":" in one.text for one in matching)


@pytest.mark.parametrize(
    ("name", "warnings"),
    [
        ("an expected call with an argument of another type", 1),  # of its conversation
        ("a conversation's call that its task needs for its state", 0),
    ],
)
def test_a_refused_call_is_told_once(name: str, warnings: int, tmp_path: Path, chat: ChatFormat) -> None:
    data = Data()
    ROW_FAULTS[name][0](data)
    found = run(data, tmp_path, chat)
    counts = found.count("error"), found.count("warning"), found.tasks
    assert counts == (1, warnings, 3), "\n".join(listed(found.findings))


def test_an_expected_call_that_fails_is_told_once_and_blames_no_score(tmp_path: Path, chat: ChatFormat) -> None:
    """A state that can't be had fails every episode of a task, whatever the episode does."""
    data = Data()
    method("    def state(self):\n        return self.stock\n")(data)
    wrong_expected_call(data)
    found = run(data, tmp_path, chat)
    errors = [str(one) for one in found.findings if one.level == "error"]
    assert len(errors) == 1 and errors[0].count("t0") == 1 and "KeyError" in errors[0], errors


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"held_out": 1}, "a batch of 6 prompts needs as many training tasks; there are 3"),
        ({"held_out": 4}, "tasks.held_out=4 of 4 groups leaves one side empty"),
        ({"held_out": 1, "max_prompt_tokens": 5}, "leaves one side empty"),
    ],
)
def test_what_a_run_would_refuse_for_want_of_tasks_is_noted(
    tmp_path: Path, chat: ChatFormat, changes: dict[str, int], refusal: str
) -> None:
    data = Data()
    data.words.extend(f"tasks.{key}={value}" for key, value in changes.items())
    found = run(data, tmp_path, chat)
    said = [one.text for one in found.findings if one.kind == "settings"]
    assert len(said) == 1 and "a run with these settings would be refused" in said[0] and refusal in said[0], said


def test_sound_data_raises_no_alarm(tmp_path: Path, chat: ChatFormat) -> None:
    found = run(Data(), tmp_path, chat)
    assert (found.count("error"), found.count("warning")) == (0, 0), "\n".join(listed(found.findings))
    assert (found.tasks, found.traces, found.played) == (4, 4, 4)
    texts = "\n".join(listed(found.findings))
    assert "doing nothing solves 0 of 4 tasks" in texts and "another task's expert solves 0 of 4" in texts
    assert "no trace calls order" in texts


def test_one_cause_is_told_once(tmp_path: Path, chat: ChatFormat) -> None:
    data = Data()
    instead('task["info"]["stock"]', 'task["stocks"]')(data)
    found = run(data, tmp_path, chat)
    failed = [one for one in found.findings if one.kind == "episode" and "KeyError" in one.text]
    places = [sorted(one.where.split(", ")) for one in failed if one.where]
    assert places == [["t0", "t1", "t2", "t3"]], "\n".join(listed(found.findings))
    many = grouped([Finding("error", "row", f"t{n}", f"t{n}: bad") for n in range(9)])
    assert many == [Finding("error", "row", "t0, t1, t2, t3 and 5 more", "bad")]


def test_questions_with_the_same_answer_are_no_other_tasks(tmp_path: Path, chat: ChatFormat) -> None:
    """Yes is right in half of all tasks whose answers are yes and no."""
    data = Data()
    for index, (row, talk) in enumerate(zip(data.tasks, data.traces, strict=True)):
        row["answer"] = talk["messages"][3]["content"] = "yes" if index < 3 else "no"
    found = run(data, tmp_path, chat)
    assert (found.count("error"), found.count("warning")) == (0, 0), "\n".join(listed(found.findings))
    assert "another task's expert solves 0 of 4 tasks" in "\n".join(listed(found.findings))


def test_many_of_a_kind_are_counted() -> None:
    found = [Finding("error", "row", f"f:{n}", "bad") for n in range(9)] + [Finding("note", "length", "", "long")]
    lines = listed(found)
    assert (
        len(lines) == 7 and lines[5] == "error [row] … and 4 more (--json has all)" and lines[6] == "note [length] long"
    )


@pytest.mark.parametrize(("fault", "code"), [(None, 0), ("score() is always one", 1)])
def test_the_command(fault: str | None, code: int, tmp_path: Path) -> None:
    data = Data()
    if fault is not None:
        FAULTS[fault][0](data)
    command = [sys.executable, str(ROOT / "tools" / "check.py"), "--json", *data.written(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    found = json.loads(done.stdout)
    assert (found["errors"] > 0) == bool(code) and [tool["name"] for tool in found["tools"]] == ["lookup", "order"]


def test_observations_that_are_cut_for_the_policy_alone_are_no_other_ones(tmp_path: Path, chat: ChatFormat) -> None:
    found = run(Data(words=["tasks.max_observation_chars=5"]), tmp_path, chat)
    texts = "\n".join(listed(found.findings))
    assert "tasks.max_observation_chars=5" in texts and "something else" not in texts


def test_an_expert_who_does_more_may_solve_another_ones_task() -> None:
    """What a longer solution holds, it solves; that says nothing against the verdict."""
    first, second = ToolCall("look", {"sku": "A"}), ToolCall("look", {"sku": "B"})
    short = Script((((first,),),))
    assert _holds(Script((((second,), (first,)),)), short) and not _holds(short, Script((((first,), (first,)),)))
    assert not _holds(Script((((first,),),), closing="It costs 4."), short)
