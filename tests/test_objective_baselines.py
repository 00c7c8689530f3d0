"""CHORD and LUFFY against their papers' formulas, written down token by token over separate sequences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pact_nemo.batches.prompt_groups import PromptGroup
from pact_nemo.config.load import load_config
from pact_nemo.config.schema import ObjectiveConfig
from pact_nemo.methods.chord import chord_mu, phi_weighted_nll
from pact_nemo.methods.luffy import shaped_off_policy
from pact_nemo.methods.registry import make_method, method_named
from pact_nemo.objective.schedules import StepClock, TraceSchedule
from tests.test_training_batch import TRACE, built, fake_logprob, make_groups, score

TAUGHT = (0, 1, 2, 3)  # reasoning and call tokens of TRACE


@pytest.mark.parametrize(
    ("step", "linear", "cosine"),
    [(0, 0.9, 0.9), (2, 0.74, 0.8236068), (5, 0.5, 0.5), (8, 0.26, 0.1763932), (10, 0.1, 0.1), (50, 0.1, 0.1)],
)
def test_mu_goes_down_and_stays(step: int, linear: float, cosine: float) -> None:
    assert chord_mu(step, 0.9, 0.1, 10, "linear") == pytest.approx(linear)
    assert chord_mu(step, 0.9, 0.1, 10) == pytest.approx(cosine)
    with pytest.raises(ValueError, match="mu schedule"):
        chord_mu(step, 0.9, 0.1, 10, "exponential")


@pytest.mark.parametrize("wrong", [(1.1, 0.0, 5), (0.5, -0.1, 5), (0.5, 0.1, 0)])
def test_mu_outside_its_range_is_refused(wrong: tuple[float, float, int]) -> None:
    with pytest.raises(ValueError, match="mu goes"):
        chord_mu(0, *wrong)


def test_phi_is_a_constant_for_the_gradient() -> None:
    logprobs = torch.tensor([-0.2, -1.5, float("-inf")], dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([0.5, 2.0, 0.0], dtype=torch.float64)
    loss = phi_weighted_nll(logprobs, weights)
    expected = [-w * math.exp(v) * (1 - math.exp(v)) * v for v, w in ((-0.2, 0.5), (-1.5, 2.0))]
    assert loss.tolist() == pytest.approx([*expected, 0.0])
    loss.sum().backward()
    slope = [-w * math.exp(v) * (1 - math.exp(v)) for v, w in ((-0.2, 0.5), (-1.5, 2.0))]
    assert logprobs.grad is not None and logprobs.grad.tolist() == pytest.approx([*slope, 0.0])


def test_shaping_lifts_unlikely_tokens_and_its_gradient_is_that_of_f() -> None:
    logprobs = torch.tensor([-0.1, -4.0, float("nan")], dtype=torch.float64, requires_grad=True)
    advantages, weights = (
        torch.tensor([1.5, 1.5, 1.0], dtype=torch.float64),
        torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64),
    )

    def f(value: float) -> float:
        return math.exp(value) / (math.exp(value) + 0.1)

    loss = shaped_off_policy(logprobs, advantages, weights, 0.1)
    assert loss.tolist() == pytest.approx([-1.5 * f(-0.1), -1.5 * f(-4.0), 0.0])
    loss.sum().backward()
    step = 1e-6
    slope = [-1.5 * (f(v + step) - f(v - step)) / (2 * step) for v in (-0.1, -4.0)]
    assert logprobs.grad is not None and logprobs.grad.tolist() == pytest.approx([*slope, 0.0], rel=1e-6)
    assert abs(slope[1]) / math.exp(-4.0) > 3 * abs(slope[0]) / math.exp(-0.1)  # against the plain ratio p
    with pytest.raises(ValueError, match="gamma"):
        shaped_off_policy(logprobs, advantages, weights, 0.0)


def prompt_only_terms(group: PromptGroup, objective: ObjectiveConfig) -> tuple[float, float, int]:
    """Mean over usable rollouts of the token-mean surrogate and of k3, under the prompt alone."""
    x = group.rollouts[0].prompt_ids
    usable = [k for k, r in enumerate(group.rollouts) if r.status != "failed"]
    rl = kl = 0.0
    for k in usable:
        rollout = group.rollouts[k]
        for t, turn in enumerate(rollout.turns):
            for n in range(turn.start, turn.end):
                context, token = [*x, *rollout.token_ids[:n]], rollout.token_ids[n]
                old, current = fake_logprob(context, token, "old"), fake_logprob(context, token)
                ratio, a = math.exp(current - old), float(group.advantages[k][t])
                clipped = min(max(ratio, 1 - objective.clip_low), 1 + objective.clip_high)
                weight = min(math.exp(old - rollout.sampler_logprobs[n]), 2.0)
                rl -= weight * min(ratio * a, clipped * a) / sum(rollout.loss_mask)
                d = fake_logprob(context, token, "ref") - current
                kl += (math.exp(d) - d - 1) / sum(rollout.loss_mask)
    return rl / len(usable), kl / len(usable), len(usable)


def test_luffy_as_its_public_code_has_it() -> None:
    """No clip, no division by the deviation, every token over one constant length, K + 1 samples a group; written down
    token by token.
    """
    config = load_config(None, ["method=luffy", "objective.group_size=4", "rollout.sampling.max_response_tokens=50"])
    objective, method = config.objective, make_method(config)
    assert (objective.clip, objective.advantage_std, objective.kl_coef, objective.constant_length) == (
        False,
        False,
        0.0,
        50,
    )
    groups = make_groups(objective, method="luffy")
    expected = 0.0
    for group in groups:
        usable = [k for k, r in enumerate(group.rollouts) if r.status != "failed"]
        scores = {k: group.rollouts[k].outcome.score for k in usable}  # type: ignore[union-attr]
        samples = len(usable) + (group.trace is not None)
        mean = (sum(scores.values()) + (group.trace is not None)) / samples
        total = 0.0
        for k in usable:
            rollout = group.rollouts[k]
            for n in np.flatnonzero(rollout.loss_mask):
                context, token = [*rollout.prompt_ids, *rollout.token_ids[:n]], rollout.token_ids[n]
                old, current = fake_logprob(context, token, "old"), fake_logprob(context, token)
                total -= (
                    min(math.exp(old - rollout.sampler_logprobs[n]), 2.0) * math.exp(current - old) * (scores[k] - mean)
                )
        if group.trace is not None:
            total -= sum(math.exp(v) / (math.exp(v) + 0.1) for v in trace_logprobs(group)) * (1.0 - mean)
        expected += total / (50 * samples * len(groups))
    trees = [p.tree for p in built(groups, method, TraceSchedule(clock=StepClock(5)), 1)]
    assert sum(float(method.loss(score(tree), tree.streams)[0]) for tree in trees) == pytest.approx(expected, rel=1e-6)


def test_chord_as_its_public_code_has_it() -> None:
    """(1 - mu) times the token mean of the surrogate plus mu times the token mean of the traces' NLL, each over its own
    tokens of the mini-batch.
    """
    config = load_config(None, ["method=chord", "objective.group_size=4", "method_config.mu_decay_steps=8"])
    objective, method = config.objective, make_method(config)
    groups = make_groups(objective, method="chord")
    rl, rl_tokens, sft, sft_tokens = 0.0, 0, 0.0, 0
    for group in groups:
        for k, rollout in enumerate(group.rollouts):
            if rollout.status == "failed":
                continue
            for t, turn in enumerate(rollout.turns):
                for n in range(turn.start, turn.end):
                    context, token = [*rollout.prompt_ids, *rollout.token_ids[:n]], rollout.token_ids[n]
                    old, current = fake_logprob(context, token, "old"), fake_logprob(context, token)
                    ratio, a = math.exp(current - old), float(group.advantages[k][t])
                    weight = min(math.exp(old - rollout.sampler_logprobs[n]), 2.0)
                    rl -= weight * min(ratio * a, min(max(ratio, 0.8), 1.2) * a)
                    rl_tokens += 1
        if group.trace is not None:
            values = trace_logprobs(group)
            sft, sft_tokens = sft - sum(values), sft_tokens + len(values)
    mu = 0.05 + 0.85 * (1 + math.cos(math.pi * 3 / 8)) / 2
    trees = [p.tree for p in built(groups, method, TraceSchedule(clock=StepClock(5)), 3)]
    total = sum(float(method.loss(score(tree), tree.streams)[0]) for tree in trees)
    assert total == pytest.approx((1 - mu) * rl / rl_tokens + mu * sft / sft_tokens, rel=1e-6)


def trace_logprobs(group: PromptGroup) -> list[float]:
    x = group.rollouts[0].prompt_ids
    return [fake_logprob([*x, *TRACE.token_ids[:n]], TRACE.token_ids[n]) for n in TAUGHT]


@pytest.mark.parametrize("step", [0, 3, 20])
@pytest.mark.parametrize("method", ["chord", "chord_phi", "luffy"])
def test_the_summed_loss_is_the_papers(method: str, step: int) -> None:
    objective = ObjectiveConfig(group_size=4, kl_coef=0.01, anchor_prob=0.7)
    own = {} if method == "luffy" else {"mu_start": 0.9, "mu_end": 0.1, "mu_decay_steps": 8}
    named = method_named(method, objective, **own)
    groups = make_groups(objective, method=method)
    assert [g.anchored for g in groups] == [
        False,
        False,
        False,
        True,
    ], "the gate is PACT's; only a missing trace is left out"
    expected = 0.0
    for group in groups:
        rl, kl, usable = prompt_only_terms(group, objective)
        values = trace_logprobs(group) if group.trace is not None else []
        mu = chord_mu(step, 0.9, 0.1, 8)
        if method == "luffy":
            if group.trace is not None:
                outcomes = [r.outcome.score for r in group.rollouts if r.outcome is not None] + [1.0]
                advantage = (1.0 - np.mean(outcomes)) / (np.std(outcomes, ddof=1) + 1e-6)
                assert group.trace_advantage == pytest.approx(advantage)
                shaped = -advantage * sum(math.exp(v) / (math.exp(v) + 0.1) for v in values) / len(values)
                rl = (usable * rl + shaped) / (usable + 1)
        else:
            phi = [math.exp(v) * (1 - math.exp(v)) if method == "chord_phi" else 1.0 for v in values]
            sft = -sum(p * v for p, v in zip(phi, values, strict=True)) / len(values) if values else 0.0
            rl = (1 - mu) * rl + mu * sft
        expected += (rl + objective.kl_coef * kl) / len(groups)
    total = sum(
        float(named.loss(score(p.tree), p.tree.streams)[0])
        for p in built(groups, named, TraceSchedule(clock=StepClock(5)), step)
    )
    assert total == pytest.approx(expected, rel=1e-6)
