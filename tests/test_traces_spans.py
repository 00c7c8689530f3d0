"""Component masks: in every supported chat template, CALL tokens are the call text and REASONING tokens the reasoning
text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache

import pytest
from fixtures.chat_models import KINDS, chat_format, tokenizer

from pact_nemo.chat.conversation_tokens import BOUNDARY_TEXT
from pact_nemo.chat.template import ChatFormat
from pact_nemo.chat.tool_formats import TOOL_FORMATS
from pact_nemo.environments.base import Task, ToolCall
from pact_nemo.errors import ConfigError, DataError
from pact_nemo.objective.components import CALL, OBSERVATION, OTHER, REASONING
from pact_nemo.traces.schema import ReasoningSegment, Trace, TraceTurn
from pact_nemo.traces.segments import NO_LEVEL
from pact_nemo.traces.spans import TraceTokens, encode_trace, truncate_at_turn
from tests.workers.bfcl_tasks import bfcl_environment, make_traces

SHORT = ("multi_turn_base", "multi_turn_miss_func", "multi_turn_miss_param")


@cache
def traced(window: str, style: str) -> list[tuple[Task, Trace]]:
    """All tasks of the three short categories; every 20th of the long-context one, whose observations are long."""
    pairs = []
    for categories, step in ((SHORT, 1), (("multi_turn_long_context",), 20)):
        env = bfcl_environment(categories, window=window, max_tools=5 if window == "turn" else None)  # type: ignore[arg-type]
        tasks = env.tasks()[::step]
        traces, rejected = make_traces(env, tasks, style=style)  # type: ignore[arg-type]
        assert not rejected
        pairs += list(zip(tasks, traces, strict=True))
    return pairs


def _messages(task: Task, trace: Trace, chat: ChatFormat) -> list[dict[str, str]]:
    """The conversation x + h* as plain chat messages, written down independently of the encoder."""
    messages = [dict(message) for message in task.user_turns[0]]
    for turn in trace.turns:
        calls = chat.tool_format.render_calls(turn.calls) if turn.calls else ""
        if chat.thought is None:
            written = "\n".join(part for part in (turn.reasoning, calls) if part)
        else:
            written = f"<think>\n{turn.reasoning.strip()}\n</think>\n\n{calls}"
        messages.append({"role": "assistant", "content": written})
        if turn.observations:
            messages += chat.tool_format.render_observation(turn.observations)
        if turn.calls and turn.user_messages_after:
            messages.append({"role": "assistant", "content": turn.closing or "Done."})
        after = [dict(message) for message in turn.user_messages_after]
        if turn.new_tools_after:
            after[0]["content"] = chat.tool_format.render_new_tools(turn.new_tools_after) + "\n" + after[0]["content"]
        messages += after
    return messages


def _text(chat: ChatFormat, tokens: TraceTokens, turn: int, *components: int) -> str:
    ids = [
        i
        for i, t, c in zip(tokens.token_ids, tokens.turn, tokens.component, strict=True)
        if t == turn and c in components
    ]
    return str(chat.tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _check(task: Task, trace: Trace, chat: ChatFormat) -> TraceTokens:
    tokens = encode_trace(trace, chat)
    lists = (tokens.component, tokens.segment_level, tokens.turn)
    assert all(len(values) == len(tokens.token_ids) for values in lists)
    for index, turn in enumerate(trace.turns):
        calls = chat.tool_format.render_calls(turn.calls) if turn.calls else ""
        opening, switch = (
            ("<think>\n", "\n</think>\n\n") if chat.thought is not None else ("", "\n" if turn.reasoning else "")
        )
        reasoning = turn.reasoning if chat.thought is None else turn.reasoning.strip()
        # every token that the policy has to produce, in its order
        assert not calls or _text(chat, tokens, index, REASONING, CALL) == opening + reasoning + switch + calls
        # the switch to the call is CALL, with the reasoning's last characters where one token holds both; so is the
        # marker that opens a thought
        assert not calls or _text(chat, tokens, index, CALL).endswith(switch + calls)
        assert not calls or _text(chat, tokens, index, CALL).startswith(opening)
        assert reasoning.startswith(_text(chat, tokens, index, REASONING))
    for component, level in zip(tokens.component, tokens.segment_level, strict=True):
        assert component == REASONING or level == NO_LEVEL
    x, messages = chat.prompt_ids(task.user_turns[0], task.tools), _messages(task, trace, chat)
    if chat.thought is None:
        # x + h* + boundary is what the template renders for the whole conversation; so x + h* is its exact prefix
        whole = chat.prompt_ids([*messages, {"role": "user", "content": BOUNDARY_TEXT}], task.tools)
        assert x + tokens.token_ids + chat.boundary_ids() == whole
    elif not any(turn.user_messages_after for turn in trace.turns):
        # the template drops thoughts once a user speaks again: until then x + h* is what it renders
        assert x + tokens.token_ids + chat.generation_ids() == chat.prompt_ids(messages, task.tools)
    else:  # ChatML by hand, thoughts kept
        text = chat.render(task.user_turns[0], task.tools, generation=False)
        for message in messages[len(task.user_turns[0]) :]:
            role, content = message["role"], message["content"]
            if role == "tool":
                role, content = "user", f"<tool_response>\n{content}\n</tool_response>"
            text += f"<|im_start|>{role}\n{content}<|im_end|>\n"
        assert x + tokens.token_ids == chat.encode_whole(text)
    return tokens


@pytest.mark.parametrize("style", ["compact", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_exact_on_every_trace_of_the_turn_window(kind: str, style: str) -> None:
    chat = chat_format(kind)
    for task, trace in traced("turn", style)[:: 1 if kind.startswith("smollm/p") else 4]:
        _check(task, trace, chat)


@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_exact_on_whole_episodes(kind: str) -> None:
    chat = chat_format(kind)
    for task, trace in traced("full", "compact")[:: 1 if kind.startswith("smollm/p") else 12]:
        _check(task, trace, chat)


@pytest.mark.parametrize("kind", KINDS)
def test_observation_tokens_are_the_observations(kind: str) -> None:
    chat = chat_format(kind)
    for task, trace in traced("turn", "compact")[::25]:
        tokens = _check(task, trace, chat)
        for index, turn in enumerate(trace.turns):
            text = _text(chat, tokens, index, OBSERVATION)
            written = json.dumps(turn.observations[0]) if kind.startswith("llama") else turn.observations[0]
            assert (
                written.strip() in text and len(text) <= len(written) + 2
            )  # a token may also cover a neighbouring line break


def test_end_of_turn_and_roles_are_other_unless_asked() -> None:
    chat = chat_format("smollm/pythonic")
    task, trace = traced("turn", "compact")[0]
    tokens = encode_trace(trace, chat)
    ends = [index for index, token in enumerate(tokens.token_ids) if token == chat.end_of_turn_id]
    assert all(tokens.component[index] == OTHER for index in ends)
    asked = encode_trace(trace, chat, end_of_turn=CALL)
    assert asked.token_ids == tokens.token_ids
    after_calls = [i for i in ends if tokens.component[i - 1] == CALL]
    assert len(after_calls) == len(trace.turns) and [i for i in ends if asked.component[i] == CALL] == after_calls


def _segmented() -> Trace:
    segments = (
        ReasoningSegment("task_restate", "List it."),
        ReasoningSegment("tool_selection", " Use ls."),
        ReasoningSegment("explicit_call_preview", " That is ls(a=True)."),
        ReasoningSegment("decision_summary", " Go."),
    )
    return Trace("t", "ground_truth", (TraceTurn(segments, (ToolCall("ls", {"a": True}),), ("[]",)),) * 3, True)


@pytest.mark.parametrize("kind", KINDS)
def test_levels_select_growing_prefixes_without_the_preview(kind: str) -> None:
    chat = chat_format(kind)
    trace = _segmented()
    tokens = encode_trace(trace, chat)

    def text(level: int) -> str:
        return chat.tokenizer.decode(
            [
                i
                for i, have, t in zip(tokens.token_ids, tokens.segment_level, tokens.turn, strict=True)
                if t == 1 and 0 <= have <= level
            ],
            clean_up_tokenization_spaces=False,
        )

    assert [text(level) for level in range(5)] == ["", "List it.", "List it.", *["List it. Use ls."] * 2]
    assert trace.turns[0].segment_levels == [1, 3, NO_LEVEL, NO_LEVEL]


@pytest.mark.parametrize("kind", KINDS)
def test_the_switch_to_the_call_is_part_of_the_call_unless_it_is_left_unsupervised(kind: str) -> None:
    chat = chat_format(kind)
    taught, literal = (encode_trace(_segmented(), chat, switch=switch) for switch in (CALL, OTHER))
    assert taught.token_ids == literal.token_ids
    different = [
        index for index, pair in enumerate(zip(taught.component, literal.component, strict=True)) if pair[0] != pair[1]
    ]
    assert {(taught.component[index], literal.component[index]) for index in different} == {(CALL, OTHER)}
    for turn in range(3):
        written = chat.decode([taught.token_ids[index] for index in different if taught.turn[index] == turn])
        if chat.thought is not None:  # the thought's markers; ".\n" is one token, and counts as the switch
            assert written == f"{chat.thought.written}.{chat.thought.closing}"
            continue
        (index,) = (index for index in different if taught.turn[index] == turn)
        assert written.endswith("\n") and taught.component[index + 1] == CALL


@pytest.mark.parametrize("kind", ["smollm/pythonic", "qwen2_5/hermes", "llama3/llama3_json"])
@pytest.mark.parametrize("dropped", ["reasoning", "calls", "observations"])
def test_components_can_be_left_out(kind: str, dropped: str) -> None:
    chat = chat_format(kind)
    task, trace = next(pair for pair in traced("turn", "compact") if len(pair[1].turns) == 2)
    tokens = encode_trace(trace, chat, components={"reasoning", "calls", "observations"} - {dropped})
    absent = {"reasoning": REASONING, "calls": CALL, "observations": OBSERVATION}[dropped]
    assert absent not in tokens.component
    assert {REASONING, CALL, OBSERVATION} - {absent} <= set(tokens.component)
    assert len(tokens) < len(encode_trace(trace, chat))
    ids = chat.prompt_ids(task.user_turns[0], task.tools) + tokens.token_ids + chat.boundary_ids()
    messages: list[dict[str, str]] = [dict(message) for message in task.user_turns[0]]
    for turn in trace.turns:
        calls = chat.tool_format.render_calls(turn.calls) if dropped != "calls" else ""
        content = "\n".join(part for part in (turn.reasoning if dropped != "reasoning" else "", calls) if part)
        messages.append({"role": "assistant", "content": content})
        messages += chat.tool_format.render_observation(turn.observations) if dropped != "observations" else []
    assert ids == chat.prompt_ids([*messages, {"role": "user", "content": BOUNDARY_TEXT}], task.tools)


def test_bad_components_are_refused() -> None:
    for components in ((), ("answers",)):
        with pytest.raises(ConfigError):
            encode_trace(_segmented(), chat_format("smollm/pythonic"), components=components)


def test_a_token_across_reasoning_and_call_is_refused() -> None:
    merging = tokenizer("smollm")
    merging.add_tokens([".\n["])
    chat = ChatFormat(merging, TOOL_FORMATS["pythonic"])
    with pytest.raises(DataError, match="both reasoning and call"):
        encode_trace(_segmented(), chat)


@pytest.mark.parametrize("kind", ["smollm/pythonic", "qwen3/hermes", "llama3/llama3_json"])
def test_truncation_keeps_whole_turns_that_render_on_their_own(kind: str) -> None:
    chat = chat_format(kind)
    whole = encode_trace(_segmented(), chat)
    assert whole.turn_ends[-1] == len(whole) and len(whole.turn_ends) == 3
    assert truncate_at_turn(whole, len(whole)) == whole
    for keep in (2, 1, 0):
        limit = whole.turn_ends[keep] - 1
        cut = truncate_at_turn(whole, limit)
        shorter = Trace("t", "ground_truth", _segmented().turns[:keep], True)
        expected = encode_trace(shorter, chat)
        assert (
            cut.token_ids == expected.token_ids
            and cut.component == expected.component
            and cut.turn_ends == expected.turn_ends
        )
        assert (
            cut.segment_level == expected.segment_level and cut.turn == expected.turn and cut.turns_dropped == 3 - keep
        )


def _percentile(values: Sequence[int], share: float) -> int:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def test_the_small_models_prompts_and_traces_stay_short() -> None:
    chat = chat_format("smollm/pythonic")
    env = bfcl_environment(("multi_turn_base",), window="turn", max_tools=5)
    traces, _ = make_traces(env, env.tasks(), style="compact")
    encoded = [encode_trace(trace, chat) for trace in traces]
    prompts = [len(chat.prompt_ids(task.user_turns[0], task.tools)) for task in env.tasks()]
    reasoning = [tokens.component.count(REASONING) for tokens in encoded]
    turns = sum(len(tokens.turn_ends) for tokens in encoded)
    assert sum(prompts) / len(prompts) < 205 and _percentile(prompts, 0.9) < 255
    assert sum(map(len, encoded)) / len(encoded) < 100
    assert sum(reasoning) / turns < 25


def test_a_token_across_two_segments_belongs_to_the_later_one() -> None:
    merging = tokenizer("smollm")
    merging.add_tokens([". Use"])
    chat = ChatFormat(merging, TOOL_FORMATS["pythonic"])
    tokens = encode_trace(_segmented(), chat)
    position = tokens.token_ids.index(merging.convert_tokens_to_ids(". Use"))
    assert tokens.segment_level[position - 1 : position + 1] == [1, 3]
