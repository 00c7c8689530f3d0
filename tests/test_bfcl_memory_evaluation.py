"""``tools/evaluate.py`` on BFCL's memory categories: conversations before questions, one folder an evaluation, verdicts
that are bfcl-eval's own, and a cut evaluation that goes on.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pact_nemo.environments.bfcl.agentic_data import AgenticEntry, load_agentic
from tests.test_evaluate_tool import ROOT, ChatServer, evaluate

ENTRIES = {
    category: {entry.id: entry for entry in load_agentic(category)} for category in ("memory_kv", "memory_rec_sum")
}
BOTH = "environment_config.categories=[memory_kv,memory_rec_sum]"
KV = "environment_config.categories=[memory_kv]"


def of_chain(chain: str) -> list[AgenticEntry]:
    return [entry for entry in ENTRIES["memory_kv"].values() if entry.chain == chain]


class Person(ChatServer):
    """In each of the customer's first seven conversations, which the core memory has room for, keeps which one it is;
    answers every other question of that chain, if the prompt shows all seven.

    Attributes:
        log: first message of the conversation of each message that came, or the question.
        broken: first messages of conversations whose third message gets no answer.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self.broken: set[str] = set()
        self.delay = 0.0
        self.wanted = {e.user_turns[0][-1]["content"]: e for e in of_chain("customer") if not e.is_conversation}
        self.first = [e.user_turns[0][-1]["content"] for e in of_chain("customer") if e.is_conversation]
        super().__init__(self.spoken)

    def spoken(self, messages: list[dict[str, Any]]) -> dict[str, Any]:
        said = [message["content"] for message in messages if message["role"] == "user"]
        system, question = messages[0]["content"], self.wanted.get(said[0])
        time.sleep(self.delay)
        self.log.append(said[0])
        if question is not None:
            remembers = all(f"conversation {i}" in system for i in range(7))
            answer = question.answers[0] if remembers and int(question.id.rsplit("-", 1)[1]) % 2 == 0 else "no idea"
            return {"content": f"{{'answer': '{answer}', 'context': 'From memory.'}}"}
        if said[0] in self.broken and len(said) == 3:
            raise ConnectionError("this conversation breaks off")
        number = self.first.index(said[0])
        if len(said) > 1 or messages[-1]["role"] == "tool" or number > 6:
            return {"content": "I see."}
        arguments = json.dumps({"key": f"k_{number}", "value": f"conversation {number}"})
        call = {"id": "1", "type": "function", "function": {"name": "core_memory_add", "arguments": arguments}}
        return {"content": "", "tool_calls": [call]}


@pytest.fixture
def person() -> Iterator[Person]:
    made = Person()
    yield made
    made.server.shutdown()


def words(server: ChatServer, out: Path, *more: str) -> list[str]:
    return ["--model", server.url, "--name", "scripted", "--out", str(out), "rollout.sampling.concurrency=8", *more]


def rows(out: Path) -> dict[str, dict[str, Any]]:
    return {row["task_id"]: row for row in map(json.loads, (out / "episodes.jsonl").read_text().splitlines())}


def test_questions_are_asked_of_what_the_conversations_left(tmp_path: Path, person: Person) -> None:
    from bfcl_eval.eval_checker.agentic_eval.agentic_checker import agentic_checker

    result = evaluate(*words(person, tmp_path, "--limit", "10", KV))
    assert (result["score"], result["n"], result["failed"]) == (0.5, 10, 0)
    assert result["prerequisites"] == {"n": 10, "failed": [], "not_played": []}
    assert result["categories"] == {"memory_kv": {"score": 0.5, "n": 10}}
    episodes = rows(tmp_path)
    assert len(episodes) == 20
    for name, entry in ENTRIES["memory_kv"].items():
        if name in episodes and not entry.is_conversation:
            official = agentic_checker(episodes[name]["turns"][-1]["text"], list(entry.answers))["valid"]
            assert episodes[name]["outcome"]["success"] is official
    starts = [person.log.index(words) for words in person.first]
    assert starts == sorted(starts), "one conversation after another"
    saved = sorted(path.name for path in (tmp_path / "memory").glob("*.json"))
    assert saved == sorted(f"{e.id}.json" for e in of_chain("customer") if e.is_conversation)
    scores = tmp_path / "score" / "scripted" / "agentic" / "memory" / "kv" / "BFCL_v4_memory_kv_score.json"
    assert json.loads(scores.read_text().splitlines()[0]) == {
        "accuracy": 0.5,
        "correct_count": 5,
        "total_count": 10,
    }
    assert not list((tmp_path / "score").rglob("*prereq*"))


def test_what_failed_is_named_and_played_again_with_all_that_builds_on_it(tmp_path: Path, person: Person) -> None:
    """The same evaluation goes on: nothing that stands is played twice, nothing that doesn't is believed."""
    person.broken = {person.first[4]}
    again = words(person, tmp_path, "--limit", "4", KV)
    chain = [entry.id for entry in of_chain("customer") if entry.is_conversation]
    (tmp_path / "memory").mkdir()
    for name in chain:  # what another evaluation left, which was killed before it saved an episode
        stale = {"core_memory": {"k_0": "conversation 0"}, "archival_memory": {}}
        (tmp_path / "memory" / f"{name}.json").write_text(json.dumps(stale))
    result = evaluate(*again)
    assert result["prerequisites"]["failed"] == chain[4:]
    assert result["prerequisites"]["not_played"] == [f"memory_kv_{i}-customer-{i}" for i in range(4)]
    assert (result["score"], result["n"], result["failed"]) == (0.0, 4, 4)
    assert chain[4] in rows(tmp_path)[chain[5]]["error"] and "left no memory" in rows(tmp_path)[chain[5]]["error"]
    assert sorted(path.stem for path in (tmp_path / "memory").glob("*.json")) == sorted(chain[:4])
    person.broken, person.log = set(), []
    result = evaluate(*again)
    assert (result["score"], result["failed"]) == (0.5, 0)
    assert result["prerequisites"] == {"n": 10, "failed": [], "not_played": []}
    assert not set(person.first[:4]) & set(person.log), "conversations that stand are not held twice"


def test_a_killed_evaluation_goes_on(tmp_path: Path, person: Person) -> None:
    person.delay = 0.02
    again = words(person, tmp_path, "--limit", "2", "--chunk", "3", KV)
    command = [sys.executable, str(ROOT / "tools" / "evaluate.py"), *again, "--json"]
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    chain = [entry.id for entry in of_chain("customer") if entry.is_conversation]
    deadline = time.monotonic() + 120
    while not (tmp_path / "memory" / f"{chain[4]}.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(running.pid, signal.SIGKILL)
    running.wait(30)
    assert 3 <= len(rows(tmp_path)) < 12
    person.delay, before = 0.0, set(rows(tmp_path))
    result = evaluate(*again)
    assert (result["score"], result["n"], result["prerequisites"]["failed"]) == (0.5, 2, [])
    assert before < set(rows(tmp_path)) and len(rows(tmp_path)) == 12
    last = json.loads((tmp_path / "memory" / f"{chain[9]}.json").read_text())
    assert sorted({**last["core_memory"], **last["archival_memory"]}) == sorted(f"k_{i}" for i in range(7))


@pytest.mark.slow
def test_all_conversations_and_questions_of_both_backends(tmp_path: Path) -> None:
    server = ChatServer(lambda messages: {"content": "{'answer': 'I do not know', 'context': 'I do not know'}"})
    result = evaluate(*words(server, tmp_path, BOTH))
    server.server.shutdown()
    assert (result["score"], result["n"], result["failed"]) == (0.0, 310, 0)
    assert result["prerequisites"] == {"n": 74, "failed": [], "not_played": []}
    assert {name: row["n"] for name, row in result["categories"].items()} == {"memory_kv": 155, "memory_rec_sum": 155}
