"""Per-token streams of a mini-batch: advantages, importance weights and the weight of each token in each term.

All denominators are counted here, over the whole mini-batch, before any forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from pact_nemo.batches.prompt_groups import PromptGroup, usable
from pact_nemo.batches.prompt_trees import PROMPT_ONLY, TRACE, PromptTree
from pact_nemo.methods.base import Coefficients, Method
from pact_nemo.objective.loss import STREAMS
from pact_nemo.objective.schedules import TraceSchedule
from pact_nemo.objective.surrogate import truncated_importance
from pact_nemo.objective.weights import rl_weights, sft_weights
from pact_nemo.rollouts.types import Rollout


@dataclass(frozen=True)
class Scores:
    """What was scored before a mini-batch's update, a [S] tensor per tree in both contexts.

    Attributes:
        old: log-probs of pi_old in nats; None on a single on-policy update.
        reference: log-probs of the frozen reference; only the prompt-only part is read. None: no KL term.
        importance_cap: truncation of the sampler-trainer importance weight; None switches the correction off. Needs
            ``old``.
        on_policy: pi_old is the policy that is updated: the loss takes its own detached log-probs as old ones, which
            they are, and ``old`` is for the correction only.
    """

    old: list[torch.Tensor] | None = None
    reference: list[torch.Tensor] | None = None
    importance_cap: float | None = None
    on_policy: bool = False


@dataclass(frozen=True)
class _Weights:
    """Of each token of a mini-batch's rollouts and traces, by prompt.

    Attributes:
        rl: per rollout, a policy token's weight in the KL and entropy terms, coefficient not included.
        surrogate: the same in the surrogates; where the trace is a sample of its group, its own comes last.
        sft: [H] of the trace's tokens, coefficient included.
        coefficients: of the surrogates and of the SFT term.
    """

    rl: list[list[float]]
    surrogate: list[list[float]]
    sft: list[np.ndarray]
    coefficients: Coefficients


def with_streams(
    prompts: list[PromptTree],
    method: Method,
    schedule: TraceSchedule,
    step: int,
    scores: Scores,
    *,
    others: Sequence[PromptGroup] = (),
) -> list[PromptTree]:
    """The prompts of one mini-batch, each with its streams.

    Args:
        prompts: those of the mini-batch with a token to score.
        others: the mini-batch's other groups. Every denominator counts them.
    """
    weights = _weights(prompts, others, method, schedule, step)
    found = []
    for index, prompt in enumerate(prompts):
        streams = _streams(index, prompt, method, weights, scores)
        tensors = {name: torch.from_numpy(value).float() for name, value in streams.items()}
        if scores.old is not None and not scores.on_policy:
            tensors["old_logprobs"] = scores.old[index].float()
        found.append(replace(prompt, tree=replace(prompt.tree, streams=tensors)))
    return found


def _weights(
    prompts: list[PromptTree], others: Sequence[PromptGroup], method: Method, schedule: TraceSchedule, step: int
) -> _Weights:
    """Of ``prompts`` and, behind them, of ``others``."""
    objective = method.objective
    groups = [*(p.group for p in prompts), *others]
    num_prompts = len(groups)
    lengths = [[sum(r.loss_mask) for r in group.rollouts] for group in groups]
    counts = [[usable(r) for r in group.rollouts] for group in groups]
    weigh = partial(
        rl_weights,
        num_prompts=num_prompts,
        aggregation=objective.aggregation,
        constant_length=objective.constant_length,
    )
    masks = [
        method.trace_mask(p.group.trace, schedule, step)
        if (TRACE, 0) in p.spans and p.group.trace is not None
        else np.zeros(0)
        for p in prompts
    ] + [np.zeros(0)] * len(others)  # no token of theirs is taught
    rl = surrogate = weigh(lengths, counts)
    if method.trace_is_sample:  # the trace is one of K + 1 samples of its group, for surrogate and denominators
        surrogate = weigh(
            [[*row, int(mask.sum())] for row, mask in zip(lengths, masks, strict=True)],
            [[*row, not group.anchored] for row, group in zip(counts, groups, strict=True)],
        )
    coefficients = method.coefficients(step)
    sft = sft_weights(
        masks,
        [group.anchored for group in groups],
        num_prompts=num_prompts,
        beta=coefficients.sft,
        aggregation=objective.sft_aggregation,
    )
    return _Weights(rl, surrogate, sft, coefficients)


def _streams(
    index: int, prompt: PromptTree, method: Method, weights: _Weights, scores: Scores
) -> dict[str, np.ndarray]:
    """name -> [S] of one prompt."""
    names = (*STREAMS, *(term.stream for term in method.terms))
    if method.objective.entropy_coef > 0:
        names = (*names, "w_entropy")
    streams = {name: np.zeros(prompt.tree.num_scored) for name in names}
    streams["importance"][:] = 1.0
    for (context, k), (start, end) in prompt.spans.items():
        here = slice(start, end)
        if context == TRACE:
            _fill_trace(streams, here, index, prompt, method, weights)
        else:
            _fill_rollout(streams, here, (index, k, context), prompt, method, weights, scores)
    return streams


def _fill_trace(
    streams: dict[str, np.ndarray], here: slice, index: int, prompt: PromptTree, method: Method, weights: _Weights
) -> None:
    group = prompt.group
    assert group.trace is not None
    own = method.trace_streams(
        np.asarray(group.trace.component)[prompt.sft_index],
        group.trace_weight * weights.sft[index][prompt.sft_index],
        sample_weight=group.trace_weight * weights.surrogate[index][-1] if method.trace_is_sample else 0.0,
        advantage=group.trace_advantage,
    )
    for name, values in own.items():
        streams[name][here] = values


def _fill_rollout(
    streams: dict[str, np.ndarray],
    here: slice,
    at: tuple[int, int, str],
    prompt: PromptTree,
    method: Method,
    weights: _Weights,
    scores: Scores,
) -> None:
    """``at``: the prompt's index, the rollout's, and the context."""
    index, k, context = at
    group, objective = prompt.group, method.objective
    rollout, weight = group.rollouts[k], weights.rl[index][k]
    streams["advantages"][here] = _token_advantages(rollout, group.advantages[k])
    if (context == PROMPT_ONLY) == (group.anchored or not method.trace_rl):
        stream = "w_rl_x" if context == PROMPT_ONLY else "w_rl_h"
        streams[stream][here] = weights.coefficients.rl * weights.surrogate[index][k]
    if context == PROMPT_ONLY and objective.entropy_coef > 0:
        streams["w_entropy"][here] = objective.entropy_coef * np.asarray(weight)
    if context == PROMPT_ONLY and scores.reference is not None:
        streams["w_kl"][here] = objective.kl_coef * np.asarray(weight)
        streams["ref_logprobs"][here] = scores.reference[index][here].double().numpy()
    if scores.importance_cap is not None and scores.old is not None and (PROMPT_ONLY, k) in prompt.spans:
        old = scores.old[index][slice(*prompt.spans[(PROMPT_ONLY, k)])].double()
        sampled = torch.from_numpy(sampler_logprobs(rollout))
        streams["importance"][here] = truncated_importance(old, sampled, scores.importance_cap).numpy()


def _token_advantages(rollout: Rollout, advantages: np.ndarray) -> np.ndarray:
    """[n] advantage of each policy-written token of the rollout, in order (turn t's value on all of turn t's
    tokens).
    """
    per_token = np.zeros(len(rollout.token_ids))
    for turn, value in zip(rollout.turns, advantages, strict=True):
        per_token[turn.start : turn.end] = value
    return per_token[np.asarray(rollout.loss_mask, dtype=bool)]


def sampler_logprobs(rollout: Rollout) -> np.ndarray:
    """[n] rollout-engine log-probs of the policy-written tokens."""
    return np.asarray(rollout.sampler_logprobs)[np.asarray(rollout.loss_mask, dtype=bool)]
