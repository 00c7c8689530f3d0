"""Verdicts of own agents where several user turns, tools that only read, or few workers are involved."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pact_nemo.checkout import ROOT
from pact_nemo.config.load import load_config
from pact_nemo.config.schema import Config
from pact_nemo.data.conversations import conversations_of, import_traces
from pact_nemo.data.task_traces import with_reference_calls
from pact_nemo.data.tasks import build_environment
from pact_nemo.environments.base import Environment, Task, ToolCall
from pact_nemo.environments.own.signatures import as_text
from pact_nemo.errors import ConfigError, DataError
from pact_nemo.runtime.quarantine import Quarantine
from pact_nemo.traces.schema import Trace, TraceTurn

TOOLS = '''
class Shop:
    def __init__(self, task):
        self.stock = dict(task["info"]["stock"])

    def lookup(self, sku: str) -> int:
        """Pieces in stock."""
        return self.stock[sku]

    def order(self, sku: str, count: int) -> str:
        """Order pieces."""
        self.stock[sku] -= count
        return f"ordered {count}"
'''
STATE = "\n    def state(self):\n        return self.stock\n"
LOOKUP = ToolCall("lookup", {"sku": "A1"})
Open = Callable[..., tuple[Config, Environment]]


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"name": name, "arguments": arguments}


def asks(words: str) -> dict[str, Any]:
    return {"role": "user", "content": words}


def looks_up(answer: str) -> list[dict[str, Any]]:
    function = {"name": "lookup", "arguments": '{"sku": "A1"}'}
    return [
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "function": function}]},
        {"role": "tool", "tool_call_id": "c", "content": "3"},
        {"role": "assistant", "content": answer},
    ]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    environments = []

    def open_(rows: list[dict[str, Any]], *words: str, source: str = TOOLS, told: Any = ()) -> Any:
        for name, content in (("tasks", rows), ("talks", told)):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
        (tmp_path / "shop.py").write_text(source)
        given = [f"agent.tools={tmp_path}/shop.py:Shop", f"tasks.path={tmp_path}/tasks.jsonl", *words]
        given += [f"traces.path={tmp_path}/talks.jsonl"] if told else []
        config = load_config(ROOT / "conf" / "pact_own-smollm2_135m-cpu.yaml", given)
        environments.append(build_environment(config, Quarantine("strict")))
        return config, environments[-1]

    yield open_
    for environment in environments:
        environment.close()


def row(**more: Any) -> dict[str, Any]:
    return {"id": "t", "question": "How many A1?", "info": {"stock": {"A1": 3}}, **more}


def score_of(environment: Environment, task: Task, calls: list[ToolCall]) -> float:
    session = environment.start(task)
    try:
        session.execute(calls) if calls else None
        assert session.next_user_turn("Done.") is None
        return session.outcome().score
    finally:
        session.close()


def test_one_worker_does_not_wait_for_itself(tmp_path: Path) -> None:
    """In a process of its own: where it hangs, the time ends the test."""
    (tmp_path / "shop.py").write_text(TOOLS + STATE)
    (tmp_path / "tasks.jsonl").write_text(json.dumps(row(expected_calls=[call("order", sku="A1", count=2)])))
    source = f"""
from pact_nemo.config.load import load_config
from pact_nemo.data.task_traces import with_reference_calls
from pact_nemo.data.tasks import build_environment
from pact_nemo.environments.base import ToolCall
from pact_nemo.runtime.quarantine import Quarantine
from pact_nemo.traces.schema import Trace, TraceTurn
words = ["agent.tools={tmp_path}/shop.py:Shop", "tasks.path={tmp_path}/tasks.jsonl", "agent.workers=1"]
environment = build_environment(load_config("{ROOT}/conf/pact_own-smollm2_135m-cpu.yaml", words), Quarantine())
(task,) = environment.tasks()
for count in (2, 1):
    session = environment.start(task)
    session.execute([ToolCall("order", {{"sku": "A1", "count": count}})])
    session.next_user_turn("Done.")
    print(session.outcome().score)
    session.close()
environment.close()
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout.split() == ["1.0", "0.0"], done.stderr


def test_nobody_waits_for_calls_of_tools_that_only_read(opened: Open) -> None:
    expected = [call("lookup", sku="A1"), call("order", sku="A1", count=1)]
    _, environment = opened([row(expected_calls=expected)], "agent.read_only=[lookup]")
    (task,) = environment.tasks()
    order = ToolCall("order", {"sku": "A1", "count": 1})
    assert task.reference_calls == ((order,),)
    assert [score_of(environment, task, calls) for calls in ([order], [LOOKUP, order], [LOOKUP], [])] == [1, 1, 0, 0]


def test_a_task_that_only_reads_is_refused_where_nothing_else_judges(opened: Open) -> None:
    only = [row(expected_calls=[call("lookup", sku="A1")])]
    with pytest.raises(DataError, match=r"agent\.read_only"):
        opened(only, "agent.read_only=[lookup]")[1].tasks()
    assert opened([{**only[0], "answer": "3"}], "agent.read_only=[lookup]")[1].tasks()
    with pytest.raises(ConfigError, match=r"agent\.read_only names 'lokup'; the tools are .*lookup"):
        opened(only, "agent.read_only=[lokup]")[1].tasks()


def test_the_last_turns_words_are_judged_though_it_calls_nothing(opened: Open) -> None:
    talk = {
        "task_id": "t",
        "messages": [asks("How many A1?"), *looks_up("There are 3."), asks("And twice that?")],
    }
    rows = [row(user_turns=["And twice that?"], answer="6")]
    kept = []
    for last in ("That is 6.", "That is 7."):
        told = [{**talk, "messages": [*talk["messages"], {"role": "assistant", "content": last}]}]
        config, environment = opened(rows, told=told)
        tasks = environment.tasks()
        conversations = conversations_of(config, Quarantine()) or []
        assert conversations[0].answers == ("There are 3.", last)
        kept.append(import_traces(config, environment, conversations, tasks))
    assert list(kept[0][0]) == ["t"] and not kept[0][1]
    assert not kept[1][0] and kept[1][1] == {"replay_low_score": 1}


def test_with_the_first_turn_alone_longer_conversations_teach_that_turn(opened: Open) -> None:
    messages = [asks("How many A1?"), *looks_up("There are 3."), asks("Again?"), *looks_up("Still 4.")]
    told = [{"task_id": "t", "messages": messages}]
    config, environment = opened([row(answer="3")], "agent.user_turns=first", told=told)
    conversations = conversations_of(config, Quarantine()) or []
    found, rejected = import_traces(config, environment, conversations, environment.tasks())
    assert not rejected
    (trace,) = found["t"]
    assert [turn.calls for turn in trace.turns] == [(LOOKUP,)] and trace.later_user_turns == ()


def test_a_set_is_observed_in_one_order() -> None:
    texts = {as_text({"skus": set(names)}) for names in ("abcdefgh", "hgfedcba")}
    assert texts == {'{"skus": ["a", "b", "c", "d", "e", "f", "g", "h"]}'}


def test_calls_of_a_trace_keep_their_user_turn_as_reference_calls() -> None:
    turns = tuple(({"role": "user", "content": words},) for words in ("One?", "Two?"))
    task = Task("t", "t", "own", turns, (), ((), ()))
    order = ToolCall("order", {"sku": "A1", "count": 1})
    trace = Trace("t", "teacher", (TraceTurn((), (LOOKUP,), ("3",)), TraceTurn((), (order,), ("ok",), 1)), True)
    assert with_reference_calls(task, trace).reference_calls == ((LOOKUP,), (order,))
    anywhere = with_reference_calls(replace(task, any_turn=True), trace)
    assert anywhere.reference_calls == ((LOOKUP, order),)
