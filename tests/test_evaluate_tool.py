"""``tools/evaluate.py``: a chat server's verdicts are bfcl-eval's own, item by item; it resumes; an HF folder goes
through vLLM.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fixtures.endpoint import Endpoint

from pact_nemo.environments.base import Task, ToolCall
from pact_nemo.environments.bfcl.data import data_dir
from pact_nemo.environments.calls import call_text
from tests.workers.bfcl_tasks import bfcl_environment
from tests.workers.question_rows import toolhop_row

ROOT = Path(__file__).resolve().parents[1]
Answer = Callable[[list[dict[str, Any]]], dict[str, Any]]


class ChatServer(Endpoint):
    """Its answers are a function of the messages."""

    def __init__(self, answer: Answer):
        super().__init__()
        self.answer = lambda body: answer(body["messages"])


def tool_calls(calls: list[ToolCall]) -> list[dict[str, Any]]:
    return [
        {"id": str(i), "type": "function", "function": {"name": call.name, "arguments": json.dumps(call.arguments)}}
        for i, call in enumerate(calls)
    ]


def evaluate(*words: str) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "tools" / "evaluate.py"), *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().split("\n")
    assert len(lines) == 1
    result: dict[str, Any] = json.loads(lines[0])
    return result


@pytest.fixture(scope="module")
def bfcl_tasks() -> list[Task]:
    return bfcl_environment(("multi_turn_base",)).tasks()[:6]


@pytest.fixture(scope="module")
def solver(bfcl_tasks: list[Task]) -> Iterator[ChatServer]:
    """Solves every other task; in the others it says nothing in the last user turn that needs a call, or writes a
    broken one first.
    """
    by_request = {task.user_turns[0][-1]["content"]: (index, task) for index, task in enumerate(bfcl_tasks)}

    def answer(messages: list[dict[str, Any]]) -> dict[str, Any]:
        users = [message for message in messages if message["role"] == "user"]
        index, task = by_request[users[0]["content"]]
        turn, since = len(users) - 1, [m for m in messages[messages.index(users[-1]) + 1 :] if m["role"] == "assistant"]
        calls = list(task.reference_calls[turn])
        last = max(t for t, wanted in enumerate(task.reference_calls) if wanted)
        if index % 2 and turn == last:
            return {"content": "I leave that out."}
        if index == 4 and turn == 0 and not since:
            return {
                "content": "",
                "tool_calls": [{"id": "x", "type": "function", "function": {"name": "ls", "arguments": "{broken"}}],
            }
        done = len(since) - (index == 4 and turn == 0)
        return {"content": "", "tool_calls": tool_calls(calls)} if calls and done == 0 else {"content": "Done."}

    made = ChatServer(answer)
    yield made
    made.close()


def test_verdicts_are_bfcl_evals_own_item_by_item(tmp_path: Path, solver: ChatServer, bfcl_tasks: list[Task]) -> None:
    from bfcl_eval.eval_checker.multi_turn_eval.multi_turn_checker import multi_turn_checker

    words = [
        "--model",
        solver.url,
        "--name",
        "scripted",
        "--out",
        str(tmp_path),
        "--limit",
        "6",
        "environment_config.categories=[multi_turn_base]",
    ]
    result = evaluate(*words)
    assert (result["score"], result["n"], result["failed"]) == (0.5, 6, 0)
    episodes = {row["task_id"]: row for row in map(json.loads, (tmp_path / "episodes.jsonl").read_text().splitlines())}
    questions = {
        row["id"]: row
        for row in map(json.loads, (data_dir() / "BFCL_v4_multi_turn_base.json").read_text().splitlines())
    }
    answers = {
        row["id"]: row["ground_truth"]
        for row in map(
            json.loads, (data_dir() / "possible_answer" / "BFCL_v4_multi_turn_base.json").read_text().splitlines()
        )
    }
    for number, task in enumerate(bfcl_tasks):
        steps: dict[int, list[list[str]]] = defaultdict(list)
        for turn in episodes[task.id]["turns"]:
            if turn["calls"]:
                steps[turn["user_turn"]].append(
                    [call_text(ToolCall(call["name"], call["arguments"])) for call in turn["calls"]]
                )
        decoded = [steps[index] for index in range(len(answers[task.id]))]
        official = multi_turn_checker(
            decoded, answers[task.id], questions[task.id], "multi_turn_base", f"check{number}"
        )
        assert episodes[task.id]["outcome"]["success"] is official["valid"] is (number % 2 == 0), task.id
    score_file = tmp_path / "score" / "scripted" / "multi_turn" / "BFCL_v4_multi_turn_base_score.json"
    lines = [json.loads(line) for line in score_file.read_text().splitlines()]
    assert lines[0] == {"accuracy": 0.5, "correct_count": 3, "total_count": 6}
    assert [line["id"] for line in lines[1:]] == [task.id for task in bfcl_tasks[1::2]]
    asked = solver.asked
    assert evaluate(*words)["score"] == 0.5 and solver.asked == asked, "finished episodes are not played again"


def test_a_toolhop_answer_by_url(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(toolhop_row(id=i)) + "\n" for i in range(3)))
    server = ChatServer(lambda messages: {"content": "<answer>2161000</answer>"})
    words = [
        "--model",
        server.url,
        "--benchmark",
        "toolhop",
        "--out",
        str(tmp_path / "out"),
        f"tasks.path={tmp_path / 'rows.jsonl'}",
    ]
    result = evaluate(*words)
    server.close()
    assert (
        result["score"] == 1.0
        and result["metrics"]["answer_correctness"] == 1.0
        and result["categories"]["2 hops"]["n"] == 3
    )
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == result


def test_a_server_that_is_not_there_is_named(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "tools" / "evaluate.py"),
        "--model",
        "http://127.0.0.1:9/v1",
        "--limit",
        "2",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 1 and "127.0.0.1:9" in done.stderr


@pytest.mark.slow
def test_an_hf_folder_is_served_and_scored(tmp_path: Path) -> None:
    from pact_nemo.checkpoints.embedded import materialise_embedded_model

    model = materialise_embedded_model(ROOT / ".cache" / "pact_nemo")
    result = evaluate(
        "--model",
        str(model),
        "--config",
        str(ROOT / "conf" / "pact_bfcl-smollm2_135m-cpu.yaml"),
        "--held-out",
        "--limit",
        "4",
        "--out",
        str(tmp_path),
    )
    assert result["n"] == 4 and result["failed"] == 0 and result["name"] == model.name
