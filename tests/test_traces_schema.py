"""Trace rows: what is written reads back; what is malformed is named by file, line and field; bad traces are filtered
with a reason.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pact_nemo.environments.base import ToolCall
from pact_nemo.errors import DataError
from pact_nemo.runtime.quarantine import Quarantine
from pact_nemo.traces.builder import TraceBuilder
from pact_nemo.traces.filters import reject_reason
from pact_nemo.traces.schema import ReasoningSegment, Trace, TraceTurn, read_traces, write_traces
from pact_nemo.traces.segments import PREVIEW, SEGMENT_TYPES, prefix_levels, segment_type, split_reasoning

TOOLS = [{"name": "ls", "description": "List.", "parameters": {"type": "object", "properties": {}, "required": []}}]

ROLE_MARKS = (
    "<|im_end|>",
    "<|IM_START|>user",
    "<|start_header_id|>",
    "<|START_OF_TURN_TOKEN|>",
    "<\uff5cUser\uff5c>",
    "<start_of_turn>user",
    "<end_of_turn>",
    "[INST]",
    "[/INST]",
    "[TOOL_RESULTS]",
    "<<SYS>>",
)


def _trace(observation: str = "[]", **changes: Any) -> Trace:
    turns = (
        TraceTurn(
            (ReasoningSegment("tool_selection", "Use ls."), ReasoningSegment("other", " Now. \u2028é")),
            (ToolCall("ls", {"a": True, "b": [1, {"c": None}]}),),
            ("[]",),
            0,
            ({"role": "user", "content": "More."},),
            ({"name": "cat", "description": "", "parameters": {"type": "object", "properties": {}, "required": []}},),
        ),
        TraceTurn((), (ToolCall("ls", {}),), (observation,), 1),
    )
    return replace(Trace("t#0", "ground_truth", turns, True), **changes)


def test_traces_read_back_as_written(tmp_path: Path) -> None:
    traces = [_trace(), _trace(task_id="t#1", verified=False)]
    write_traces(tmp_path / "traces.jsonl", traces)
    assert read_traces(tmp_path / "traces.jsonl") == traces
    assert len((tmp_path / "traces.jsonl").read_bytes().split(b"\n")) == 3


def _edit(path: str, value: Any) -> dict[str, Any]:
    """The good row with one place changed; ``value`` of ``...`` removes the key."""
    row = copy.deepcopy(_trace().to_dict())
    place: Any = json.loads(json.dumps(row))
    row = place
    *parents, last = path.split("/")
    for part in parents:
        place = place[int(part) if part.isdigit() else part]
    if value is ...:
        del place[last]
    else:
        place[int(last) if last.isdigit() else last] = value
    return row


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        ("version", 99, "version"),
        ("task_id", ..., "task_id"),
        ("task_id", 3, "task_id"),
        ("verified", "yes", "verified"),
        ("turns", [], "turns"),
        ("turns/0/calls/0/name", None, r"turns\[0\].calls\[0\].name"),
        ("turns/0/calls/0/arguments", [], r"turns\[0\].calls\[0\].arguments"),
        ("turns/0/segments/1/type", "musing", r"turns\[0\].segments\[1\].type"),
        ("turns/0/segments/1/text", ..., r"turns\[0\].segments\[1\].text"),
        ("turns/1/observations", [], r"turns\[1\].observations"),
        ("turns/1/observations", [3], r"turns\[1\].observations"),
        ("turns/1/user_turn", True, r"turns\[1\].user_turn"),
        ("turns/0/user_messages_after", ["hi"], r"turns\[0\].user_messages_after\[0\]"),
        ("turns/1/answer", "42", r"turns\[1\]"),
        ("final_answer", "42", r"\(row\)"),
        ("turns/0", "x", r"turns\[0\]"),
    ],
)
def test_a_malformed_row_is_named_by_file_line_and_field(tmp_path: Path, path: str, value: Any, field: str) -> None:
    file = tmp_path / "traces.jsonl"
    write_traces(file, [_trace(task_id="fine")])
    with open(file, "a", encoding="utf-8") as handle:
        handle.write(json.dumps(_edit(path, value)) + "\n")
    with pytest.raises(DataError, match=field) as caught:
        read_traces(file)
    assert (caught.value.file, caught.value.line) == (str(file), 2)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("turns/0/calls/0/parameters", {"a": 1}, r"unknown keys \['parameters'\].*field turns\[0\]\.calls\[0\]"),
        ("turns/0/segments/0/level", 3, r"unknown keys \['level'\]"),
        ("turns/0/user_turn", 1, r"expected 0.*field turns\[0\]\.user_turn"),
        ("turns/1/user_turn", 0, r"expected 1.*field turns\[1\]\.user_turn"),
        ("turns/0/user_messages_after", [], r"field turns\[1\]\.user_turn|field turns\[0\]\.new_tools_after"),
        ("turns/1/user_messages_after", [{"role": "user", "content": "And?"}], "no turn answers the user"),
        ("turns/0/user_messages_after/0/role", "assistant", "not as 'assistant'"),
        ("turns/1/closing", "Done.", "a closing message stands before"),
    ],
)
def test_nothing_that_a_trace_says_is_passed_over(path: str, value: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"t\.jsonl:3: .*{message}"):
        Trace.from_dict(_edit(path, value), file="t.jsonl", line=3)


def test_a_key_twice_in_a_trace_is_refused_by_line(tmp_path: Path) -> None:
    good = json.dumps(_trace().to_dict())
    for text, key in (
        (f'{good[:-1]}, "task_id": "other"}}', "task_id"),
        (good.replace('{"a": true', '{"a": false, "a": true'), "a"),
    ):
        path = tmp_path / "t.jsonl"
        path.write_text(f"{json.dumps(_trace(task_id='t#1').to_dict())}\n{text}\n")
        with pytest.raises(DataError, match=rf"t\.jsonl:2: .*the key '{key}' is there twice"):
            read_traces(path)


def test_torn_missing_and_double_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such trace file"):
        read_traces(tmp_path / "absent.jsonl")
    file = tmp_path / "traces.jsonl"
    write_traces(file, [_trace()])
    whole = file.read_text(encoding="utf-8")
    file.write_text(whole[:-20], encoding="utf-8")
    with pytest.raises(DataError, match="not a JSON line"):
        read_traces(file)
    file.write_text(whole + whole, encoding="utf-8")
    with pytest.raises(DataError, match="already, on line 1"):
        read_traces(file)


def test_a_trace_can_not_end_with_a_message() -> None:
    row = json.loads(json.dumps(_trace().to_dict()))
    row["turns"][1].update(calls=[], observations=[])
    with pytest.raises(DataError, match="no final answer"):
        Trace.from_dict(row)
    builder = TraceBuilder()
    builder.assistant((ReasoningSegment("other", "Hm."),), (ToolCall("ls", {}),), ("[]",), 0)
    builder.user([{"role": "user", "content": "And?"}], [])
    builder.assistant((ReasoningSegment("other", "The answer is 42."),), (), (), 1)
    trace = builder.build("t", "teacher", True)
    assert trace is not None and len(trace.turns) == 1 and trace.turns[0].user_messages_after == ()
    assert "42" not in json.dumps(trace.to_dict())
    assert TraceBuilder().build("t", "teacher", True) is None


@pytest.mark.parametrize(
    ("trace", "reason"),
    [
        (_trace(), None),
        (_trace(verified=False), "unverified"),
        (_trace(observation="ok\nUser: do that\nsystem: linux\n tool: hammer"), None),  # mail, YAML, logs
        *((_trace(observation=f"a{mark}b"), "role_text_in_observation") for mark in ROLE_MARKS),
        (_trace(observation="x <| f |> y, a<b>c, [INFO] <s>old</s> <<EOF"), None),
        (_trace(observation="<tool_call>{}"), "tool_call_tag_in_observation"),
        (_trace(observation="</tool_response>"), "tool_call_tag_in_observation"),
        (_trace(observation="the user: role is fine inline"), None),
        (_trace(turns=(TraceTurn((), (ToolCall("rm", {}),), ("x",)),)), "unknown_tool"),
        (_trace(turns=(TraceTurn((), (ToolCall("ls", {"a b": 1}),), ("x",)),)), "malformed_turn"),
        (_trace(turns=(TraceTurn((), (), ()),)), "malformed_turn"),
        (_trace(turns=(TraceTurn((), (ToolCall("ls", {}),), ()),)), "malformed_turn"),
        (
            _trace(turns=(TraceTurn((ReasoningSegment("other", "<|im_end|>"),), (ToolCall("ls", {}),), ("x",)),)),
            "control_text_in_turn",
        ),
    ],
)
def test_filters_name_the_reason(trace: Trace, reason: str | None) -> None:
    assert reject_reason(trace, TOOLS) == reason


@pytest.mark.parametrize(
    ("count", "levels"),
    [
        (0, []),
        (1, [1]),
        (2, [1, 3]),
        (3, [1, 2, 3]),
        (4, [1, 2, 3, 4]),
        (5, [1, 1, 2, 3, 4]),
        (8, [1, 1, 2, 2, 3, 3, 4, 4]),
    ],
)
def test_levels_go_by_position_and_l0_holds_no_reasoning(count: int, levels: list[int]) -> None:
    for kind in SEGMENT_TYPES[:-1]:
        assert prefix_levels([kind] * count) == levels


def test_nothing_after_the_first_preview_is_in_a_level() -> None:
    kinds = ["tool_selection", "other", PREVIEW, "required_arg_grounding", PREVIEW, "decision_summary"]
    assert prefix_levels(kinds) == [1, 3, -1, -1, -1, -1]
    assert prefix_levels([PREVIEW, "other"]) == [-1, -1]


def test_a_segment_that_writes_the_call_down_is_a_preview_whatever_its_type() -> None:
    segments = tuple(ReasoningSegment("other", text) for text in ("Look.", " So ls(a=True).", " Go."))
    assert TraceTurn(segments, (ToolCall("ls", {"a": True}),), ("[]",)).segment_levels == [1, -1, -1]
    assert TraceTurn(segments, (ToolCall("cd", {"folder": "a"}),), ("[]",)).segment_levels == [1, 2, 3]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("The user wants a listing.", "task_restate"),
        ("I will call ls(a=True) now.", "explicit_call_preview"),
        ('{"name": "ls"}', "explicit_call_preview"),
        ("The last call failed.", "failure_reflection"),
        ("Alternatively, search first.", "fallback_plan"),
        ("The weather tool is irrelevant.", "irrelevant_tool_rejection"),
        ("The optional flag stays off.", "optional_arg_analysis"),
        ("The required argument is the path.", "required_arg_grounding"),
        ("ls is what I need.", "tool_selection"),
        ("So let us go.", "decision_summary"),
        ("Hmm.", "other"),
        ("ls (the lister) fits.", "tool_selection"),
        ("I try ls().", "explicit_call_preview"),
        ("I try LS( 'a' ).", "explicit_call_preview"),
        ("xls(1) is no tool of ours.", "other"),
        ("The arguments: { 'arguments': {}}", "explicit_call_preview"),
        ("<function=ls>", "explicit_call_preview"),
    ],
)
def test_free_reasoning_is_typed_by_rules(text: str, kind: str) -> None:
    assert segment_type(text, ["ls"]) == kind


def test_split_reasoning_loses_no_character() -> None:
    text = "The user wants x.\n\nls fits.\n \n\nI run ls(a=1)."
    pieces = split_reasoning(f"\n{text}\n", ["ls"])
    assert "".join(piece for _, piece in pieces) == text
    assert [kind for kind, _ in pieces] == ["task_restate", "tool_selection", "explicit_call_preview"]
    assert split_reasoning("  ", ["ls"]) == []


def test_a_paragraph_is_parted_before_the_sentence_that_writes_the_call_down() -> None:
    text = "The user wants x. It is in a. Now I run ls(a=1). Done."
    pieces = split_reasoning(text, ["ls"])
    assert pieces == [
        ("task_restate", "The user wants x. It is in a."),
        ("explicit_call_preview", " Now I run ls(a=1). Done."),
    ]
    assert split_reasoning("Run ls(a=1) now.", ["ls"]) == [("explicit_call_preview", "Run ls(a=1) now.")]


def test_a_trace_may_call_tools_whose_names_python_cannot_write() -> None:
    odd = {
        "name": "flights.search-v2",
        "description": "",
        "parameters": {"type": "object", "properties": {"from": {}, "content-type": {}}},
    }
    turn = TraceTurn((), (ToolCall("flights.search-v2", {"from": "a", "content-type": "b"}),), ("x",))
    assert reject_reason(_trace(turns=(turn,)), [odd]) is None


CHAT = [
    {"role": "user", "content": "Where am I?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "pwd", "arguments": "{}"}}],
    },
    {"role": "tool", "tool_call_id": "1", "content": "/a"},
]
BLOCKS = [{"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "pwd", "input": {}}]}]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (json.dumps({"messages": CHAT, "tools": []}), "OpenAI format"),
        (json.dumps({"messages": CHAT[:1]}), "OpenAI format"),
        (json.dumps({"messages": CHAT}, indent=1), "OpenAI format"),
        (json.dumps(CHAT), "OpenAI format"),
        (json.dumps([{"messages": CHAT}]), "JSON list .*OpenAI format"),
        (json.dumps({"messages": BLOCKS}), "Anthropic format"),
        (json.dumps({"conversations": [{"from": "human", "value": "Where?"}]}), "ShareGPT format"),
        (json.dumps({"prompt": "a", "completion": "b"}), "prompt and completion"),
        (json.dumps({"messages": json.dumps(CHAT)}), "OpenAI format"),
        (json.dumps({"version": "1", "turns": CHAT}), "OpenAI format .*under 'turns'"),
        (json.dumps({"custom_id": "1", "body": {"messages": CHAT}}), "OpenAI format"),
        (
            json.dumps({"input": "Where?", "output": [{"type": "function_call", "name": "pwd", "arguments": "{}"}]}),
            "OpenAI's responses",
        ),
        (json.dumps({"text": "<|im_start|>user\nWhere?<|im_end|>"}), "a rendered chat"),
        ("PAR1", "parquet"),
    ],
)
def test_a_file_in_another_format_is_refused_with_its_name_and_what_to_do(tmp_path: Path, text: str, name: str) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(f"\n{text}\n")
    for quarantine in (None, Quarantine("quarantine")):  # it isn't a matter of bad rows
        with pytest.raises(
            DataError, match=rf"(?s)chats\.jsonl.*{name}.*docs/design/traces\.md.*OpenAI format, too.*make_traces\.py"
        ):
            read_traces(path, quarantine)
