"""Earlier thoughts: what the policy is trained on is what it saw, context by context, with every shared prefix computed
once.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from fixtures.chat_models import tokenizer
from test_training_batch import fake_logprob, score

from pact_nemo.batches.prompt_groups import Gate, PromptGroup, TraceUse, form_group
from pact_nemo.batches.prompt_trees import grow_tree, supervised
from pact_nemo.batches.streams import Scores, with_streams
from pact_nemo.chat.template import ChatFormat
from pact_nemo.chat.tool_formats import TOOL_FORMATS
from pact_nemo.config.schema import ObjectiveConfig
from pact_nemo.environments.base import Outcome, Task, ToolCall
from pact_nemo.errors import ConfigError, DataError
from pact_nemo.methods.registry import method_named
from pact_nemo.objective.components import CALL
from pact_nemo.objective.loss import batch_loss
from pact_nemo.objective.schedules import StepClock, TraceSchedule
from pact_nemo.objective.surrogate import Clip
from pact_nemo.rollouts.episode import EpisodeSetup, SeedPath, run_episode
from pact_nemo.rollouts.store import parse_rollout
from pact_nemo.rollouts.types import Rollout
from pact_nemo.serving.client import Completion
from pact_nemo.serving.config import EpisodeLimits, Sampling
from pact_nemo.traces.schema import ReasoningSegment, Trace, TraceTurn
from pact_nemo.traces.spans import TraceTokens, encode_trace, truncate_at_turn
from pact_nemo.training.warmup import closing_ids, sft_tree

LS = {
    "name": "ls",
    "description": "List a folder.",
    "parameters": {"type": "object", "properties": {"a": {"type": "boolean"}}},
}
CD = {
    "name": "cd",
    "description": "Enter a folder.",
    "parameters": {"type": "object", "properties": {"to": {"type": "string"}}},
}
LIMITS = EpisodeLimits(
    max_turns_per_user_turn=6, max_turns=20, max_turn_tokens=256, max_response_tokens=4096, max_model_len=8192
)
LATER = ["Now enter docs.", "And what is in it?"]
# (thought, visible): two tool turns and an answer for the first user, a tool turn and an answer for the second, an
# answer for the third
SPOKEN = [
    ("I have to look first.\nls shows files.", '<tool_call>\n{"name": "ls", "arguments": {"a": true}}\n</tool_call>'),
    ("Once more.", '<tool_call>\n{"name": "ls", "arguments": {}}\n</tool_call>'),
    ("That is all.", "There are two files: a and é."),
    ("cd it is.", '<tool_call>\n{"name": "cd", "arguments": {"to": "docs"}}\n</tool_call>'),
    ("", "I am in docs."),
    ("Nothing was listed.", "I don't know."),
]
KINDS = (
    "thinks",
    "opened",
    "silent",
)  #: Qwen3; a Qwen3 whose generation prompt opens the thought; Qwen3 with enable_thinking=false


@cache
def chat_of(kind: str, earlier_thoughts: str | None = None) -> ChatFormat:
    base = tokenizer("qwen3")
    if kind == "opened":
        before, prompt, after = str(base.chat_template).rpartition("{{- '<|im_start|>assistant\\n' }}")
        base.chat_template = before + prompt.replace("assistant\\n", "assistant\\n<think>\\n") + after
    constants = {"enable_thinking": False} if kind == "silent" else None
    return ChatFormat(base, TOOL_FORMATS["hermes"], constants, earlier_thoughts=earlier_thoughts)


def written(kind: str, thought: str, visible: str) -> str:
    """What the policy samples behind the generation prompt."""
    if kind == "silent" or (kind == "thinks" and not thought):
        return visible
    return f"{'' if kind == 'opened' else '<think>' + chr(10)}{thought}\n</think>\n\n{visible}"


def make_task() -> Task:
    return Task(
        "t0",
        "t0",
        "scripted",
        (({"role": "user", "content": "What is in here?"},),),
        (LS, CD),
        ((ToolCall("ls", {"a": True}),),),
    )


class Session:
    def __init__(self) -> None:
        self.later = list(LATER)

    def execute(self, calls: Any) -> list[str]:
        return [f"ran {call.name}" for call in calls]

    def next_user_turn(self, message: str = "") -> Any:
        return ([{"role": "user", "content": self.later.pop(0)}], []) if self.later else None

    def outcome(self) -> Outcome:
        return Outcome(True, 1.0)

    def close(self) -> None:
        pass


class ScriptedEnvironment:
    def tasks(self) -> list[Task]:
        return []

    def start(self, task: Task) -> Session:
        return Session()


class ScriptedPolicy:
    weight_version = 3

    def __init__(self, chat: ChatFormat, texts: list[str]):
        self.chat, self.texts, self.requests = chat, texts, []

    async def generate(self, request: Any) -> Completion:
        ids = [*self.chat.encode_assistant(self.texts[len(self.requests)])[0], self.chat.end_of_turn_id]
        self.requests.append(list(request.prompt_ids))
        ids = ids[: request.max_tokens]
        return Completion(ids, [-0.5 - 0.01 * i for i in range(len(ids))], "stop", self.weight_version)


def play(chat: ChatFormat, texts: list[str], limits: EpisodeLimits = LIMITS) -> tuple[Rollout, list[list[int]]]:
    """The rollout, and the ids of each request."""
    policy = ScriptedPolicy(chat, texts)
    environment: Any = ScriptedEnvironment()
    rollout = asyncio.run(
        run_episode(make_task(), 0, EpisodeSetup(environment, chat, limits, Sampling(), SeedPath(1, 0)), policy)
    )
    assert rollout.status != "failed", rollout.error
    return rollout, policy.requests


def texts_of(kind: str) -> list[str]:
    return [written(kind, thought, visible) for thought, visible in SPOKEN]


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


# --- traces and the training tree
# ------------------------------------------------------------------------------------------------------


def make_trace() -> Trace:
    """Two tool turns for the first user, one for the second, one for the third."""

    def turn(thought: str, call: ToolCall, user_turn: int, after: str | None = None) -> TraceTurn:
        messages = ({"role": "user", "content": after},) if after else ()
        segments = (ReasoningSegment("task_restate", thought), ReasoningSegment("decision_summary", " So I call."))
        return TraceTurn(segments, (call,), (f"ran {call.name}",), user_turn, messages)

    ls = ToolCall("ls", {"a": True})
    turns = (
        turn("The user wants a list.", ls, 0),
        turn("Once more, to be sure.", ToolCall("ls", {}), 0, LATER[0]),
        turn("The folder is docs.", ToolCall("cd", {"to": "docs"}), 1, LATER[1]),
        turn("Now it can be listed.", ls, 2),
    )
    return Trace("t0", "teacher", turns, True)


def trace_messages(chat: ChatFormat, trace: Trace, tokens: TraceTokens) -> list[list[dict[str, str]]]:
    """The messages before each assistant message of a trace, what the assistant wrote cut out of h*."""
    found, start = [[dict(message) for message in make_task().user_turns[0]]], 0
    for index, turn in enumerate(trace.turns[: len(tokens.turn_ends)]):
        end = tokens.token_ids.index(chat.end_of_turn_id, start)
        following = chat.tool_format.render_observation(list(turn.observations))
        if turn.closing_message:
            following.append({"role": "assistant", "content": chat.assistant_parts("", turn.closing_message).text})
        following += [dict(message) for message in turn.user_messages_after]
        found.append(
            [*found[-1], {"role": "assistant", "content": chat.decode(tokens.token_ids[start:end])}, *following]
        )
        start = tokens.turn_ends[index] + len(chat.generation_ids())
    return found


def sft_contexts(chat: ChatFormat, trace: Trace, tokens: TraceTokens) -> dict[int, list[int]]:
    """Position within h* -> the separate sequence that its token is taught behind: the template's own rendering, and
    the message so far.
    """
    found = {}
    messages, start = trace_messages(chat, trace, tokens), 0
    for turn in range(len(tokens.turn_ends)):
        prompt = chat.prompt_ids(messages[turn], [LS, CD])
        for n in range(start, tokens.turn_ends[turn]):
            if supervised(tokens)[n]:
                found[n] = [*prompt, *tokens.token_ids[start:n]]
        start = tokens.turn_ends[turn] + len(chat.generation_ids())
    return found


def make_group(kind: str, trace: TraceTokens, objective: ObjectiveConfig) -> PromptGroup:
    """Four rollouts with other rewards each, of which two speak to one user only."""
    chat, texts = chat_of(kind), texts_of(kind)
    rollouts = []
    for k in range(4):
        rollout, _ = play(chat, texts if k % 2 == 0 else [texts[1], *texts[2:]])
        short = k == 3
        if short:  # ends within the first user turn
            end = rollout.turns[1].end
            rollout = replace(
                rollout,
                token_ids=rollout.token_ids[:end],
                loss_mask=rollout.loss_mask[:end],
                sampler_logprobs=rollout.sampler_logprobs[:end],
                turns=rollout.turns[:2],
                rewinds=[cut for cut in rollout.rewinds if cut[0] < end],
            )
        rollout.outcome = Outcome(k == 0, float(k == 0))
        rollouts.append(replace(rollout, sample=k))
    return form_group(
        make_task(), rollouts, TraceUse(trace), method_named("pact", objective), Gate(1, 0, objective.anchor_prob)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_trace_is_taught_in_the_contexts_that_the_policy_will_have(kind: str) -> None:
    chat, trace = chat_of(kind), make_trace()
    tokens = encode_trace(trace, chat, end_of_turn=CALL)
    assert tokens.branches
    tree = sft_tree(
        chat.prompt_ids([*make_task().user_turns[0]], [LS, CD]), tokens, np.ones(len(tokens)), ([], []), 0.0
    )
    separate = [
        fake_logprob(context, tokens.token_ids[n]) for n, context in sorted(sft_contexts(chat, trace, tokens).items())
    ]
    assert score(tree).tolist() == separate


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("turns", [1, 2, 3, 4])
def test_a_cut_trace_is_taught_as_its_whole_turns_are_and_its_closing_message_in_the_next_context(
    kind: str, turns: int
) -> None:
    chat, trace = chat_of(kind), make_trace()
    whole = encode_trace(trace, chat, end_of_turn=CALL)
    tokens = truncate_at_turn(whole, whole.turn_ends[turns - 1])
    prompt = chat.prompt_ids([*make_task().user_turns[0]], [LS, CD])
    closing = closing_ids(chat, "Done.")
    tree = sft_tree(prompt, tokens, np.ones(len(tokens)), closing, 1.0)
    contexts = [context for _, context in sorted(sft_contexts(chat, trace, tokens).items())]
    separate = [
        fake_logprob(context, tokens.token_ids[n])
        for context, n in zip(contexts, np.flatnonzero(supervised(tokens)), strict=True)
    ]
    opened = chat.prompt_ids(trace_messages(chat, trace, whole)[turns], [LS, CD])
    words = closing[0][closing[1].index(True) :]
    separate += [fake_logprob([*opened, *words[:n]], word) for n, word in enumerate(words)]
    assert score(tree).tolist() == separate


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("anchored", [False, True])
def test_the_loss_of_the_tree_is_that_of_separate_sequences(kind: str, anchored: bool) -> None:
    """Equation 14, token by token, each behind its own context written out."""
    chat, trace = chat_of(kind), make_trace()
    tokens, schedule = encode_trace(trace, chat, end_of_turn=CALL), TraceSchedule(clock=StepClock(5))
    objective = ObjectiveConfig(group_size=4, anchor_prob=float(anchored), kl_coef=0.0, sft_coef=0.3)
    group = make_group(kind, tokens, objective)
    assert group.anchored == anchored and sum(bool(r.rewinds) for r in group.rollouts) >= 2
    boundary = chat.boundary_ids()
    method = method_named("pact", objective)
    bare = grow_tree(group, boundary, method, contexts=("x", "h"))
    (prompt,) = with_streams([bare], method, schedule, 1, Scores([score(bare.tree, "old")], importance_cap=2.0))
    total = float(
        batch_loss(
            score(prompt.tree), {k: v.double() for k, v in prompt.tree.streams.items()}, surrogate=Clip(0.2, 0.2)
        )[0]
    )

    x, expected = group.rollouts[0].prompt_ids, 0.0
    privileged = [*x, *tokens.token_ids, *boundary]
    for rollout, advantages in zip(group.rollouts, group.advantages, strict=True):
        here = 0.0
        for turn, advantage in zip(rollout.turns, advantages, strict=True):
            for n in range(turn.start, turn.end):
                plain, token = rollout.context_ids(n), rollout.token_ids[n]
                context = plain
                if (
                    not anchored
                ):  # what the model had before this token, with the trace and the boundary in the place of x
                    kept = len(x) - next(
                        i for i, pair in enumerate(zip([*x, -1], [*plain, -2], strict=False)) if pair[0] != pair[1]
                    )
                    context = [*privileged[: len(privileged) - kept], *plain[len(x) - kept :]]
                ratio = np.exp(fake_logprob(context, token) - fake_logprob(context, token, "old"))
                weight = min(np.exp(fake_logprob(plain, token, "old") - rollout.sampler_logprobs[n]), 2.0)
                here -= weight * min(ratio * advantage, np.clip(ratio, 0.8, 1.2) * advantage)
        expected += here / sum(rollout.loss_mask) / len(group.rollouts)
    if not anchored:
        m = schedule.weights(np.array(tokens.component), np.array(tokens.segment_level), np.array(tokens.turn), 1)
        nll = {
            n: -fake_logprob(context, tokens.token_ids[n]) for n, context in sft_contexts(chat, trace, tokens).items()
        }
        expected += 0.3 * sum(m[n] * value for n, value in nll.items()) / m.sum()
    assert total == pytest.approx(expected, rel=1e-6)  # streams are stored in float32


@pytest.mark.parametrize("kind", KINDS)
def test_shared_prefixes_are_computed_once(kind: str) -> None:
    chat = chat_of(kind)
    tokens, objective = encode_trace(make_trace(), chat), ObjectiveConfig(group_size=4, anchor_prob=0.0)
    group = make_group(kind, tokens, objective)
    prompt = grow_tree(group, chat.boundary_ids(), method_named("pact", objective), contexts=("x",))
    separate = sum(
        len(r.context_ids(turn.end)) if turn.end == len(r.token_ids) else len(r.context_ids(turn.end - 1)) + 1
        for r in group.rollouts
        for turn in r.turns
    )
    flat = sum(len(rollout.token_ids) for rollout in group.rollouts)
    assert prompt.tree.num_tokens == len(group.rollouts[0].prompt_ids) + flat < separate / 3
    written = sum(turn.end - turn.start for r in group.rollouts for turn in r.turns)
    repeated = sum(turn.end - turn.start for r in group.rollouts for turn in r.turns[:-1])
    observed = flat - written
    assert flat <= written + repeated + observed


@pytest.mark.slow
def test_what_contexts_cost_in_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    """The counts of docs/cluster/performance.md: ground-truth traces as rollouts, eight of a kind a prompt, with the
    template's contexts.
    """
    from pact_nemo.traces.spans import encode_trace
    from tests.workers.bfcl_tasks import bfcl_environment, make_trace

    chat, group = chat_of("thinks"), 8
    environment = bfcl_environment(categories=["multi_turn_base"], window="full")
    tree, contexts, messages = [], [], []
    for task in environment.tasks()[:40]:
        trace = make_trace(environment, task, style="full", calls_per_turn="one")
        if trace is None:
            continue
        tokens = encode_trace(trace, chat)
        prompt = len(chat.prompt_ids(list(task.user_turns[0]), list(task.tools)))
        ends = [*(cut.start for cut in tokens.branches), len(tokens)]
        branches = list(zip(tokens.branches, ends[1:], strict=True))
        tree.append(prompt + group * (ends[0] + sum(len(cut.context_ids) + end - cut.start for cut, end in branches)))
        contexts.append(
            group
            * (
                prompt
                + ends[0]
                + sum(prompt + cut.keep + len(cut.context_ids) + end - cut.start for cut, end in branches)
            )
        )
        each, shift = 0, 0
        for cut, end in zip([None, *tokens.cuts], tokens.turn_ends, strict=False):
            shift = cut.keep + len(cut.context_ids) - cut.start if cut else shift
            each += prompt + shift + end
        messages.append(group * each)
    means = [sum(counts) / len(counts) for counts in (tree, contexts, messages)]
    with capsys.disabled():
        print(
            f"\n{len(tree)} tasks, tokens a prompt: tree {means[0]:,.0f}, a sample a context {means[1]:,.0f}, a message"
            f" {means[2]:,.0f}"
        )
    assert means[0] < means[1] / 5 < means[2] / 5
