"""Ground-truth and teacher traces: real observations, verified, no answer in them, reasoning that says where arguments
come from.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import pytest
from fixtures.endpoint import Endpoint

from pact_nemo.environments.base import Task, ToolCall
from pact_nemo.environments.bfcl.environment import BFCLEnvironment
from pact_nemo.errors import ConfigError, ServerError
from pact_nemo.serving.chat_endpoint import chat_endpoint
from pact_nemo.traces.annotate import Context, annotate_turn, purpose
from pact_nemo.traces.ground_truth import ground_truth_trace
from pact_nemo.traces.schema import Trace
from pact_nemo.traces.segments import SEGMENT_TYPES, preview_start
from pact_nemo.traces.teacher import teacher_trace
from tests.workers.bfcl_tasks import bfcl_environment, make_trace, make_traces

SEARCH = {
    "name": "search",
    "description": "This tool belongs to a library. Tool description: Finds all books of a writer in the catalogue.",
    "parameters": {
        "type": "object",
        "properties": {
            "writer": {"type": "string"},
            "limit": {"type": "integer", "default": 10},
            "exact": {"type": "boolean"},
        },
        "required": ["writer"],
    },
}


@cache
def environment(window: str) -> BFCLEnvironment:
    return bfcl_environment(window=window, max_tools=5 if window == "turn" else None)  # type: ignore[arg-type]


@cache
def traces(window: str, style: str) -> list[Trace]:
    env = environment(window)
    made, rejected = make_traces(env, env.tasks(), style=style)  # type: ignore[arg-type]
    assert not rejected
    return made


@pytest.mark.parametrize(
    ("window", "style", "count"), [("full", "compact", 800), ("turn", "compact", 912), ("turn", "full", 912)]
)
def test_every_task_has_a_verified_trace_of_its_reference_calls(window: str, style: str, count: int) -> None:
    made = traces(window, style)
    assert len(made) == count
    for task, trace in zip(environment(window).tasks(), made, strict=True):
        assert trace.task_id == task.id and trace.verified and trace.source == "ground_truth"
        for user_turn, calls in enumerate(task.reference_calls):
            assert [call for turn in trace.turns if turn.user_turn == user_turn for call in turn.calls] == list(calls)
        assert all(len(turn.calls) == 1 for turn in trace.turns if turn.calls)
        assert all(turn.calls or turn.user_messages_after for turn in trace.turns) and trace.turns[-1].calls
        assert all(segment.type in SEGMENT_TYPES for turn in trace.turns for segment in turn.segments)


def test_observations_are_what_the_environment_answers() -> None:
    env = environment("turn")
    for task, trace in list(zip(env.tasks(), traces("turn", "compact"), strict=True))[::10]:
        session = env.start(task)
        assert [session.execute(list(turn.calls)) for turn in trace.turns] == [
            list(turn.observations) for turn in trace.turns
        ]
        session.close()


def test_user_turns_follow_one_another_as_in_the_episode() -> None:
    env = environment("full")
    for task, trace in zip(env.tasks(), traces("full", "compact"), strict=True):
        said = [message for turn in trace.turns for message in turn.user_messages_after]
        later = [message for turn in task.user_turns[1 : trace.turns[-1].user_turn + 1] for message in turn]
        assert said == later
        revealed = [tool["name"] for turn in trace.turns for tool in turn.new_tools_after]
        known = {tool["name"] for tool in task.tools}
        assert not known & set(revealed)


def test_all_calls_of_a_user_turn_in_one_assistant_turn() -> None:
    env = environment("turn")
    task = next(task for task in env.tasks() if len(task.reference_calls[0]) == 2)
    trace = ground_truth_trace(env, task, "compact", "all")
    assert trace is not None and trace.verified
    assert [len(turn.calls) for turn in trace.turns] == [2] == [len(turn.observations) for turn in trace.turns]


def test_an_unverified_trace_is_not_made_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    env = environment("turn")
    task = env.tasks()[0]
    wrong = Task(**{**vars(task), "reference_calls": ((ToolCall(task.reference_calls[0][0].name, {}),),)})
    assert make_trace(env, wrong) is None
    made, rejected = make_traces(env, [wrong, task])
    assert [trace.task_id for trace in made] == [task.id] and rejected == {"unverified": 1}
    silent = Task(**{**vars(task), "reference_calls": ((),)})
    assert make_traces(env, [silent])[1] == {"no_calls": 1}


@pytest.mark.parametrize("style", ["compact", "full"])
def test_no_style_writes_the_call_down_and_compact_is_short(style: str) -> None:
    for trace in traces("turn", style):
        for turn in trace.turns:
            assert all(segment.type != "explicit_call_preview" for segment in turn.segments)
            assert preview_start(turn.reasoning, [call.name for call in turn.calls]) < 0
            assert min(turn.segment_levels) == 1
            assert style == "full" or len(turn.reasoning) < 260, turn.reasoning


def test_a_message_of_the_assistant_closes_each_user_turn_that_another_follows() -> None:
    for task, trace in zip(environment("full").tasks(), traces("full", "compact"), strict=True):
        assert trace.turns[-1].closing_message == "", task.id
        for turn in trace.turns:
            assert bool(turn.closing_message) == bool(turn.calls and turn.user_messages_after)


def test_the_full_style_has_segments_of_every_kind() -> None:
    kinds = {segment.type for trace in traces("turn", "full") for turn in trace.turns for segment in turn.segments}
    assert kinds >= {"task_restate", "tool_scan", "tool_selection", "required_arg_grounding", "decision_summary"}


def test_grounding_names_the_source_of_each_argument() -> None:
    def reasoning(arguments: dict[str, Any], **context: Any) -> dict[str, str]:
        segments = annotate_turn([ToolCall("search", arguments)], Context([SEARCH], **context), "compact")
        return {segment.type: segment.text.strip() for segment in segments}

    said = reasoning({"writer": "Austen", "limit": 3}, words="Find 3 books by austen")
    assert said["tool_selection"] == "Use search to find all books of a writer."
    assert said["required_arg_grounding"] == "writer='Austen' from the user."
    assert said["optional_arg_analysis"] == "limit=3 from the user."
    found = reasoning({"writer": "Austen"}, words="and hers", observations=['{"name": "Austen"}'])
    assert found["required_arg_grounding"] == "writer='Austen' from the last result."
    before = reasoning({"writer": "Austen"}, words="and hers", observations=["Austen", "none"])
    assert before["required_arg_grounding"] == "writer='Austen' from an earlier result."
    earlier = reasoning({"writer": "Austen"}, words="now?", earlier_words="Jane Austen")
    assert earlier["required_arg_grounding"] == "writer='Austen' from an earlier request."
    default = reasoning({"writer": "A Very Long Name Indeed", "limit": 10, "exact": True}, words="x")
    assert default["required_arg_grounding"] == "writer to fit the request."
    assert default["optional_arg_analysis"] == "limit=10 by default; exact=True to fit the request."
    failed = reasoning({"writer": "A"}, words="x", observations=['{"error": "no"}'], first_of_user_turn=False)
    assert failed["failure_reflection"] == "The last call failed."
    with pytest.raises(ConfigError):
        annotate_turn([ToolCall("search", {})], Context([SEARCH], words=""), "terse")  # type: ignore[arg-type]


def test_full_style_does_not_reject_a_tool_that_is_used_later() -> None:
    other = {**SEARCH, "name": "borrow"}
    context = Context([other, SEARCH], words="x", needed_later=frozenset({"borrow"}))
    assert all(
        segment.type != "irrelevant_tool_rejection"
        for segment in annotate_turn([ToolCall("search", {"writer": "x"})], context, "full")
    )
    assert purpose(SEARCH, 30) == "find all books of a writer in the catalogue"


# --- teacher
# ----------------------------------------------------------------------------------------------------------------------


def _message(content: str, *calls: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    rows = [
        {"id": f"c{i}", "type": "function", "function": {"name": n, "arguments": json.dumps(a)}}
        for i, (n, a) in enumerate(calls)
    ]
    return {"role": "assistant", "content": content, "tool_calls": rows}


def _script(task: Task) -> Iterator[dict[str, Any]]:
    for calls in task.reference_calls:
        for call in calls:
            yield _message(f"The user wants help.\n\n{call.name} fits.", (call.name, call.arguments))
        yield _message("The answer is 42.")


def test_a_teacher_that_follows_the_reference_gives_a_verified_trace_without_its_answers() -> None:
    env = environment("full")
    for task in (env.tasks()[0], env.tasks()[203]):
        steps = _script(task)
        seen: list[str] = []

        def complete(
            messages: Sequence[Mapping[str, Any]],
            tools: Sequence[Mapping[str, Any]],
            steps: Any = steps,
            seen: Any = seen,
        ) -> Any:
            seen.append(json.dumps([list(messages), list(tools)]))
            return next(steps)

        trace = teacher_trace(env, task, complete, max_turns=12)
        assert trace is not None and trace.verified and trace.source == "teacher"
        assert "42" not in "".join(turn.reasoning for turn in trace.turns)
        assert [call for turn in trace.turns for call in turn.calls] == [
            call for turn in task.reference_calls for call in turn
        ]
        acting = next(turn for turn in trace.turns if turn.calls)
        assert {segment.type for segment in acting.segments} == {"task_restate", "tool_selection"}
        assert Trace.from_dict(json.loads(json.dumps(trace.to_dict()))) == trace


@pytest.mark.parametrize(
    "message",
    [
        {"content": "", "tool_calls": [{"id": "1", "function": {"name": "ls", "arguments": "{"}}]},
        {"content": "", "tool_calls": [{"id": "1", "function": {"name": "ls", "arguments": "[1]"}}]},
        {"content": "", "tool_calls": [{"id": "1"}]},
        _message("again", ("pwd", {})),
        _message("no call at all"),
    ],
)
def test_a_teacher_that_goes_wrong_gives_no_trace(message: dict[str, Any]) -> None:
    env = environment("turn")
    assert teacher_trace(env, env.tasks()[0], lambda messages, tools: message, max_turns=3) is None


def test_the_endpoint_is_asked_as_openai_clients_do(endpoint: Endpoint) -> None:
    complete = chat_endpoint(f"{endpoint.url}/", "m", "secret", 5.0, 0.0)
    endpoint.texts = [{"content": "hi"}]
    assert complete([{"role": "user", "content": "x"}], [SEARCH]) == {"content": "hi"}
    asked = endpoint.bodies[-1]
    assert (endpoint.paths[-1], endpoint.keys[-1], asked["model"]) == ("/v1/chat/completions", "Bearer secret", "m")
    assert asked["tools"][0] == {"type": "function", "function": SEARCH}
    for reply in (b"", b"{}", b'{"choices": []}', b'{"choices": [{"message": 3}]}'):
        endpoint.texts = [reply]
        with pytest.raises(ServerError):
            complete([], [])
    endpoint.close()
    with pytest.raises(ServerError):
        complete([], [])
