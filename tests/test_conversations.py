"""Conversations in OpenAI's chat format as traces: rules on rows written by hand, refusals by place and reason, what
text turns weigh, and tau-bench's published conversations where they are at hand.
"""

from __future__ import annotations

import copy
import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fixtures.chat_models import KINDS, chat_format
from fixtures.conversations import ROW, TOOLS, call_of, result_of, says, tau_rows, user_says, write_rows

from pact_nemo.chat.conversation_tokens import BOUNDARY_TEXT
from pact_nemo.environments.base import ToolCall
from pact_nemo.errors import ConfigError, DataError
from pact_nemo.objective.components import CALL, OTHER, REASONING
from pact_nemo.runtime.quarantine import Quarantine
from pact_nemo.traces.conversations import Conversation, ImportReport, as_trace, read_conversations
from pact_nemo.traces.filters import reject_reason
from pact_nemo.traces.schema import Trace
from pact_nemo.traces.spans import encode_trace


def _read(tmp_path: Path, row: Mapping[str, Any] = ROW) -> Conversation:
    return read_conversations(write_rows(tmp_path / "c.jsonl", row))[0]


def _of(tmp_path: Path, *messages: Any, **more: Any) -> Conversation:
    return _read(tmp_path, {"messages": [user_says("Do it."), *messages], **more})


def test_a_conversation_becomes_turns_with_their_user_turns(tmp_path: Path) -> None:
    found = _read(tmp_path)
    assert (found.file, found.line, found.task_id, found.reward, found.info) == (
        str(tmp_path / "c.jsonl"), 1, "7", 1.0, {"a": 1},
    )  # fmt: skip
    assert found.opening == ({"role": "system", "content": "Help."}, user_says("Hi"))
    assert found.later == (
        (user_says("I am Mia."),),
        (user_says("Yes, both."), {"role": "system", "content": "Be quick."}),
        (user_says("Thanks!"),),
    )
    assert found.user_turns == (found.opening, *found.later[:2]) and found.answers[0] == "Order 7 is refunded."
    assert found.tools is not None and found.tools[0]["parameters"]["properties"] == {"name": {"type": "string"}}
    greeting, find, refund = found.turns
    assert (greeting.calls, greeting.segments, greeting.said) == ((), (), "Who are you?")
    assert (find.calls, find.observations) == ((ToolCall("find", {"name": "Mia"}),), ("order: 7\nuser: mia",))
    assert (find.closing_message, find.said, find.user_messages_after) == ("Refund order 7?", "", found.later[1])
    assert [call.arguments["order"] for call in refund.calls] == ["7", "8"] and refund.observations == (
        "done 7", "no 8",
    )  # fmt: skip
    assert (refund.reasoning, refund.user_turn, refund.user_messages_after) == ("I refund them.", 2, ())
    assert found.places == (
        (),
        ("messages[4].tool_calls[0]",),
        ("messages[9].tool_calls[0]", "messages[9].tool_calls[1]"),
    )


def test_a_conversation_makes_a_sound_trace_under_other_names(tmp_path: Path) -> None:
    found = _read(tmp_path)
    trace = as_trace(found, "t#1", True, lambda call: replace(call, name=f"shop.{call.name}"))
    assert Trace.from_dict(json.loads(json.dumps(trace.to_dict()))) == trace
    assert (trace.task_id, trace.source, trace.verified) == ("t#1", "conversation", True)
    offered = [{**tool["function"], "name": f"shop.{tool['function']['name']}"} for tool in TOOLS]
    assert reject_reason(trace, offered) is None
    text = trace.turns[1].reasoning
    assert "Use shop.find to help to find." in text and "name='Mia' from the user" in text and "shop.refund" in text
    assert trace.turns[0].segments == () and trace.turns[2].reasoning == "I refund them."
    assert "Thanks" not in json.dumps(trace.to_dict()) and "is refunded" not in json.dumps(trace.to_dict())


def test_without_schemas_the_annotator_says_what_it_knows(tmp_path: Path) -> None:
    found = _read(tmp_path, {"messages": ROW["messages"]})
    assert found.tools is None and found.task_id is None and found.reward is None
    assert as_trace(found, "t", True).turns[1].reasoning == "Use find to go on. name='Mia' from the user."
    named = [{"name": "find", "description": "Looks people up.", "parameters": {"type": "object", "properties": {}}}]
    assert "Use find to look people up." in as_trace(found, "t", True, tools=named, style="compact").turns[1].reasoning


@pytest.mark.parametrize(
    ("message", "reasoning"),
    [
        (says(None, reasoning_content="A"), "A"),
        (says("B", reasoning="A"), "A\n\nB"),
        (says("", thinking="A", reasoning="A"), "A"),
        (says("<think>A</think>B"), "A\n\nB"),
        (says("A</think>"), "A"),
        (
            says([{"type": "thinking", "thinking": [{"type": "text", "text": "A"}]}, {"type": "text", "text": "B"}]),
            "A\n\nB",
        ),
        (says("So: find(name='x')"), "So: find(name='x')"),
    ],
)
def test_reasoning_is_read_wherever_it_stands(tmp_path: Path, message: dict[str, Any], reasoning: str) -> None:
    turn = _of(tmp_path, {**message, "tool_calls": [call_of("find", "1")]}, result_of("x", "1")).turns[0]
    assert turn.reasoning == reasoning
    assert ("explicit_call_preview" in [segment.type for segment in turn.segments]) == ("find(" in reasoning)


def test_assistant_messages_in_a_row_are_one(tmp_path: Path) -> None:
    two = (says("Now.", call_of("find", "a")), says("", call_of("refund", "b")))
    found = _of(
        tmp_path, says(None, reasoning="Hm."), says("Wait."), *two, result_of("1", "a"), result_of("2", "b"),
        says("It"), says(None), says("is."), user_says("More"), says(None), user_says("Hello?"),
        says("", call_of("find", "a")), result_of([], "a"),
    )  # fmt: skip
    assert [call.name for call in found.turns[0].calls] == ["find", "refund"]
    assert (found.turns[0].reasoning, found.turns[0].closing) == ("Hm.\n\nWait.\n\nNow.", "It\n\nis.")
    assert (
        len(found.turns) == 2 and found.later == ((user_says("More"), user_says("Hello?")),) and found.answers[0] == ""
    )


def test_results_without_ids_go_by_order(tmp_path: Path) -> None:
    calls = (call_of("find", None), call_of("refund", None))
    assert _of(tmp_path, says(None, *calls), result_of("1"), result_of("2", "x")).turns[0].observations == ("1", "2")
    half = (call_of("find", "a"), call_of("refund", "b"))
    assert _of(tmp_path, says(None, *half), result_of("1"), result_of("2", "a")).turns[0].observations == ("2", "1")
    older = {"role": "assistant", "content": None, "function_call": {"name": "find", "arguments": '{"name": "x"}'}}
    result = {"role": "function", "name": "find", "content": None}
    found = _of(tmp_path, older, result, functions=[TOOLS[0]["function"]])
    assert found.turns[0].calls == (ToolCall("find", {"name": "x"}),) and found.turns[0].observations == ("",)
    assert found.tools is not None and found.places == (("messages[1].function_call",),)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ('{"name": "x"}', {"name": "x"}),
        (json.dumps('{"name": "x"}'), {"name": "x"}),
        ({"name": "x", "order": None}, {"name": "x"}),
        ('{"name": null}', {"name": None}),
        ('{"name": "{\\"a\\": 1}"}', {"name": '{"a": 1}'}),
    ],
)
def test_arguments_are_read_however_they_are_encoded(tmp_path: Path, written: Any, read: dict[str, Any]) -> None:
    found = _of(tmp_path, says(None, call_of("find", "1", written)), result_of("x", "1"), tools=json.dumps(TOOLS))
    assert found.turns[0].calls[0].arguments == read
    assert _of(tmp_path, says(None, call_of("ls", "1", "")), result_of("x", "1")).turns[0].calls[0].arguments == {}


def _with(path: str, value: Any) -> dict[str, Any]:
    """The good row with one place changed; ``...`` takes it out."""
    row = copy.deepcopy(ROW)
    place: Any = row
    *parents, last = (int(part) if part.isdigit() else part for part in path.split("/"))
    for part in parents:
        place = place[part]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return row


CALL_4 = "messages/4/tool_calls/0/function"
ARGUMENTS = f"{CALL_4}/arguments"


@pytest.mark.parametrize(
    ("path", "value", "reason", "message"),
    [
        ("messages/5", ..., "unanswered_call", "the call of 'find' has no result; repair *[4].tool_calls[0]]"),
        ("messages/10", ..., "unanswered_call", "'refund' has no result*[field messages[9].tool_calls[1]]"),
        ("messages/5/tool_call_id", "c9", "orphan_result", "'c9' is not of the message before*[5].tool_call_id]"),
        ("messages/13", result_of("x", "c2"), "orphan_result", "a result without a call right before it*messages[13]]"),
        ("messages/6", result_of("x", "c1"), "double_result", "the call 'c1' has two results*messages[6]"),
        ("messages/12", result_of("x"), "double_result", "one result more than the 2 calls before it*messages[12]]"),
        ("messages/11/tool_call_id", "c1", "double_result", "the call 'c1' has its result already*messages[11]"),
        ("messages/5/name", "refund", "wrong_result", "of 'refund' answers the call of 'find'*messages[5].name"),
        ("messages/9/tool_calls/1/id", "c2", "bad_call", "two calls of one message have the id 'c2'"),
        (ARGUMENTS, "{'name'}", "bad_arguments", "not valid JSON*[field messages[4].tool_calls[0].function.arguments]"),
        (ARGUMENTS, '{"name": 1, "name": 2}', "bad_arguments", "the key 'name' is there twice"),
        (ARGUMENTS, "[1]", "bad_arguments", "one JSON object, not a list"),
        (ARGUMENTS, '"\\"\\\\\\"x\\\\\\"\\""', "bad_arguments", "one JSON object, not a text"),
        (ARGUMENTS, None, "bad_call", "find needs arguments: name"),
        (f"{CALL_4}/name", "drop", "not_offered", 'tool "drop" is not offered; offered: find, refund'),
        (f"{CALL_4}/name", None, "bad_call", 'a call needs a "name"'),
        ("messages/4/tool_calls", {"a": 1}, "bad_call", "expected a list, found an object"),
        ("messages/4/function_call", {"name": "find"}, "bad_call", "tool_calls or function_call, not both"),
        ("messages/3/content", [{"type": "image_url"}], "not_text", "type 'image_url' is no text*[3].content[0]]"),
        ("messages/5/content", {"a": 1}, "not_text", "found an object*[field messages[5].content]"),
        ("messages/5/content", [{"type": "tool_result"}], "other_format", "Anthropic's format"),
        ("messages/4/reasoning", {"a": 1}, "not_text", "[field messages[4].reasoning]"),
        ("messages/3/role", "model", "bad_role", "the role 'model' is none of system"),
        ("messages/3", "hi", "bad_message", "a message is an object, not a text"),
        ("messages", [{"from": "human", "value": "x"}], "other_format", "this is a chat in ShareGPT format"),
        ("messages", ..., "no_messages", "no 'messages' here: the row has tools, task_id, reward, info"),
        ("messages", "[", "bad_messages", "not valid JSON"),
        ("tools", [TOOLS[0], TOOLS[0]], "bad_tools", "is there twice*[field tools[1]]"),
        ("tools/0", {"name": "", "parameters": {}}, "bad_tools", "not a function description*[field tools[0]]"),
        ("reward", "high", "bad_reward", "expected a number, found 'high'"),
    ],
)  # fmt: skip
def test_what_can_not_be_read_is_refused_by_place(
    tmp_path: Path, path: str, value: Any, reason: str, message: str
) -> None:
    file = write_rows(tmp_path / "c.jsonl", ROW, _with(path, value))
    quarantine, report = Quarantine("quarantine"), ImportReport()
    assert len(read_conversations(file, quarantine, report=report)) == 1
    assert report.dropped == {reason: 1}
    error = str(quarantine.rows[0].error)
    assert error.startswith(f"{file}:2: ") and all(part in error for part in message.split("*")), error
    with pytest.raises(DataError, match="c.jsonl:2: "):
        read_conversations(file)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([user_says("Hi"), says("Hello.")], "no_call"),
        ([{"role": "system", "content": "Hi"}, says(None, call_of("f", "1")), result_of("x", "1")], "no_user_message"),
        (
            [says("Hi!"), user_says("Go."), says(None, call_of("f", "1")), result_of("x", "1")],
            "nothing_before_assistant",
        ),
    ],
)
def test_what_teaches_nothing_is_dropped_by_name(tmp_path: Path, messages: list[Any], reason: str) -> None:
    report = ImportReport()
    assert len(read_conversations(write_rows(tmp_path / "c.jsonl", {"messages": messages}, ROW), report=report)) == 1
    assert (report.kept, report.dropped, report.calls, report.calls_with_words) == (1, {reason: 1}, 3, 2)
    assert str(report).splitlines() == [
        f"conversations: 1 kept, 1 dropped ({reason} 1)",
        "calls: 3, 2 (67 %) with the assistant's own words; the others get annotated reasoning",
        "assistant messages: 6, 4 (67 %) without a call; they are context and are not taught",
    ]
    with pytest.raises(DataError, match=rf"no row can be imported \({reason} 1\)"):
        read_conversations(write_rows(tmp_path / "c.jsonl", {"messages": messages}))


def test_a_file_without_a_good_row_is_refused_whatever_becomes_of_bad_rows(tmp_path: Path) -> None:
    file = tmp_path / "c.jsonl"
    file.write_text("[1]\nx\n" + json.dumps(_with("messages/5", ...)))
    message = r"no row can be imported \(unreadable_row 2, unanswered_call 1\).*the first: .*c.jsonl:1: "
    with pytest.raises(DataError, match=message):
        read_conversations(file, Quarantine("quarantine"))
    file.write_text("")
    with pytest.raises(DataError, match="the file is empty: it has no conversation"):
        read_conversations(file)
    with pytest.raises(DataError, match="no such file of conversations"):
        read_conversations(tmp_path / "absent.jsonl")
    with pytest.raises(ConfigError, match="no field 'chat'; known: messages"):
        read_conversations(file, fields={"chat": "traj"})
    with pytest.raises(DataError, match="no 'traj' here: this is a chat in OpenAI format .* under 'messages'"):
        read_conversations(write_rows(file, ROW), fields={"messages": "traj"})


@pytest.mark.parametrize("kind", KINDS)
def test_text_turns_are_shown_and_not_taught(tmp_path: Path, kind: str) -> None:
    chat, found = chat_format(kind), _read(tmp_path)
    trace = as_trace(found, "t", True)
    tokens = encode_trace(trace, chat)
    assert {component for component, turn in zip(tokens.component, tokens.turn, strict=True) if turn == 0} == {OTHER}
    taught = [i for i, c in zip(tokens.token_ids, tokens.component, strict=True) if c in (CALL, REASONING)]
    text = chat.tokenizer.decode(taught)
    assert all(words not in text for words in ("Who are you", "Refund order 7?")) and "I refund them." in text
    assert "Who are you?" in chat.tokenizer.decode(tokens.token_ids[: tokens.turn_ends[0]])
    if chat.thought is not None:  # the template drops earlier thoughts: ChatML by hand
        assert chat.decode(tokens.token_ids).startswith(
            "<think>\n\n</think>\n\nWho are you?<|im_end|>\n<|im_start|>user"
        )
        return
    messages: list[dict[str, str]] = [*found.opening, {"role": "assistant", "content": "Who are you?"}, *found.later[0]]
    for turn in trace.turns[1:]:
        written = f"{turn.reasoning}\n{chat.tool_format.render_calls(turn.calls)}"
        messages += [{"role": "assistant", "content": written}, *chat.tool_format.render_observation(turn.observations)]
        messages += [{"role": "assistant", "content": turn.closing}] if turn.closing else []
        messages += turn.user_messages_after
    whole = chat.prompt_ids([*messages, user_says(BOUNDARY_TEXT)])
    assert chat.prompt_ids(found.opening) + tokens.token_ids + chat.boundary_ids() == whole


@pytest.mark.parametrize("ending", ["json", "jsonl", "parquet"])
def test_published_rows_import_from_every_kind_of_file(tmp_path: Path, ending: str) -> None:
    file, rows = tmp_path / f"tau.{ending}", tau_rows()
    if ending == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        # structs give every message the keys of all
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
        texts = [{**row, "traj": json.dumps(row["traj"]), "info": json.dumps(row["info"])} for row in rows]
        as_text = tmp_path / "text.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(texts), as_text)
        again = read_conversations(as_text, None, {"messages": "traj"})
        assert [replace(item, file=str(file)) for item in again] == read_conversations(file, None, {"messages": "traj"})
    else:
        write_rows(file, *rows) if ending == "jsonl" else file.write_text(json.dumps(rows))
    report = ImportReport()
    found = read_conversations(file, None, {"messages": "traj"}, report)
    assert [(item.line, item.task_id, item.reward) for item in found] == [(2, "1", 1.0), (3, "2", 0.0), (4, "3", 1.0)]
    assert (report.kept, report.dropped, report.messages, report.without_calls) == (3, {"no_call": 1}, 9, 6)
    assert found[0].places[1] == ("traj[4].tool_calls[0]",) and found[0].answers[0] == "Done."


@pytest.mark.skipif("PACT_TAU_AIRLINE" not in os.environ, reason="PACT_TAU_AIRLINE names no file")
def test_tau_benchs_airline_conversations_import() -> None:
    file = Path(os.environ["PACT_TAU_AIRLINE"])
    rows = json.loads(file.read_text())
    assert (len(rows), sum(row["reward"] == 1 for row in rows)) == (200, 84)
    spoken = [message for row in rows for message in row["traj"] if message["role"] == "assistant"]
    calls = [call for message in spoken for call in message.get("tool_calls") or ()]
    assert round(100 * sum(not message.get("tool_calls") for message in spoken) / len(spoken)) == 53
    assert all(isinstance(call["function"]["arguments"], str) for call in calls)
    report = ImportReport()
    found = read_conversations(file, None, {"messages": "traj"}, report)
    assert (report.kept, report.dropped, report.calls) == (182, Counter(no_call=18), len(calls))
    assert round(100 * report.calls_with_words / report.calls) == 8
    for item in found:
        trace = as_trace(item, str(item.task_id), item.reward == 1)
        assert Trace.from_dict(trace.to_dict()) == trace and all(turn.reasoning or turn.said for turn in trace.turns)
        names = {call.name for turn in trace.turns for call in turn.calls}
        assert reject_reason(replace(trace, verified=True), [{"name": name} for name in names]) is None
