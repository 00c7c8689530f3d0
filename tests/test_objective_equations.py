"""The whole objective, eq. 4-14 and 24-32, written once more as naive loops from the paper and compared with the parts
put together.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from pact_nemo.objective.advantages import group_advantages
from pact_nemo.objective.components import CALL, REASONING
from pact_nemo.objective.latent import TokenSum, log_likelihood, privilege_gap, trace_log_likelihood
from pact_nemo.objective.loss import STREAMS, batch_loss
from pact_nemo.objective.schedules import StepClock, TraceSchedule
from pact_nemo.objective.surrogate import Clip
from pact_nemo.objective.weights import rl_weights, sft_weights

K, BETA, KL, EPSILON, GAMMA, HORIZON = 4, 0.1, 0.05, 0.2, 0.9, 10


@dataclass
class Rollout:
    """Log-probs per token as [x, h] pairs: current, old; under x only: reference. ``turn`` says which turn a token
    belongs to.
    """

    turn: list[int]
    rewards: list[float]
    current: dict[str, list[float]]
    old: dict[str, list[float]]
    reference: list[float]
    importance: list[float]
    failed: bool


@dataclass
class Prompt:
    rollouts: list[Rollout]
    gate: bool
    component: list[int]
    level: list[int]
    trace_turn: list[int]
    trace: list[float]


def make_batch(seed: int) -> list[Prompt]:
    r = random.Random(seed)
    batch = []
    for i in range(4):
        rollouts = []
        for k in range(K):
            turns = r.randint(1, 3)
            turn = [t for t in range(turns) for _ in range(r.randint(1, 4))]
            current = {c: [-3 * r.random() for _ in turn] for c in "xh"}
            old = {c: [v + r.gauss(0, 0.3) for v in current[c]] for c in "xh"}
            failed = (
                k == 0 and i == 1
            ) or i == 3  # one failed rollout in prompt 1; prompt 3 is dead and still counts in |B|
            rewards = [r.random() for _ in range(turns)]
            reference, importance = [-3 * r.random() for _ in turn], [2 * r.random() for _ in turn]
            rollouts.append(Rollout(turn, rewards, current, old, reference, importance, failed))
        n = 12 if i != 2 else 3
        component = [r.choice([0, 1, CALL, REASONING]) for _ in range(n)] if i != 2 else [0, 1, 0]  # prompt 2: Z = 0
        level = [r.randint(-1, 4) if c == REASONING else -1 for c in component]
        batch.append(Prompt(rollouts, i == 0, component, level, [0] * n, [-2 * r.random() for _ in range(n)]))
    return batch


def paper(batch: list[Prompt], step: int, aggregation: str) -> float:
    """Eq. 14 plus the KL term, one line of the paper after the other."""
    loss = 0.0
    all_tokens = sum(len(rollout.turn) for prompt in batch for rollout in prompt.rollouts if not rollout.failed)
    for prompt in batch:
        alive = [rollout for rollout in prompt.rollouts if not rollout.failed]

        def score(values: list[float], value: float) -> float:
            if len(values) < 2:
                return 0.0
            mean = sum(values) / len(values)
            return (value - mean) / (math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) + 1e-6)

        def to_go(rollout: Rollout, t: int) -> float:
            return sum(GAMMA ** (u - t) * rollout.rewards[u] for u in range(t, len(rollout.rewards)))

        rl, kl = 0.0, 0.0
        for rollout in alive:
            per_token_rl, per_token_kl = [], []
            context = "x" if prompt.gate else "h"
            for n, t in enumerate(rollout.turn):
                advantage = score([sum(other.rewards) for other in alive], sum(rollout.rewards))
                advantage += score([to_go(other, t) for other in alive if len(other.rewards) > t], to_go(rollout, t))
                ratio = math.exp(rollout.current[context][n] - rollout.old[context][n])
                clipped = min(max(ratio, 1 - EPSILON), 1 + EPSILON)
                per_token_rl.append(-rollout.importance[n] * min(ratio * advantage, clipped * advantage))
                d = rollout.reference[n] - rollout.current["x"][n]
                per_token_kl.append(math.exp(d) - d - 1)
            if aggregation == "rollout-mean":
                rl += sum(per_token_rl) / len(per_token_rl) / len(alive) / len(batch)
                kl += sum(per_token_kl) / len(per_token_kl) / len(alive) / len(batch)
            elif aggregation == "token-mean":
                rl += sum(per_token_rl) / all_tokens
                kl += sum(per_token_kl) / all_tokens
            else:
                rl += sum(per_token_rl) / 16 / len(alive) / len(batch)
                kl += sum(per_token_kl) / 16 / len(alive) / len(batch)
        sft, z = 0.0, 0.0
        for component, level, logprob in zip(prompt.component, prompt.level, prompt.trace, strict=True):
            active = 0 <= level <= 4 - math.floor(5 * step / HORIZON)
            m = (0.8 - 0.6 * step / HORIZON) if component == CALL else 1.0 if component == REASONING and active else 0.0
            sft -= m * logprob
            z += m
        sft = sft / z if z else 0.0
        loss += rl + (0.0 if prompt.gate else BETA * sft / len(batch)) + KL * kl
    return loss


def ours(batch: list[Prompt], step: int, aggregation: str) -> float:
    usable = [[not rollout.failed for rollout in prompt.rollouts] for prompt in batch]
    counts = [[len(rollout.turn) for rollout in prompt.rollouts] for prompt in batch]
    rl = rl_weights(counts, usable, num_prompts=len(batch), aggregation=aggregation, constant_length=16)
    schedule = TraceSchedule(clock=StepClock(HORIZON))
    masks = [schedule.weights(np.array(p.component), np.array(p.level), np.array(p.trace_turn), step) for p in batch]
    sft = sft_weights(masks, [p.gate for p in batch], num_prompts=len(batch), beta=BETA)
    columns: dict[str, list[float]] = {name: [] for name in (*STREAMS, "old_logprobs", "logprobs")}

    def token(**values: float) -> None:
        for name, column in columns.items():
            column.append(values.get(name, 1.0 if name == "importance" else 0.0))

    for i, prompt in enumerate(batch):
        advantages = group_advantages(
            [np.array(r.rewards) for r in prompt.rollouts], gamma=GAMMA, mask=usable[i]
        ).combined
        for k, rollout in enumerate(prompt.rollouts):
            for n, t in enumerate(rollout.turn):
                shared: dict[str, Any] = {"advantages": advantages[k][t], "importance": rollout.importance[n]}
                for context in "xh":
                    values = {"logprobs": rollout.current[context][n], "old_logprobs": rollout.old[context][n]}
                    if prompt.gate == (context == "x"):
                        values[f"w_rl_{context}"] = rl[i][k]
                    if context == "x":
                        values |= {"w_kl": KL * rl[i][k], "ref_logprobs": rollout.reference[n]}
                    token(**shared, **values)
        for n, component in enumerate(prompt.component):
            token(
                logprobs=prompt.trace[n], **{"w_sft_call" if component == CALL else "w_sft_reasoning": float(sft[i][n])}
            )
    streams = {name: torch.tensor(column, dtype=torch.float64) for name, column in columns.items()}
    logprobs = streams.pop("logprobs")
    return batch_loss(logprobs, streams, surrogate=Clip(EPSILON, EPSILON))[0].item()


@pytest.mark.parametrize("aggregation", ["rollout-mean", "token-mean", "constant-length"])
@pytest.mark.parametrize(("seed", "step"), [(0, 0), (1, 3), (2, 6), (3, 9)])
def test_the_parts_put_together_are_equation_14(seed: int, step: int, aggregation: str) -> None:
    batch = make_batch(seed)
    assert ours(batch, step, aggregation) == pytest.approx(paper(batch, step, aggregation), rel=1e-12)


def test_latent_sums_by_hand() -> None:
    logprobs, component = np.array([-1.0, -2.0, -4.0, -8.0, -16.0]), np.array([0, REASONING, CALL, 1, REASONING])
    found = trace_log_likelihood(logprobs, component)
    assert found == {"reasoning": TokenSum(-18.0, 2), "call": TokenSum(-4.0, 1)} and found["reasoning"].mean == -9.0
    with pytest.raises(ValueError, match="shape"):
        trace_log_likelihood(logprobs, component[:2])


def test_privilege_gap_is_per_token_over_all_tokens_of_a_set_and_adds_up() -> None:
    under_h = [log_likelihood(np.array(v)) for v in ([-1.0, -1.0], [-1.0], [-5.0, -1.0])]
    under_x = [log_likelihood(np.array(v)) for v in ([-2.0, -4.0], [-3.0], [-1.0, -1.0])]
    gap = privilege_gap(under_h, under_x, [True, True, False])
    assert gap["success"] == TokenSum(6.0, 3) and gap["success"].mean == 2.0 and gap["failure"].mean == -2.0
    first, rest = (
        privilege_gap(under_h[:1], under_x[:1], [True]),
        privilege_gap(under_h[1:], under_x[1:], [True, False]),
    )
    assert {key: first[key] + rest[key] for key in gap} == gap and first["failure"].mean is None
    with pytest.raises(ValueError, match="tokens under c_h"):
        privilege_gap(under_h[:1], under_x[1:2], [True])


def test_long_runs_of_float32_log_probs_are_summed_in_float64() -> None:
    values = np.full(1_000_000, -0.1, dtype=np.float32)
    assert log_likelihood(values).total == pytest.approx(float(np.float32(-0.1)) * 1_000_000, rel=1e-9)
