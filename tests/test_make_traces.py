"""Making traces: a teacher over real HTTP, filters, resumption after the endpoint or the run died, and the quality
report.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fixtures.endpoint import Endpoint, Said

from pact_nemo.environments.base import ToolCall
from pact_nemo.rollouts.chat_episode import message_parts
from pact_nemo.traces.filters import leaks_answer
from pact_nemo.traces.llm_annotate import ModelAnnotator, read_types
from pact_nemo.traces.schema import ReasoningSegment, Trace, TraceTurn, read_traces
from tests.workers.question_rows import FIND, POP, toolhop_row

ROOT = Path(__file__).resolve().parents[1]


class Teacher(Endpoint):
    """Plays a part per question: solves it, leaks the answer, writes broken calls, or is down."""

    def __init__(self) -> None:
        super().__init__()
        self.down = False
        self.usage = {"prompt_tokens": 10, "completion_tokens": 3}
        self.say = lambda words: {"content": words}
        self.labels = '{"types": ["task_restate", "tool_selection"]}'

    def said(self, body: dict[str, Any]) -> Said:
        return 503 if self.down else self.message(body)

    def message(self, body: dict[str, Any]) -> dict[str, Any]:
        if "tools" not in body:
            return {"content": self.labels}
        question = body["messages"][0]["content"]
        done = sum(message["role"] == "tool" for message in body["messages"])
        part = next(part for part in ("solves", "leaks", "breaks", "is wrong") if part in question)
        if part == "breaks":
            return {
                "content": "",
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "find", "arguments": "{oops"}}],
            }
        if done == 2 or (part == "is wrong" and done == 1):
            return {"content": "2,161,000" if part != "is wrong" else "no idea"}
        name, arguments = [("find", {"place": "France"}), ("population", {"city": "Paris"})][done]
        words = "It must be 2161000." if part == "leaks" else "The user wants a number.\n\nI use the tool for it."
        call = {"name": name, "arguments": json.dumps(arguments)}
        return {**self.say(words), "tool_calls": [{"id": str(done), "type": "function", "function": call}]}


@pytest.fixture
def teacher() -> Iterator[Teacher]:
    made = Teacher()
    yield made
    made.close()


def make(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        str(ROOT / "tools" / "make_traces.py"),
        "--out",
        str(tmp_path / "traces.jsonl"),
        "environment=toolhop",
    ]
    return subprocess.run(
        [*command, f"tasks.path={tmp_path / 'rows.jsonl'}", *words],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )


def rows(tmp_path: Path, *parts: str) -> None:
    made = [
        toolhop_row(id=index, question=f"The teacher {part}: how many live in the capital of France?")
        for index, part in enumerate(parts)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))


def test_what_a_teacher_solves_is_kept_and_the_rest_is_named(tmp_path: Path, teacher: Teacher) -> None:
    rows(tmp_path, "solves", "leaks", "breaks", "is wrong")
    done = make(tmp_path, "--teacher", teacher.url, "--attempts", "2", "--annotate")
    assert done.returncode == 0, done.stderr
    (trace,) = read_traces(tmp_path / "traces.jsonl")
    assert (trace.task_id, trace.source, trace.verified, len(trace.turns)) == ("toolhop_0", "teacher", True, 2)
    assert [segment.type for segment in trace.turns[0].segments] == ["task_restate", "tool_selection"]
    quality = json.loads((tmp_path / "traces.jsonl.quality.json").read_text())
    assert quality["attempts"] == {"kept": 1, "answer_leaked": 2, "no_solution": 2, "unverified": 2}
    assert quality["coverage"] == {"2 hops": {"tasks": 4, "kept": 1, "share": 0.25}}
    assert quality["tokens"] == {"prompt": 10 * teacher.asked, "completion": 3 * teacher.asked}
    # the teacher labels two paragraphs whatever there is: right for its own two, unusable for the one of the leaking
    # part, tried twice
    assert quality["annotator"]["fallbacks_to_rules"] == 4 < quality["annotator"]["turns"]
    show = [sys.executable, str(ROOT / "tools" / "make_traces.py"), "--show", str(tmp_path / "traces.jsonl")]
    shown = subprocess.run(show, capture_output=True, text=True, timeout=60)
    assert (
        "[tool_selection]" in shown.stdout
        and "population(city='Paris')" in shown.stdout
        and "about 2,161,000 people" in shown.stdout
    )


THOUGHTS: dict[str, Any] = {
    "reasoning_content": lambda words: {"content": "", "reasoning_content": words},
    "reasoning": lambda words: {"content": None, "reasoning": words},
    "both": lambda words: {"content": "Let me look.", "reasoning_content": None, "reasoning": words},
    "markers": lambda words: {"content": f"<think>\n{words}\n</think>\n\nLet me look."},
    "closing marker": lambda words: {"content": f"{words}\n</think>\n\n"},
    "parts": lambda words: {"content": [{"type": "text", "text": f"<think>{words}</think>"}]},
}


@pytest.mark.parametrize("place", THOUGHTS)
def test_a_teachers_thought_is_read_where_its_server_puts_it(place: str) -> None:
    assert message_parts(THOUGHTS[place]("One.\n\nTwo."))[0] == "One.\n\nTwo."
    assert message_parts({"content": "Said only."}) == ("", "Said only.")


def test_traces_that_lost_their_reasoning_are_counted_and_named(tmp_path: Path, teacher: Teacher) -> None:
    rows(tmp_path, "solves")
    teacher.say = lambda words: {"content": ""}
    done = make(tmp_path, "--teacher", teacher.url)
    assert done.returncode == 0, done.stderr
    quality = json.loads((tmp_path / "traces.jsonl.quality.json").read_text())
    assert quality["calls_without_reasoning"] == {"traces": 1, "turns": 2, "tasks": ["toolhop_0"]}


def test_a_teacher_that_goes_away_costs_no_attempt_and_the_run_goes_on_later(tmp_path: Path, teacher: Teacher) -> None:
    rows(tmp_path, "solves", "solves", "breaks")
    teacher.down = True
    failed = make(tmp_path, "--teacher", teacher.url)
    assert (
        failed.returncode == 1 and "start again to go on" in failed.stderr and not (tmp_path / "traces.jsonl").exists()
    )
    teacher.down = False
    assert make(tmp_path, "--teacher", teacher.url, "--limit", "1").returncode == 0
    with open(tmp_path / "traces.jsonl.attempts.jsonl", "a") as journal:
        journal.write('{"task_id": "toolhop_1", "verd')  # the run was killed in mid-write
    asked = teacher.asked
    done = make(tmp_path, "--teacher", teacher.url, "--attempts", "1", "--concurrency", "1")
    assert done.returncode == 0, done.stderr
    assert (
        teacher.asked - asked == 3 + 1
    )  # the kept task is not asked again; one is solved in three answers, one breaks at once
    assert [trace.task_id for trace in read_traces(tmp_path / "traces.jsonl")] == ["toolhop_0", "toolhop_1"]
    again = make(tmp_path, "--teacher", teacher.url, "--attempts", "1")
    assert again.returncode == 0 and teacher.asked - asked == 4


def test_recorded_answers_need_no_teacher(tmp_path: Path) -> None:
    row = toolhop_row(functions=[FIND + "print(find('France'))\n", POP])
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    done = make(tmp_path, "--recorded")
    assert done.returncode == 0, done.stderr
    (trace,) = read_traces(tmp_path / "traces.jsonl")
    assert (trace.source, [call.name for turn in trace.turns for call in turn.calls]) == (
        "recorded",
        ["find", "population"],
    )
    neither = make(tmp_path)
    assert neither.returncode == 2 and "--teacher URL, --recorded, or --extend" in neither.stderr


@pytest.mark.parametrize(
    ("reasoning", "observation", "question", "answer", "leaks"),
    [
        ("It is Lima, I know.", "x", "Which city?", "Lima", True),
        ("It is limani.", "x", "Which city?", "Lima", False),
        ("It is Lima.", "x", "Lima or Quito?", "Lima", False),
        ("Let me look.", "Lima", "Which city?", "Lima", False),
        ("That makes 2,161,000.", "x", "How many?", "2161000", True),
        ("Take 7 of them.", "x", "How many?", "7", False),
        ("It is Lima.", "x", "Which city?", None, False),
    ],
)
def test_a_leaked_answer(reasoning: str, observation: str, question: str, answer: str | None, leaks: bool) -> None:
    turn = TraceTurn((ReasoningSegment("other", reasoning),), (ToolCall("f"),), (observation,))
    assert leaks_answer(Trace("t", "teacher", (turn,), True), question, answer) is leaks


@pytest.mark.parametrize(
    ("text", "types"),
    [
        ('Here: {"types": ["other", "tool_scan"]} done', ["other", "tool_scan"]),
        ('{"types": ["other"]}', None),
        ('{"types": ["other", "nonsense"]}', None),
        ('{"types": "other"}', None),
        ("no json", None),
        ("{[}", None),
    ],
)
def test_an_annotators_answer_is_taken_exactly_or_not_at_all(text: str, types: list[str] | None) -> None:
    assert read_types(text, 2) == types


def test_the_rules_have_the_last_word_on_call_previews_and_step_in_for_a_bad_answer() -> None:
    text = "The user wants a file.\n\nThe call is find(place='France')."
    good = ModelAnnotator(lambda messages, tools: {"content": '{"types": ["tool_scan", "tool_selection"]}'})
    assert [kind for kind, _ in good(text, ["find"])] == ["tool_scan", "explicit_call_preview"]
    bad = ModelAnnotator(lambda messages, tools: {"content": "I'd rather not"})
    assert [kind for kind, _ in bad(text, ["find"])] == ["task_restate", "explicit_call_preview"]
    assert (good.fallbacks, bad.fallbacks, bad.turns) == (0, 1, 1)
    assert "".join(piece for _, piece in good(text, ["find"])) == text
