"""The batch: token trees and streams against the objective written down naively, prompt by prompt and token by
token.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from pact_nemo.batches.prompt_groups import Gate, PromptGroup, TraceUse, form_group
from pact_nemo.batches.prompt_trees import PromptTree, carried_over, contexts_needed, grow_tree, tempered
from pact_nemo.batches.streams import Scores, with_streams
from pact_nemo.config.schema import ObjectiveConfig
from pact_nemo.data.tasks import prompts_of_step
from pact_nemo.environments.base import Outcome, Task, ToolCall
from pact_nemo.methods.base import Method
from pact_nemo.methods.registry import method_named
from pact_nemo.objective.components import CALL, OBSERVATION, OTHER, REASONING
from pact_nemo.objective.gate import anchored
from pact_nemo.objective.schedules import StepClock, TraceSchedule
from pact_nemo.policy.trees import TokenTree
from pact_nemo.rollouts.types import Rollout, Turn
from pact_nemo.traces.spans import TraceTokens

BOUNDARY = [900, 901]
TRACE = TraceTokens(
    token_ids=[50, 51, 52, 53, 54, 55],
    component=[REASONING, REASONING, CALL, CALL, OTHER, OBSERVATION],
    segment_level=[1, 4, -1, -1, -1, -1],
    turn=[0] * 6,
    turn_ends=[6],
)


def fake_logprob(context: list[int], token: int, salt: str = "") -> float:
    """A language model that really depends on its whole context: any mistake in a context changes the number."""
    digest = hashlib.blake2b(repr((salt, context, token)).encode(), digest_size=8).digest()
    return -3.0 * (int.from_bytes(digest, "big") / 2**64) - 0.01


def score(tree: TokenTree, salt: str = "") -> torch.Tensor:
    """Log-probs of the scored tokens of a tree, each from the tokens on its path."""
    paths: list[list[int]] = []
    out = []
    for segment in tree.segments:
        context = list(paths[segment.parent]) if segment.parent >= 0 else []
        for token, wanted in zip(segment.token_ids.tolist(), segment.scored, strict=True):
            if wanted:
                out.append(fake_logprob(context, token, salt))
            context.append(token)
        paths.append(context)
    return torch.tensor(out, dtype=torch.float64)


def make_task(name: str) -> Task:
    return Task(
        name, name, "c", (({"role": "user", "content": "u"},),), (), ((ToolCall("f", {"a": 1}), ToolCall("g", {})),)
    )


def make_rollout(task: Task, k: int, calls: list[ToolCall], success: bool, status: Any = "ok") -> Rollout:
    base = 100 + 20 * k
    tokens = [base, base + 1, base + 2, 70, 71, base + 3, base + 4][: 7 if k % 2 == 0 else 5]
    mask = [1, 1, 1, 0, 0, 1, 1][: len(tokens)]
    turns = [Turn(0, 3, "t", calls=calls, user_turn=0)]
    if len(tokens) > 5:
        turns.append(Turn(5, 7, "done", user_turn=0))
    logprobs = [-0.5 * m for m in mask]
    outcome = None if status == "failed" else Outcome(success, float(success))
    return Rollout(task.id, k, [1, 2, 3], tokens, mask, [float(x) for x in logprobs], turns, outcome, 0, status=status)


def make_groups(
    objective: ObjectiveConfig,
    seed: int = 5,
    step: int = 2,
    control: TraceTokens | None = None,
    method: str = "pact",
) -> list[PromptGroup]:
    groups = []
    for i, name in enumerate(("p0", "p1", "p2", "p3")):
        task = make_task(name)
        rollouts = [
            make_rollout(task, 0, [ToolCall("f", {"a": 1})], True),
            make_rollout(task, 1, [ToolCall("f", {"a": 2})], False),
            make_rollout(task, 2, [], i % 2 == 0),
            make_rollout(task, 3, [], False, status="failed" if i == 1 else "truncated"),
        ]
        groups.append(
            form_group(
                task,
                rollouts,
                TraceUse(None if name == "p3" else TRACE, control=control),
                method_named(method, objective),
                Gate(seed, step, objective.anchor_prob),
            )
        )
    return groups


def naive_loss(groups: list[PromptGroup], objective: ObjectiveConfig, schedule: TraceSchedule, step: int) -> float:
    """Equation 14 over separate sequences [x; tau], [x; h*; b; tau] and [x; h*]."""
    total = 0.0
    for group in groups:
        x = group.rollouts[0].prompt_ids
        prefix = (
            x if group.anchored else [*x, *(TRACE if group.control is None else group.control).token_ids, *BOUNDARY]
        )
        usable = [k for k, r in enumerate(group.rollouts) if r.status != "failed"]
        rl, kl = 0.0, 0.0
        for k in usable:
            rollout = group.rollouts[k]
            here_rl, here_kl, count = 0.0, 0.0, sum(rollout.loss_mask)
            for t, turn in enumerate(rollout.turns):
                for n in range(turn.start, turn.end):
                    context, token = [*prefix, *rollout.token_ids[:n]], rollout.token_ids[n]
                    ratio = math.exp(fake_logprob(context, token) - fake_logprob(context, token, "old"))
                    a = float(group.advantages[k][t])
                    clipped = min(max(ratio, 1 - objective.clip_low), 1 + objective.clip_high)
                    plain = [*x, *rollout.token_ids[:n]]
                    weight = min(math.exp(fake_logprob(plain, token, "old") - rollout.sampler_logprobs[n]), 2.0)
                    here_rl -= weight * min(ratio * a, clipped * a)
                    d = fake_logprob(plain, token, "ref") - fake_logprob(plain, token)
                    here_kl += math.exp(d) - d - 1
            rl += here_rl / count / len(usable)
            kl += here_kl / count / len(usable)
        sft = 0.0
        if not group.anchored:
            m = schedule.weights(np.array(TRACE.component), np.array(TRACE.segment_level), np.array(TRACE.turn), step)
            nll = [-fake_logprob([*x, *TRACE.token_ids[:n]], TRACE.token_ids[n]) for n in range(len(m))]
            sft = objective.sft_coef * sum(w * v for w, v in zip(m, nll, strict=True)) / m.sum() if m.sum() else 0.0
        total += (rl + sft + objective.kl_coef * kl) / len(groups)
    return total


def built(
    groups: list[PromptGroup], objective: ObjectiveConfig | Method, schedule: TraceSchedule, step: int
) -> list[PromptTree]:
    method = objective if isinstance(objective, Method) else method_named("pact", objective)
    prompts = [grow_tree(g, BOUNDARY, method, contexts=contexts_needed(g, method, diagnostics=True)) for g in groups]
    bare = [grow_tree(g, BOUNDARY, method, contexts=("x",)) for g in groups]
    scores = Scores(
        [score(p.tree, "old") for p in prompts],
        [carried_over(b, p, score(b.tree, "ref")) for b, p in zip(bare, prompts, strict=True)],
        importance_cap=2.0,
    )
    prompts = with_streams(prompts, method, schedule, step, scores)
    for prompt in prompts:
        prompt.tree.streams = {name: value.double() for name, value in prompt.tree.streams.items()}
    return prompts


@pytest.mark.parametrize("q", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("step", [0, 2, 4])
def test_the_summed_loss_is_equation_14(q: float, step: int) -> None:
    objective = ObjectiveConfig(group_size=4, anchor_prob=q, kl_coef=0.01, sft_coef=0.3)
    schedule = TraceSchedule(clock=StepClock(5))
    groups = make_groups(objective)
    loss_fn = method_named("pact", objective).loss
    total = sum(float(loss_fn(score(p.tree), p.tree.streams)[0]) for p in built(groups, objective, schedule, step))
    assert total == pytest.approx(
        naive_loss(groups, objective, schedule, step), rel=1e-6
    )  # streams are stored in float32


@pytest.mark.parametrize("shown", [[], [60, 61, 62]])
def test_a_control_changes_what_rl_is_conditioned_on_and_not_what_is_taught(shown: list[int]) -> None:
    objective = ObjectiveConfig(group_size=4, anchor_prob=0.5, kl_coef=0.01, sft_coef=0.3)
    schedule = TraceSchedule(clock=StepClock(5))
    control = TraceTokens(shown, [CALL] * len(shown))
    groups = make_groups(objective, control=control)
    assert any(not group.anchored for group in groups)
    prompts = built(groups, objective, schedule, 2)
    loss_fn = method_named("pact", objective).loss
    total = sum(float(loss_fn(score(p.tree), p.tree.streams)[0]) for p in prompts)
    assert total == pytest.approx(naive_loss(groups, objective, schedule, 2), rel=1e-6)
    own = built(make_groups(objective), objective, schedule, 2)
    assert total != pytest.approx(sum(float(loss_fn(score(p.tree), p.tree.streams)[0]) for p in own), rel=1e-3)
    for key in ("w_sft_reasoning", "w_sft_call"):
        assert sum(float(p.tree.streams[key].sum()) for p in prompts) == pytest.approx(
            sum(float(p.tree.streams[key].sum()) for p in own)
        )


def test_gate_and_missing_trace_decide_the_contexts() -> None:
    objective = ObjectiveConfig(group_size=4, anchor_prob=0.5)
    groups = make_groups(objective)
    assert [g.anchored for g in groups[:3]] == [anchored(5, 2, f"p{i}", 0.5) for i in range(3)]
    assert groups[3].anchored and groups[3].trace is None
    for group in groups:
        contexts = {
            context
            for context, _ in grow_tree(group, BOUNDARY, method_named("pact", objective), contexts=("x", "h")).spans
        }
        assert contexts == ({"x"} if group.anchored else {"x", "h", "sft"})
    plain = make_groups(ObjectiveConfig(group_size=4), method="grpo")
    assert all(g.anchored and g.trace is None for g in plain)


def test_grpo_is_the_group_normalised_outcome_and_matchtir_is_pact_without_traces() -> None:
    groups = {
        method: make_groups(ObjectiveConfig(group_size=4, anchor_prob=0.0), method=method)
        for method in ("pact", "matchtir", "grpo")
    }
    for pact, matchtir, grpo in zip(*groups.values(), strict=True):
        assert matchtir.anchored and grpo.anchored and matchtir.trace is None is grpo.trace
        for a, b in zip(pact.advantages, matchtir.advantages, strict=True):
            np.testing.assert_array_equal(a, b)
        usable = [k for k, r in enumerate(grpo.rollouts) if r.status != "failed" and r.turns]
        outcomes = np.array([grpo.rollouts[k].outcome.score for k in usable])  # type: ignore[union-attr]
        expected = (outcomes - outcomes.mean()) / (outcomes.std(ddof=1) + 1e-6)
        for k, value in zip(usable, expected, strict=True):
            np.testing.assert_allclose(
                grpo.advantages[k], value, rtol=1e-5, atol=1e-6
            )  # one advantage for the whole rollout


def test_nothing_is_computed_that_no_term_reads() -> None:
    objective = ObjectiveConfig(group_size=4, anchor_prob=0.0, kl_coef=0.0)
    group = make_groups(objective)[0]
    pact = method_named("pact", objective)
    assert contexts_needed(group, pact, diagnostics=False) == ["h"]
    assert contexts_needed(group, pact, diagnostics=True) == ["x", "h"]
    no_trace_rl = method_named("pact", replace(objective, trace_rl=False))
    spans = grow_tree(
        group, BOUNDARY, no_trace_rl, contexts=contexts_needed(group, no_trace_rl, diagnostics=False)
    ).spans
    assert {context for context, _ in spans} == {"x", "sft"}


def test_failed_rollouts_are_in_no_tree_and_carry_no_advantage() -> None:
    objective = ObjectiveConfig(group_size=4, anchor_prob=0.0)
    group = make_groups(objective)[1]
    spans = grow_tree(group, BOUNDARY, method_named("pact", objective), contexts=("x", "h")).spans
    assert ("x", 3) not in spans and ("h", 3) not in spans and ("h", 2) in spans
    assert not group.advantages[3].any()


def test_a_prompt_whose_rollouts_all_failed_still_teaches_its_trace_and_counts() -> None:
    objective = ObjectiveConfig(group_size=4, anchor_prob=0.0)
    schedule = TraceSchedule(clock=StepClock(5))
    groups = make_groups(objective)
    lost = next(group for group in groups if not group.anchored and group.trace is not None)
    for rollout in lost.rollouts:
        rollout.status = "failed"
    lost.advantages = [np.zeros_like(a) for a in lost.advantages]
    prompts = built(groups, objective, schedule, 1)
    tree = next(p for p in prompts if p.group is lost).tree
    assert tree.streams["w_sft_call"].any() and not tree.streams["w_rl_h"].any() and not tree.streams["w_rl_x"].any()
    # groups with nothing to compute count in |B|
    before = tree.streams["w_sft_call"].clone()
    method = method_named("pact", objective)
    halved = with_streams(prompts, method, schedule, 1, Scores(), others=groups)
    tree = next(p for p in halved if p.group is lost).tree
    assert torch.allclose(tree.streams["w_sft_call"].double(), before / 2)


def test_trace_conditioned_and_prompt_only_share_tokens_and_advantages() -> None:
    objective = ObjectiveConfig(group_size=4, anchor_prob=0.0)
    prompts = built(make_groups(objective), objective, TraceSchedule(clock=StepClock(5)), 0)
    for prompt in prompts[:3]:
        for k in range(3):
            x, h = (slice(*prompt.spans[(c, k)]) for c in ("x", "h"))
            assert torch.equal(prompt.tree.streams["advantages"][x], prompt.tree.streams["advantages"][h])
            assert not prompt.tree.streams["w_rl_x"][x].any() and prompt.tree.streams["w_rl_h"][h].all()


def test_prompt_order_is_a_function_of_seed_and_step_and_visits_all() -> None:
    tasks = [make_task(f"t{i}") for i in range(10)]
    seen = [t.id for step in range(5) for t in prompts_of_step(tasks, step, 4, seed=3)]
    assert (
        len(set(seen[:8])) == 8 and len(set(seen[8:16])) == 8
    )  # two batches an epoch, what is left over waits for the next one
    assert {t.id for step in range(40) for t in prompts_of_step(tasks, step, 4, seed=3)} == {t.id for t in tasks}
    assert seen[8:12] == [t.id for t in prompts_of_step(tasks, 2, 4, seed=3)]
    assert seen != [t.id for step in range(5) for t in prompts_of_step(tasks, step, 4, seed=4)]


def test_rollouts_are_scored_at_the_sampling_temperature_and_the_trace_at_one() -> None:
    for method, trace in (("pact", 1.0), ("chord", 1.0), ("luffy", 0.7)):  # LUFFY's trace is a sample of its group
        objective = ObjectiveConfig(group_size=4, anchor_prob=0.0)
        named = method_named(method, objective)
        prompts = built(make_groups(objective, method=method), named, TraceSchedule(clock=StepClock(5)), 0)
        assert all(prompt.tree.temperatures is None for prompt in tempered(prompts, named, 1.0))
        for prompt in tempered(prompts, named, 0.7):
            assert prompt.tree.temperatures is not None and len(prompt.tree.temperatures) == prompt.tree.num_scored
            for (context, _), (start, end) in prompt.spans.items():
                expected = trace if context == "sft" else 0.7
                assert torch.equal(prompt.tree.temperatures[start:end], torch.full((end - start,), expected)), (
                    method,
                    context,
                )


def test_the_entropy_bonus_is_on_policy_tokens_under_the_prompt_with_the_weights_of_the_kl_term() -> None:
    objective = ObjectiveConfig(group_size=4, anchor_prob=0.5, kl_coef=0.01, entropy_coef=0.02)
    conditioned = make_groups(ObjectiveConfig(group_size=4, anchor_prob=0.0))[0]
    without_kl = method_named("pact", ObjectiveConfig(entropy_coef=0.02, kl_coef=0.0))
    assert contexts_needed(conditioned, without_kl, diagnostics=False) == ["x", "h"]
    for prompt in built(make_groups(objective), objective, TraceSchedule(clock=StepClock(5)), 0):
        streams = prompt.tree.streams
        torch.testing.assert_close(streams["w_entropy"], 2.0 * streams["w_kl"], rtol=1e-6, atol=0)
        assert bool((streams["w_entropy"] != 0).any())
