"""An agent of the user's own: rows to tasks, conversations to traces, verdicts, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pact_nemo.checkout import ROOT
from pact_nemo.config.load import load_config
from pact_nemo.data.conversations import conversations_of, import_traces
from pact_nemo.data.tasks import build_environment
from pact_nemo.environments.base import ToolCall
from pact_nemo.environments.own.expected_calls import ExpectedCalls
from pact_nemo.environments.own.names import Aliases
from pact_nemo.environments.own.scoring import answer_score
from pact_nemo.environments.rows import Row
from pact_nemo.errors import ConfigError, DataError
from pact_nemo.runtime.quarantine import Quarantine

SHOP = ROOT / "examples" / "shop"
STOCK = {"A1": {"price": 12, "count": 3}}


def written(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config_of(*words: str):
    return load_config(
        ROOT / "conf" / "pact_own-smollm2_135m-cpu.yaml", [f"agent.tools={SHOP / 'shop.py'}:Shop", *words]
    )


@pytest.fixture
def opened(request):
    environments = []

    def open_(*words: str, policy: str = "strict"):
        config = config_of(*words)
        environments.append(build_environment(config, Quarantine(policy)))
        return config, environments[-1]

    yield open_
    for environment in environments:
        environment.close()


def order(count: int) -> dict:
    return {"name": "order", "arguments": {"sku": "A1", "count": count}}


def play(environment, task, calls, closing="Done."):
    session = environment.start(task)
    try:
        observations = session.execute([ToolCall(call["name"], call["arguments"]) for call in calls])
        while session.next_user_turn(closing) is not None:
            pass
        return observations, session.outcome()
    finally:
        session.close()


@pytest.mark.parametrize(
    ("calls", "score"),
    [([order(2)], 1.0), ([order(1), order(1)], 0.0), ([], 0.0), ([order(9), order(2)], 1.0), ([order(3)], 0.0)],
)
def test_the_state_after_the_expected_calls_is_the_judge(tmp_path, opened, calls, score):
    row = {"id": "t", "question": "Two A1.", "info": {"stock": STOCK}, "expected_calls": [order(2)]}
    _, environment = opened(f"tasks.path={written(tmp_path / 'tasks.jsonl', [row])}")
    (task,) = environment.tasks()
    observations, outcome = play(environment, task, calls)
    assert (outcome.score, outcome.success) == (score, score == 1.0)
    failed = [text for text in observations if text.startswith("Error:")]
    assert outcome.metrics["invocation_errors"] == len(failed) == sum(c["arguments"]["count"] == 9 for c in calls)


def test_episodes_share_no_state(tmp_path, opened):
    row = {"id": "t", "question": "Two A1.", "info": {"stock": STOCK}, "expected_calls": [order(2)]}
    _, environment = opened(f"tasks.path={written(tmp_path / 'tasks.jsonl', [row])}")
    (task,) = environment.tasks()
    first, second = environment.start(task), environment.start(task)
    for session in (first, second):
        assert session.execute([ToolCall("order", {"sku": "A1", "count": 3})]) == ["ordered 3 of A1"]
        session.close()


def test_the_closing_message_is_judged_by_the_answer(tmp_path, opened):
    row = {"id": "t", "question": "Price of A1?", "info": {"stock": STOCK}, "answer": "12"}
    _, environment = opened(f"tasks.path={written(tmp_path / 'tasks.jsonl', [row])}", "agent.answer=number")
    (task,) = environment.tasks()
    look = [{"name": "lookup", "arguments": {"sku": "A1"}}]
    assert play(environment, task, look, "It costs 12.0 dollars")[1].score == 1.0
    assert play(environment, task, look, "It costs 120")[1].score == 0.0
    assert play(environment, task, look, "<think>12</think>")[1].reason == "no closing message"


@pytest.mark.parametrize(
    ("rule", "message", "answer", "score"),
    [
        ("contains", "That is 59.80 in all.", "59.80", 1.0),
        ("contains", "That is 159.80.", "59.80", 0.0),
        ("contains", "That is 59.80.", 59.8, 1.0),
        ("contains", "It costs 4.50.", "4", 0.0),
        ("contains", "It is -4 degrees.", "4", 0.0),
        ("contains", "It is 3-4 miles.", "4", 1.0),
        ("contains", "options 3,4 apply", "34", 0.0),
        ("contains", "version 1.2.3", "1.2", 0.0),
        ("contains", "agent 7", "007", 0.0),
        ("contains", "order 1000002", "1000001", 0.0),
        ("contains", "caf\u00e9", "cafe\u0301", 1.0),
        ("number", "\u22125 degrees", "-5", 1.0),
        ("contains", "It costs 4,50.", "4", 0.0),
        ("contains", "It costs 4,50.", "50", 0.0),
        ("contains", "It costs 1,234, no more.", "1234", 1.0),
        ("contains", "2.4 apples", "4 apples", 0.0),
        ("contains", "-4 apples", "4 apples", 0.0),
        ("contains", "It costs 4.50", "costs 4", 0.0),
        ("contains", "It costs 4.", "costs 4", 1.0),
        ("contains", "Room 3,4 apples", "34 apples", 0.0),
        ("contains", "In Paris, France", "paris france", 1.0),
        ("contains", "1.007 g", "007", 0.0),
        ("contains", "It is -5.", "\u22125", 1.0),
        ("contains", "1e99999999999999999999 or 3", "3", 1.0),
        ("exact", "59.80", 59.8, 1.0),
        ("exact", "7", "007", 0.0),
        ("exact", "caf\u00e9", "cafe\u0301", 1.0),
        ("f1", "caf\u00e9", "cafe\u0301", 1.0),
        ("number", "1e400", "2e500", 0.0),
        ("number", "1e1000000", "3", 0.0),
        ("number", "1e999999999999999999", "-1e999999999999999999", 0.0),
        ("number", "3 and 1e99999999999999999999", "3", 1.0),
        ("number", "0.3333333", str(1 / 3), 1.0),
        ("exact", "<answer>Paris</answer> it is", "paris", 1.0),
        ("exact", "Paris it is", "paris", 0.0),
        ("f1", "the red door", "red door", 0.8),
        ("number", "first 3, then 1,250.50", "1250.5", 1.0),
        ("number", "none", "3", 0.0),
        ("json", 'So:\n```json\n{"a": [1, 2.0]}\n```', {"a": [1.0, 2]}, 1.0),
        ("json", '{"a": true}', {"a": 1}, 0.0),
        ("json", "x [1, 2] y", [1, 2], 1.0),
    ],
)
def test_answers(rule, message, answer, score):
    assert answer_score(rule, message, [answer]) == pytest.approx(score)


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ({"question": None}, "messages", "one of messages, prompt, question is the request; found none"),
        ({"prompt": "x"}, "messages", "found prompt, question"),
        ({"answer": None}, "answer", "nothing tells right from wrong"),
        ({"answer": ""}, "answer", "is empty, so that it tells right from wrong in no message"),
        ({"answer": {"a": 1}}, "answer", "use agent.answer=json"),
        ({"tools": ["lookup", "lookup"]}, "tools[1]", "the tool 'lookup' is there twice; take one out"),
        ({"tools": ["sell"]}, "tools[0]", "the tool 'sell' does not exist; there are: lookup, order"),
        ({"expected_calls": [{"name": "sell"}]}, "expected_calls[0]", "the tool 'sell' does not exist"),
        ({"expected_calls": [{"tool": "order"}]}, "expected_calls[0]", "expected a call such as"),
        ({"expected_calls": [{"name": "order", "sku": "A1"}]}, "expected_calls[0]", "the key 'sku' is none of these"),
        ({"expected_calls": [{"name": "order", "arguments": []}]}, "expected_calls[0]", "object"),
        (
            {"expected_calls": [{"name": "order", "arguments": {}, "kwargs": {"sku": "A1"}}]},
            "expected_calls[0]",
            "arguments and kwargs differ",
        ),
        ({"expected_calls": [[order(1)], [order(1)]]}, "expected_calls", "calls of 2 user turns, and there are 1"),
        ({"question": None, "messages": [{"role": "assistant", "content": "x"}]}, "messages[0]", "traces.path"),
        ({"user_turns": [3]}, "user_turns[0]", "expected a text or a list of messages"),
    ],
)
def test_a_bad_row_is_refused_with_file_row_and_field(tmp_path, opened, change, field, message):
    good = {"id": "g", "question": "Price of A1?", "info": {"stock": STOCK}, "answer": "12"}
    path = written(tmp_path / "tasks.jsonl", [good, {**good, "id": "b", **change}])
    _, environment = opened(f"tasks.path={path}")
    with pytest.raises(DataError) as raised:
        environment.tasks()
    text = str(raised.value)
    assert text.startswith(f"{path}:2: ") and message in text and text.endswith(f"[field {field}]")


def test_two_rows_of_one_id_are_refused(tmp_path, opened):
    row = {"id": "g", "question": "Price of A1?", "info": {"stock": STOCK}, "answer": "12"}
    _, environment = opened(f"tasks.path={written(tmp_path / 'tasks.jsonl', [row, row])}")
    with pytest.raises(DataError, match=r"tasks\.jsonl:2: row 1 has the id 'g' already"):
        environment.tasks()


def conversation(count: int, **more) -> dict:
    function = {"name": "order", "arguments": json.dumps(order(count)["arguments"])}
    return {
        "messages": [
            {"role": "user", "content": f"Please order {count} of A1."},
            {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "function": function}]},
            {"role": "tool", "tool_call_id": "c", "content": f"ordered {count} of A1"},
            {"role": "assistant", "content": "Done."},
        ],
        "info": {"stock": STOCK},
        **more,
    }


@pytest.mark.parametrize(
    ("verify", "kept"),
    [("replay", ["a"]), ("reward", ["a", "b"]), ("none", ["a", "b", "c"])],
    ids=lambda each: str(each),
)
def test_conversations_alone_are_tasks_and_traces(tmp_path, opened, verify, kept):
    rows = [
        conversation(2, task_id="a", reward=1.0),
        conversation(4, task_id="b", reward=1.0),  # only three are there: executed anew, it is an error
        conversation(1, task_id="c", reward=0.5),
    ]
    if verify == "replay":
        rows.pop()
    path = written(tmp_path / "c.jsonl", rows)
    config, environment = opened(f"traces.path={path}", f"traces.verify={verify}")
    tasks = environment.tasks()
    assert [task.id for task in tasks] == [row["task_id"] for row in rows]
    assert tasks[0].user_turns == (({"role": "user", "content": "Please order 2 of A1."},),)
    told = conversations_of(config, Quarantine())
    assert told is not None
    found, rejected = import_traces(config, environment, told, tasks)
    assert list(found) == kept
    assert sum(rejected.values()) == len(rows) - len(kept)
    assert found["a"][0].turns[0].calls == (ToolCall("order", {"sku": "A1", "count": 2}),)


def test_a_conversation_lends_its_calls_to_the_task_that_begins_with_its_words(tmp_path, opened):
    row = {"id": "mine", "question": "Please order 2 of A1.", "info": {"stock": STOCK}}
    tasks = written(tmp_path / "tasks.jsonl", [row])
    config, environment = opened(
        f"tasks.path={tasks}", f"traces.path={written(tmp_path / 'c.jsonl', [conversation(2)])}"
    )
    (task,) = environment.tasks()
    assert task.reference_calls == ((ToolCall("order", {"sku": "A1", "count": 2}),),)
    told = conversations_of(config, Quarantine())
    found, rejected = import_traces(config, environment, told, [task])
    assert list(found) == ["mine"] and not rejected


def test_names_that_a_format_cannot_carry_get_aliases_both_ways():
    tool = {
        "name": "flights.search",
        "description": "",
        "parameters": {"type": "object", "properties": {"from": {}, "filter[status]": {}}, "required": ["from"]},
    }
    python, as_json = Aliases([tool], True), Aliases([tool], False)
    assert python.schemas[0]["name"] == "flights_search"
    assert list(python.schemas[0]["parameters"]["properties"]) == ["from_", "filter_status"]
    assert python.schemas[0]["parameters"]["required"] == ["from_"]
    assert list(as_json.schemas[0]["parameters"]["properties"]) == ["from", "filter[status]"]
    call = ToolCall("flights.search", {"from": "FRA", "other": 1})
    assert python.shown(call) == ToolCall("flights_search", {"from_": "FRA", "other": 1})
    assert python.own(python.shown(call)) == call
    other = {**tool, "name": "flights/search"}
    with pytest.raises(ConfigError, match=r"'flights\.search' and 'flights/search' would both"):
        Aliases([tool, other], False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["agent.isolation=none"], "agent.isolation='none': must be one of process, thread"),
        (["agent.mcp.command=[x]"], "give one of them"),
        (["agent.tools=null", "agent.mcp.command=[x]", "agent.isolation=sandbox"], "isn't confined"),
        (["traces.verify=maybe"], "traces.verify"),
        (["agent.fields={tool: x}"], "agent.fields: no field 'tool' of ours"),
        (["agent.workers=0"], "agent.workers=0: must be >= 1"),
    ],
)
def test_settings_are_refused_by_name(words, message):
    with pytest.raises(ConfigError) as raised:
        config_of("tasks.path=x", *words)
    assert message in str(raised.value)


def test_the_section_agent_belongs_to_own_agents(tmp_path):
    with pytest.raises(ConfigError, match="agent.* are settings of environment=own, and this is environment=bfcl"):
        load_config(None, ["agent.tools=x.py:X"])
    file = tmp_path / "mine.yaml"
    file.write_text(f"environment: own\nagent:\n  tools: {SHOP / 'shop.py'}:Shop\n  timeout: 3\n")
    assert load_config(file).environment_config.timeout == 3.0
    file.write_text("agent:\n  timeout: 3\n")
    with pytest.raises(ConfigError, match="settings of environment=own"):
        load_config(file)


def test_the_data_of_the_shop_is_what_its_script_writes(tmp_path, monkeypatch):
    import runpy

    script = runpy.run_path(str(SHOP / "make_data.py"))
    monkeypatch.setitem(script["main"].__globals__, "HERE", tmp_path)
    script["main"]()
    for name in ("tasks.jsonl", "traces.jsonl"):
        assert (tmp_path / name).read_text() == (SHOP / name).read_text()


@pytest.mark.parametrize(
    ("call", "field"),
    [
        ({"name": "order", "arguments": {"sku": "A1", "count": "two"}}, "arguments.count"),
        ({"name": "order", "arguments": {"sku": "A1", "count": 1, "gift": True}}, "arguments.gift"),
        ({"name": "order", "arguments": {"sku": "A1"}}, "arguments"),
    ],
)
def test_an_expected_call_that_the_tool_refuses_is_a_bad_row(tmp_path, opened, call, field):
    """Training reads rows as the check does; so the row is in quarantine, and the others stay."""
    rows = [
        {"id": f"t{index}", "question": f"A1, {index}.", "info": {"stock": STOCK}, "expected_calls": [one]}
        for index, one in enumerate([order(1), call])
    ]
    path = written(tmp_path / "tasks.jsonl", rows)
    _, environment = opened(f"tasks.path={path}", policy="quarantine")
    assert [task.id for task in environment.tasks()] == ["t0"]
    (bad,) = environment._setup.quarantine.rows
    assert (bad.error.file, bad.error.line, bad.error.field) == (str(path), 2, f"expected_calls[0].{field}")
    assert "'order'" in str(bad.error) and "repair the row" in str(bad.error)


def test_null_for_an_argument_that_may_be_left_out_is_no_fault():
    text = {"type": "string"}
    properties = {"day": text, "to": {"type": "object", "properties": {"at": text}}}
    parameters = {"type": "object", "properties": properties, "required": ["to"]}
    aliases = Aliases([{"name": "f", "description": "", "parameters": parameters}], False)
    reader = ExpectedCalls(aliases, closed=True, any_turn=False)
    call = {"name": "f", "arguments": {"day": None, "to": {"at": None}}}
    assert reader.read(Row({"expected_calls": [call]}, "x", 1), 1) == [[ToolCall("f", call["arguments"])]]
    with pytest.raises(DataError, match=r"expected_calls\[0\].arguments.to"):
        reader.read(Row({"expected_calls": [{"name": "f", "arguments": {"to": None}}]}, "x", 1), 1)
