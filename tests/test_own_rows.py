"""Rows and settings of an own agent that would be taken for something else are refused by name."""

from __future__ import annotations

import pytest

from pact_nemo.data.tasks import build_environment
from pact_nemo.environments.base import Task, ToolCall
from pact_nemo.errors import ConfigError, DataError
from pact_nemo.runtime.quarantine import Quarantine
from tests.test_own_environment import STOCK, config_of, order, written


def tasks_of(*words: str) -> list[Task]:
    environment = build_environment(config_of(*words), Quarantine("strict"))
    try:
        return environment.tasks()
    finally:
        environment.close()


@pytest.mark.parametrize("key", ["arguments", "parameters", "args", "kwargs", "input"])
def test_arguments_of_an_expected_call_are_read_under_every_key_that_calls_have(tmp_path, key):
    row = {
        "question": "A1.",
        "info": {"stock": STOCK},
        "expected_calls": [{"name": "order", key: order(2)["arguments"]}],
    }
    (task,) = tasks_of(f"tasks.path={written(tmp_path / 't.jsonl', [row])}")
    assert task.reference_calls == ((ToolCall("order", {"sku": "A1", "count": 2}),),)


def test_a_field_under_two_names_is_refused_and_one_may_serve_two(tmp_path):
    row = {"id": "a", "gold": "4", "question": "q", "answer": "5", "info": {"stock": STOCK}}
    with pytest.raises(DataError, match="takes 'answer' from 'gold', and the row has both"):
        tasks_of(f"tasks.path={written(tmp_path / 't.jsonl', [row])}", "agent.fields={answer: gold}")
    row = {"id": "a", "grp": "g", "question": "q", "answer": "5", "info": {"stock": STOCK}}
    path = written(tmp_path / "u.jsonl", [row])
    (task,) = tasks_of(f"tasks.path={path}", "agent.fields={group: grp, category: grp}")
    assert (task.group, task.category) == ("g", "g")
    with pytest.raises(ConfigError, match="takes 'group' from 'scenaro', which no row of .*; they have answer, grp"):
        tasks_of(f"tasks.path={path}", "agent.fields={group: scenaro}")


def talk(words: str, **more: object) -> dict:
    call = {"id": "c", "type": "function", "function": {"name": "order", "arguments": '{"sku": "A1", "count": 1}'}}
    messages = [
        {"role": "user", "content": words},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "ok"},
        {"role": "assistant", "content": "Done."},
    ]
    return {"messages": messages, **more}


@pytest.mark.parametrize(
    "more", [[], ["agent.user_turns=endpoint", "agent.user.url=http://x/v1", "agent.user.model=m"]]
)
@pytest.mark.parametrize(
    ("words", "stock", "fault"), [("Two.", STOCK, "begins with other words"), ("One.", {}, "has other info")]
)
def test_two_requests_of_one_task_id_are_refused(tmp_path, words, stock, fault, more):
    one, other = (talk(said, task_id="t", info={"stock": held}) for said, held in (("One.", STOCK), (words, stock)))
    path = written(tmp_path / "c.jsonl", [one, talk("One.", task_id="t"), other])
    with pytest.raises(DataError, match=f"line 1 has the task_id 't' too, and {fault}") as refusal:
        tasks_of(f"traces.path={path}", *more)
    assert refusal.value.line == 3


def test_a_conversation_that_fits_two_tasks_is_refused(tmp_path):
    rows = [{"id": name, "question": "What?", "info": {"stock": STOCK, "k": name}} for name in "ab"]
    tasks, path = written(tmp_path / "t.jsonl", rows), tmp_path / "c.jsonl"
    for told in ([talk("What?")], [talk("What?", task_id="a"), talk("What?")]):
        with pytest.raises(DataError, match="'a' and 'b' begin with the same words"):
            tasks_of(f"tasks.path={tasks}", f"traces.path={written(path, told)}")
    written(path, [talk("What?", task_id="a"), talk("What?", task_id="b")])
    read = tasks_of(f"tasks.path={tasks}", f"traces.path={path}")
    assert [len(task.reference_calls[0]) for task in read] == [1, 1]


def test_a_field_of_conversations_under_two_names_is_refused(tmp_path):
    path = written(tmp_path / "c.jsonl", [talk("What?", task_id="a", episode="b")])
    with pytest.raises(
        DataError, match="c.jsonl:1: traces.fields takes 'task_id' from 'episode', and the row has both"
    ):
        tasks_of(f"traces.path={path}", "traces.fields={task_id: episode}")


def test_a_field_of_conversations_that_no_row_has_is_refused(tmp_path):
    path = written(tmp_path / "c.jsonl", [talk("What?")])
    with pytest.raises(ConfigError, match="traces.fields takes 'task_id' from 'nope', which no row of"):
        tasks_of(f"traces.path={path}", "traces.fields={task_id: nope}")


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["agent.mcp.rename={a: b}"], "agent.mcp.rename"),
        (["agent.mcp.include=[a]"], "agent.mcp.include"),
        (["agent.mcp.timeout=5"], "agent.mcp.timeout"),
        (["agent.mcp.shared=true"], "agent.mcp.shared"),
        (["agent.tools=null", "agent.mcp.command=[x]", "agent.include=[a]"], "agent.include"),
        (["agent.tools=null", "agent.mcp.command=[x]", "agent.timeout=5"], "agent.timeout"),
        (["agent.tools=null", "agent.mcp.command=[x]", "agent.memory_mb=512"], "agent.memory_mb"),
        (["agent.tools=null", "agent.mcp.command=[x]", "agent.isolation=thread"], "agent.isolation"),
        (["agent.judge.model=m"], "agent.judge.model"),
        (["agent.user.instructions=x.txt"], "agent.user.instructions"),
    ],
)
def test_a_setting_that_nothing_would_read_is_refused(words, key):
    with pytest.raises(ConfigError, match=f"^{key}: is (read|set)"):
        config_of("tasks.path=t.jsonl", *words)


@pytest.mark.parametrize("word", ["agent.timeout=soon", "agent.bogus=1", "agent.mcp.bogus=1", "agent.mcp.timeout=soon"])
def test_a_wrong_setting_is_named_as_it_was_written(word):
    key = word.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"^command line '{word}': {key}: "):
        config_of("tasks.path=t.jsonl", word)
