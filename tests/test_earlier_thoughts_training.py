"""Earlier thoughts in the training tree: traces are taught in the contexts that the policy will have, a tree has the
loss of separate sequences, and every shared prefix is computed once.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_training_batch import fake_logprob, score

from pact_nemo.batches.prompt_groups import Gate, PromptGroup, TraceUse, form_group
from pact_nemo.batches.prompt_trees import grow_tree, supervised
from pact_nemo.batches.streams import Scores, with_streams
from pact_nemo.chat.template import ChatFormat
from pact_nemo.chat.thoughts import visible_text
from pact_nemo.config.schema import ObjectiveConfig
from pact_nemo.environments.base import Outcome, ToolCall
from pact_nemo.methods.registry import method_named
from pact_nemo.objective.components import CALL
from pact_nemo.objective.loss import batch_loss
from pact_nemo.objective.schedules import StepClock, TraceSchedule
from pact_nemo.objective.surrogate import Clip
from pact_nemo.traces.closings import Closing, closing_ids, with_closings
from pact_nemo.traces.schema import ReasoningSegment, Trace, TraceTurn
from pact_nemo.traces.spans import TraceTokens, encode_trace, truncate_at_turn
from pact_nemo.training.warmup import sft_tree
from tests.workers.thoughts_kit import CD, KINDS, LATER, LS, chat_of, make_task, play, texts_of


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
        chat.prompt_ids([*make_task().user_turns[0]], [LS, CD]), tokens, np.ones(len(tokens)), Closing([], [], 0), 0.0
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
    words, taught = closing.ids[closing.opening :], closing.taught[closing.opening :]
    separate += [fake_logprob([*opened, *words[:n]], word) for n, word in enumerate(words) if taught[n]]
    assert score(tree).tolist() == separate


@pytest.mark.parametrize("kind", KINDS)
def test_the_warm_ups_closing_message_has_the_form_of_a_traces(kind: str) -> None:
    """A model that thinks says it behind an empty thought: without it, it would answer inside the thought, so
    nothing.
    """
    chat = chat_of(kind)
    closing, tokens = closing_ids(chat, "Done."), encode_trace(with_closings(make_trace(), "Done."), chat)
    start = tokens.turn_ends[-2]
    length = len(closing.ids)
    assert tokens.token_ids[start : start + length] == closing.ids
    assert [part == CALL for part in tokens.component[start : start + length]] == closing.taught
    assert chat.decode(closing.ids[closing.opening :]).endswith("Done.")
    opened = bool(chat.opens_thought)
    assert visible_text(chat.decode(closing.ids[closing.opening :]), opened) == "Done."


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
