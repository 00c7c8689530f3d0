"""Earlier thoughts: what a rollout holds is what the policy saw, context by context, as the template renders it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from fixtures.chat_models import tokenizer

from pact_nemo.chat.template import ChatFormat
from pact_nemo.chat.tool_formats import TOOL_FORMATS
from pact_nemo.errors import ConfigError, DataError
from pact_nemo.rollouts.store import parse_rollout
from pact_nemo.rollouts.types import Rollout
from tests.workers.thoughts_kit import CD, KINDS, LATER, LIMITS, LS, SPOKEN, chat_of, make_task, play, texts_of


def conversations(chat: ChatFormat, texts: list[str]) -> list[list[dict[str, str]]]:
    """The messages before each of the six assistant messages."""
    observed = chat.tool_format.render_observation
    after = [observed(["ran ls"]), observed(["ran ls"]), [{"role": "user", "content": LATER[0]}], observed(["ran cd"])]
    after += [[{"role": "user", "content": LATER[1]}]]
    found = [[dict(message) for message in make_task().user_turns[0]]]
    for text, messages in zip(texts, after, strict=False):
        found.append([*found[-1], {"role": "assistant", "content": text}, *messages])
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_request_is_what_the_template_renders_of_the_whole_conversation_token_by_token(kind: str) -> None:
    chat, texts = chat_of(kind), texts_of(kind)
    rollout, requests = play(chat, texts)
    assert rollout.status == "ok" and len(rollout.turns) == len(texts) and rollout.rewinds
    for request, conversation in zip(requests, conversations(chat, texts), strict=True):
        assert request == chat.prompt_ids(conversation, [LS, CD])
    first = next(thought for thought, _ in SPOKEN)
    assert kind == "silent" or all(
        (first in chat.decode(request)) == (index in (1, 2)) for index, request in enumerate(requests)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_rollout_knows_the_context_of_each_token_and_carries_it_in_loss_once(kind: str) -> None:
    rollout, requests = play(chat_of(kind), texts_of(kind))
    written_by_policy = [i for turn in rollout.turns for i in range(turn.start, turn.end)]
    assert [i for i, bit in enumerate(rollout.loss_mask) if bit] == written_by_policy
    for turn, request in zip(rollout.turns, requests, strict=True):
        assert rollout.context_ids(turn.start) == request
        assert rollout.context_ids(turn.end - 1) == [*request, *rollout.token_ids[turn.start : turn.end - 1]]
    again = Rollout.from_dict(rollout.to_dict())
    assert again == rollout and again.rewinds == rollout.rewinds
    row = {**rollout.to_dict(), "rewinds": [list(pair) for pair in rollout.rewinds]}  # as JSON has it
    assert parse_rollout(row, "f", 1) == rollout


def test_kept_thoughts_make_one_sequence() -> None:
    chat, texts = chat_of("thinks", "keep"), texts_of("thinks")
    rollout, requests = play(chat, texts)
    assert rollout.rewinds == []
    for turn, request in zip(rollout.turns, requests, strict=True):
        assert request == [*rollout.prompt_ids, *rollout.token_ids[: turn.start]]


def test_a_template_that_keeps_thoughts_is_followed_without_a_cut() -> None:
    for family in ("qwen2_5", "smollm"):
        assert (
            ChatFormat(tokenizer(family), TOOL_FORMATS["hermes"], earlier_thoughts="template").context_thoughts
            == "kept"
        )
    with pytest.raises(ConfigError, match="earlier_thoughts='sometimes'"):
        ChatFormat(tokenizer("qwen3"), TOOL_FORMATS["hermes"], earlier_thoughts="sometimes")


def test_sampled_ids_behind_a_thought_are_never_made_anew() -> None:
    chat = chat_of("thinks")
    odd = [
        i for letter in "I am in docs." for i in chat.encode_assistant(letter)[0]
    ]  # another segmentation than the tokenizer's own
    assert odd != chat.encode_assistant("I am in docs.")[0]
    ids = [*chat.encode_assistant("<think>\nSo.\n</think>\n\n")[0], *odd, chat.end_of_turn_id]
    assert chat.earlier_ids(ids, user=True) == [*odd, chat.end_of_turn_id]
    assert chat.earlier_ids(ids, user=False) is None


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<think>\nA\n</think>\n\nB", "B"),
        ("<think>A</think>B", "B"),
        ("A</think>B", "B"),
        ("<think>\nA\n</think>\n\n", ""),
        ("\n\nNo thought at all ", None),
    ],
)
def test_an_earlier_message_is_shown_as_the_template_shows_it(text: str, shown: str | None) -> None:
    chat = chat_of("thinks")
    ids = chat.earlier_ids([*chat.encode_assistant(text)[0], chat.end_of_turn_id], user=True)
    assert (None if ids is None else chat.decode(ids)) == shown
    rendered = chat.tokenizer.apply_chat_template(
        [{"role": "user", "content": "U"}, {"role": "assistant", "content": text}, {"role": "user", "content": "U"}],
        tokenize=False,
    )
    assert f"<|im_start|>assistant\n{text if shown is None else shown}<|im_end|>" in rendered


def test_limits_count_what_the_server_sees() -> None:
    chat, texts = chat_of("thinks"), texts_of("thinks")
    rollout, requests = play(chat, texts)
    ends = [
        len(request) - len(rollout.prompt_ids) + turn.end - turn.start
        for request, turn in zip(requests, rollout.turns, strict=True)
    ]
    enough = replace(LIMITS, max_response_tokens=max(ends))
    assert max(ends) < len(rollout.token_ids)
    assert play(chat, texts, enough)[0].status == "ok"
    less, _ = play(chat, texts, replace(LIMITS, max_response_tokens=max(ends) - 1))
    assert less.status == "truncated" and len(less.token_ids) < len(rollout.token_ids)
    assert play(chat, texts, replace(LIMITS, max_model_len=len(rollout.prompt_ids) + max(ends)))[0].status == "ok"


@pytest.mark.parametrize(
    ("rewinds", "message"),
    [
        ("x", "a list is needed"),
        ([[3]], "two whole numbers"),
        ([[3, 1.5]], "two whole numbers"),
        ([[0, 0]], "has to lie behind 0"),
        ([[9999, 0]], "has to lie behind 0 and before"),
        ([[3, 3]], "can't be kept"),
        ([[3, -999]], "can't be kept"),
        ([[3, 1]], "within an assistant turn"),
    ],
)
def test_a_dump_with_impossible_contexts_is_refused_by_name(rewinds: Any, message: str) -> None:
    rollout, _ = play(chat_of("thinks"), texts_of("thinks"))
    with pytest.raises(DataError, match=message) as error:
        parse_rollout({**rollout.to_dict(), "rewinds": rewinds}, "rollouts.jsonl", 7)
    assert "rollouts.jsonl" in str(error.value) and "rewinds" in str(error.value)
    row = rollout.to_dict()
    del row["rewinds"]
    assert parse_rollout(row, "f", 1).rewinds == []  # a dump of before
