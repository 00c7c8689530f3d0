"""Closing messages of a trace that are taught (``traces.closing``): against the chat template's own rendering."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fixtures.chat_models import KINDS, chat_format

from pact_nemo.chat.conversation_tokens import BOUNDARY_TEXT
from pact_nemo.config.load import load_config
from pact_nemo.environments.base import Task
from pact_nemo.errors import ConfigError
from pact_nemo.objective.components import CALL
from pact_nemo.preflight import chat as preflight
from pact_nemo.traces.closings import with_closings
from pact_nemo.traces.schema import Trace
from pact_nemo.traces.spans import encode_trace, truncate_at_turn, without_closing
from tests.workers.bfcl_tasks import bfcl_environment, make_traces

TEXT = "All done."
WITHOUT_THOUGHTS = [kind for kind in KINDS if chat_format(kind).thought is None]


def traced(window: str) -> list[tuple[Task, Trace]]:
    environment = bfcl_environment(
        ("multi_turn_base", "multi_turn_miss_param"), window=window, max_tools=5 if window == "turn" else None
    )  # type: ignore[arg-type]
    tasks = environment.tasks()[::25]
    traces, rejected = make_traces(environment, tasks, style="compact")
    assert not rejected
    return list(zip(tasks, traces, strict=True))


def closings_of(trace: Trace) -> list[str]:
    """What stands at the end of each user turn, in words, from the trace as it is on file."""
    said = [turn.closing or TEXT for turn in trace.turns[:-1] if turn.said or (turn.calls and turn.user_messages_after)]
    return [*said, TEXT] if trace.turns[-1].calls else said


@pytest.mark.parametrize("kind", WITHOUT_THOUGHTS)
@pytest.mark.parametrize("window", ["turn", "full"])
def test_each_closing_message_and_its_end_is_taught_and_the_rest_is_as_it_was(kind: str, window: str) -> None:
    chat = chat_format(kind)
    end, several = chat.end_of_turn_id, 0
    for task, trace in traced(window):
        plain, tokens = encode_trace(trace, chat), encode_trace(with_closings(trace, TEXT), chat)
        wanted = closings_of(trace)
        several += len(wanted) > 1
        # the conversation that the template renders, closing messages in their places
        messages = [dict(message) for message in task.user_turns[0]]
        for turn in trace.turns:
            calls = chat.tool_format.render_calls(turn.calls) if turn.calls else ""
            written = "\n".join(part for part in (turn.reasoning, calls or turn.said) if part)
            messages.append({"role": "assistant", "content": written})
            messages += chat.tool_format.render_observation(turn.observations) if turn.observations else []
            if turn.calls and (turn.user_messages_after or turn is trace.turns[-1]):
                own = turn.closing if turn is not trace.turns[-1] else ""
                messages.append({"role": "assistant", "content": own or TEXT})
            after = [dict(message) for message in turn.user_messages_after]
            if turn.new_tools_after:
                shown = chat.tool_format.render_new_tools(turn.new_tools_after)
                after[0]["content"] = f"{shown}\n{after[0]['content']}"
            messages += after
        ids = chat.prompt_ids(task.user_turns[0], task.tools) + tokens.token_ids + chat.boundary_ids()
        assert ids == chat.prompt_ids([*messages, {"role": "user", "content": BOUNDARY_TEXT}], task.tools)
        # what is taught besides what was taught before
        taught, before = ([i for i, c in enumerate(t.component) if c == CALL] for t in (tokens, plain))
        own = set(chat.tokenizer(TEXT, add_special_tokens=False)["input_ids"])
        assert len(taught) - len(before) >= len(wanted) * 2  # words and end of turn
        text = chat.decode([tokens.token_ids[i] for i in taught])
        assert [text.count(words) for words in {*wanted}] == [wanted.count(words) for words in {*wanted}]
        assert sum(tokens.token_ids[i] == end for i in taught) == len(wanted), (
            "end-of-turn tokens of calls aren't taught"
        )
        assert not trace.turns[-1].calls or own <= {tokens.token_ids[i] for i in taught}
        # the last one can be taken off again
        assert tokens.closed and without_closing(tokens).token_ids == tokens.token_ids[: tokens.turn_ends[-2]]
        if len(wanted) == 1:
            assert without_closing(tokens).token_ids == plain.token_ids
            assert without_closing(tokens).component == plain.component
        assert not truncate_at_turn(tokens, len(tokens) - 1).closed and without_closing(plain) is plain
    assert several or window == "turn"


def test_a_policy_that_thinks_and_an_empty_message_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"traces\.closing is empty"):
        load_config(None, ["traces.closing=' '"])
    config = load_config(None, ["traces.closing=Done."])
    thinking: Any = SimpleNamespace(thought=object())
    monkeypatch.setattr(preflight.ChatFormat, "from_pretrained", lambda *_: thinking)
    with pytest.raises(ConfigError, match=r"traces\.closing='Done\.': m thinks before each message"):
        preflight.chat_format(config, Path("m"))
    assert preflight.chat_format(replace(config, traces=replace(config.traces, closing=None)), Path("m")) is thinking


def test_a_trace_on_file_knows_nothing_of_it() -> None:
    _, trace = traced("full")[0]
    assert "taught" not in trace.to_dict()["turns"][0] and Trace.from_dict(trace.to_dict()) == trace
