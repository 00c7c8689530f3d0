"""Keys of a chat message: none that says something is passed over, and ids of every name pair calls with results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fixtures.conversations import ROW, TOOLS, call_of, result_of, says, user_says, write_rows

from pact_nemo.errors import DataError
from pact_nemo.traces.conversations import Conversation, read_conversations

CALL = call_of("find", "1")
TWO = [call_of("find", "1", '{"name": "A"}'), call_of("find", "2", '{"name": "B"}')]
LOUD = {"type": "reasoning.text", "index": 0, "signature": "s"}


def _of(tmp_path: Path, *messages: Any, **more: Any) -> Conversation:
    row = {"messages": [user_says("Do it."), *messages], **more}
    return read_conversations(write_rows(tmp_path / "c.jsonl", row))[0]


@pytest.mark.parametrize(
    ("messages", "field", "remedy"),
    [
        ([{"role": "user", "text": "Do it."}], "messages[1].text", "write it as 'content'"),
        ([{"role": "user", "parts": [{"type": "text", "text": "x"}]}], "messages[1].parts", "write it as 'content'"),
        ([{"role": "user"}], "messages[1].content", "needs a content"),
        ([{"role": "system", "content": None}], "messages[1].content", "needs a content"),
        ([{**user_says("See"), "images": ["b64"]}], "messages[1].images", "only text is read"),
        ([says("", tool_call=CALL)], "messages[1].tool_call", "write it as 'tool_calls'"),
        ([says("", toolCalls=[CALL])], "messages[1].toolCalls", "write it as 'tool_calls'"),
        ([says("a", refusal="no")], "messages[1].refusal", "a content or a refusal, not both"),
        ([says("a", train=False)], "messages[1].train", "take it out"),
        ([says(None, CALL, weight=0)], "messages[1].weight", "take 'weight' out to teach it"),
        ([says(None, CALL, reasoning_details=[{"type": "x"}])], "messages[1].reasoning_details[0]", "no thought of"),
        ([says([{"type": "reasoning", "words": "A"}], CALL)], "messages[1].content[0].words", "isn't read of a"),
        ([says(None, CALL), {"role": "tool", "tool_call_id": "1", "output": "x"}], "messages[2].output", "'content'"),
        ([says(None, CALL), {"role": "tool", "tool_call_id": "1", "result": "x"}], "messages[2].result", "'content'"),
        ([says(None, CALL), {"role": "tool", "tool_call_id": "1"}], "messages[2].content", "needs a content"),
        ([says(None, CALL), result_of(None, "1", error="boom")], "messages[2].error", "write what it says"),
        ([says(None, CALL), result_of("x", "1", call_id="2")], "messages[2].tool_call_id", "differ"),
        ([says(None, {**CALL, "arguments": {"name": "x"}}), result_of("x", "1")], "messages[1].tool_calls[0]", "none"),
    ],
)  # fmt: skip
def test_a_key_that_is_not_read_is_refused_by_its_path(
    tmp_path: Path, messages: list[Any], field: str, remedy: str
) -> None:
    with pytest.raises(DataError) as caught:
        _of(tmp_path, *messages, says(None, CALL), result_of("x", "1"))
    assert f"[field {field}]" in str(caught.value) and remedy in str(caught.value)


def test_what_is_only_about_a_message_passes(tmp_path: Path) -> None:
    known = {"id": "m1", "timestamp": 3, "metadata": {"a": 1}, "name": "Mia", "usage": {"total_tokens": 3}}
    nothing: dict[str, Any] = {
        "audio": None,
        "annotations": [],
        "images": [],
        "refusal": None,
        "provider_specific_fields": {"a": None},
    }
    messages = [{**message, **nothing} for message in ROW["messages"]]
    for message in messages:
        message |= {} if message["role"] == "tool" else known
        message |= {"weight": 1} if message["role"] == "assistant" else {}
    plain = read_conversations(write_rows(tmp_path / "c.jsonl", ROW))
    assert read_conversations(write_rows(tmp_path / "c.jsonl", {**ROW, "messages": messages})) == plain


@pytest.mark.parametrize("key", ["system", "system_prompt"])
def test_a_system_message_beside_the_messages_is_refused_unless_they_say_it(tmp_path: Path, key: str) -> None:
    with pytest.raises(DataError, match=rf"make it the first, of role 'system'.*\[field {key}\]"):
        _of(tmp_path, says(None, CALL), result_of("x", "1"), **{key: "Help."})
    said = {"role": "system", "content": "Help."}
    assert said in _of(tmp_path, said, says(None, CALL), result_of("x", "1"), **{key: "Help.\n"}).opening


@pytest.mark.parametrize(
    ("more", "reasoning"),
    [
        ({"reasoning_details": [{**LOUD, "text": "I th"}, {**LOUD, "text": "ink."}]}, "I think."),
        ({"reasoning": "A\nB", "reasoning_details": [{**LOUD, "text": "A B"}]}, "A\nB"),
        ({"reasoning_details": [{"type": "reasoning.summary", "summary": "A"}, {"type": "reasoning.encrypted"}]}, "A"),
        ({"thinking_blocks": [{"type": "thinking", "thinking": "A"}, {"type": "thinking", "thinking": "B"}]}, "A\n\nB"),
        ({"content": [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "A"}]}]}, "A"),
        ({"content": [{"type": "reasoning", "content": [{"type": "reasoning_text", "text": "A"}]}]}, "A"),
        ({"content": "<think>B</think>hi", "reasoning_content": "A"}, "A\n\nB\n\nhi"),
    ],
)
def test_thoughts_of_every_shape_are_kept(tmp_path: Path, more: dict[str, Any], reasoning: str) -> None:
    assert _of(tmp_path, {**says(None, CALL), **more}, result_of("x", "1")).turns[0].reasoning == reasoning


@pytest.mark.parametrize(
    ("calls", "key"), [("id", "call_id"), ("id", "id"), ("call_id", "tool_call_id"), ("call_id", "call_id")]
)
def test_results_go_to_their_calls_whatever_the_ids_key_is(tmp_path: Path, calls: str, key: str) -> None:
    written = [{"function": call["function"], calls: call["id"]} for call in TWO]
    results = [{"role": "tool", key: number, "content": f"r{number}"} for number in ("2", "1")]
    assert _of(tmp_path, says(None, *written), *results).turns[0].observations == ("r1", "r2")


def test_results_without_a_calls_id_go_by_tool_or_are_refused(tmp_path: Path) -> None:
    calls = [call_of("find", None), call_of("refund", None)]
    named = [{"role": "tool", "tool_name": name, "content": name} for name in ("refund", "find")]
    assert _of(tmp_path, says(None, *calls), *named).turns[0].observations == ("find", "refund")
    twice = [{**call, "id": None} for call in TWO]
    in_order = _of(tmp_path, says(None, *twice), result_of("a"), result_of("b"), tools=json.loads(json.dumps(TOOLS)))
    assert in_order.turns[0].observations == ("a", "b")
    for key in ("tool_call_id", "call_id", "id"):
        results = [{"role": "tool", key: number, "content": number} for number in ("2", "1")]
        with pytest.raises(DataError, match=r"no call has the id '2', and 'find' is called twice.*messages\[2\]"):
            _of(tmp_path, says(None, *twice), *results)
