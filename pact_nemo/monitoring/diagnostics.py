"""What a step reports, all of it from parts that the step computed anyway. Every key says its denominator in
``docs/reference/metrics.md``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pact_nemo.batches.prompt_groups import PromptGroup, has_policy_tokens, rollouts_of, usable
from pact_nemo.batches.prompt_trees import PROMPT_ONLY, TRACE, TRACE_CONDITIONED, PromptTree
from pact_nemo.batches.streams import sampler_logprobs
from pact_nemo.objective.latent import TokenSum, log_likelihood, privilege_gap, trace_log_likelihood
from pact_nemo.objective.schedules import TraceSchedule
from pact_nemo.policy.update_result import UpdateResult
from pact_nemo.rollouts.types import LIMITS


def _mean(values: list[float] | np.ndarray) -> float | None:
    return float(np.mean(values)) if len(values) else None


def latent(prompts: list[PromptTree], logprobs: list[torch.Tensor]) -> dict[str, float | None]:
    """Section 5, from the log-probs of the update's own forward: privilege gap and trace log-likelihood, nats per
    token; ``latent/gap`` is over the tokens of all rollouts.
    """
    conditioned, prompt_only, success = [], [], []
    trace = {"reasoning": TokenSum(), "call": TokenSum()}
    for prompt, values in zip(prompts, logprobs, strict=True):
        for k, rollout in enumerate(prompt.group.rollouts):
            if (PROMPT_ONLY, k) in prompt.spans and (TRACE_CONDITIONED, k) in prompt.spans:
                conditioned.append(log_likelihood(values[slice(*prompt.spans[(TRACE_CONDITIONED, k)])].numpy()))
                prompt_only.append(log_likelihood(values[slice(*prompt.spans[(PROMPT_ONLY, k)])].numpy()))
                success.append(rollout.outcome is not None and rollout.outcome.success)
        if (TRACE, 0) in prompt.spans and prompt.group.trace is not None:
            component = np.asarray(prompt.group.trace.component)[prompt.sft_index]
            found = trace_log_likelihood(values[slice(*prompt.spans[(TRACE, 0)])].numpy(), component)
            trace = {name: trace[name] + found[name] for name in trace}
    gap = privilege_gap(conditioned, prompt_only, success)
    named = {"gap": sum(gap.values(), TokenSum())}
    named |= {f"gap_{name}": value for name, value in gap.items()}
    named |= {f"trace_{name}": value for name, value in trace.items()}
    return {f"latent/{name}": value.mean for name, value in named.items()}


def mismatch(prompts: list[PromptTree], scored: list[torch.Tensor]) -> dict[str, float | None]:
    """Sampler against trainer log-probs of the same tokens under x: mean and max of |difference| in nats per token,
    mean IS weight.
    """
    differences = []
    for prompt, values in zip(prompts, scored, strict=True):
        for k, rollout in enumerate(prompt.group.rollouts):
            if (PROMPT_ONLY, k) in prompt.spans:
                trainer = values[slice(*prompt.spans[(PROMPT_ONLY, k)])].double().numpy()
                differences.append(trainer - sampler_logprobs(rollout))
    if not differences:
        return {"mismatch/mean_abs": None, "mismatch/max_abs": None, "mismatch/weight_mean": None}
    joined = np.concatenate(differences)
    return {
        "mismatch/mean_abs": float(np.abs(joined).mean()),
        "mismatch/max_abs": float(np.abs(joined).max()),
        "mismatch/weight_mean": float(np.exp(joined).mean()),
    }


def mean_entropy(prompts: list[PromptTree], entropies: list[torch.Tensor]) -> float | None:
    """Entropy of the distributions that the policy-written tokens were drawn from, under x: nats, mean over those
    tokens; None over none.
    """
    found = [
        values[slice(*prompt.spans[key])].double()
        for prompt, values in zip(prompts, entropies, strict=True)
        for key in prompt.spans
        if key[0] == PROMPT_ONLY
    ]
    joined = torch.cat(found) if found else torch.empty(0)
    return float(joined.mean()) if len(joined) else None


def rollout_record(groups: list[PromptGroup]) -> dict[str, Any]:
    """Reward (sum over turns, mean over rollouts), success share, counts. Failed rollouts are counted and left out of
    the means.
    """
    rollouts = rollouts_of(groups)
    rewards = [
        float(reward.sum())
        for g in groups
        for r, reward in zip(g.rollouts, g.rewards, strict=True)
        if r.status != "failed"
    ]
    valid = [r for r in rollouts if r.status != "failed"]
    policy_tokens = sum(sum(r.loss_mask) for r in rollouts)
    flat = [g for g in groups if has_policy_tokens(g) and all(np.all(a == 0) for a in g.advantages)]
    return {
        "reward/mean": _mean(rewards),
        "reward/success": _mean([float(r.outcome is not None and r.outcome.success) for r in valid]),
        "gate/anchored": _mean([float(g.anchored) for g in groups]),
        "gate/no_trace": sum(g.trace is None for g in groups),
        "groups/zero_advantage": len(flat),
        "rollout/count": len(rollouts),
        "rollout/mean_turns": _mean([len(r.turns) for r in valid]),
        "rollout/truncated": sum(r.status == "truncated" for r in rollouts),
        **{f"rollout/truncated_{limit}": sum(r.limit == limit for r in rollouts) for limit in LIMITS},
        "rollout/failed": sum(r.status == "failed" for r in rollouts),
        "rollout/malformed_calls": sum(len(t.call_errors) for r in valid for t in r.turns),
        "tokens/policy": policy_tokens,
    }


def data_record(dropped: dict[str, int], groups: list[PromptGroup]) -> dict[str, int]:
    """What of its data the run does without (counts of the whole run, fixed from its start), and how many of the step's
    traces are cut.
    """
    return {
        "data/rows_quarantined": dropped.get("rows_quarantined", 0),
        "data/prompts_too_long": dropped.get("prompt_too_long", 0),
        "data/traces_too_long": dropped.get("trace_too_long", 0),
        "data/traces_cut": sum(group.trace is not None and group.trace.cut for group in groups),
    }


def anneal_record(schedule: TraceSchedule, step: int) -> dict[str, Any]:
    """How far annealing is in a step (counted from 0) that its clock has not observed yet: what the step used."""
    progress = {"anneal/progress": schedule.clock.progress(step)} if schedule.clock.adapts else {}
    return {"anneal/call_weight": schedule.call_weight(step), "anneal/prefix_level": schedule.level(step), **progress}


def update_record(prompts: list[PromptTree], old: list[torch.Tensor], results: list[UpdateResult]) -> dict[str, Any]:
    """What a step's updates say.

    Args:
        prompts: of all updates, in order.
        old: [S] log-probs of each under pi_old.
    """
    record: dict[str, Any] = latent(prompts, [values for result in results for values in result.logprobs])
    record.update(mismatch(prompts, old))
    record["policy/entropy"] = mean_entropy(prompts, [values for result in results for values in result.entropies])
    record.update(loss_record(results))
    return record


def not_conditioned(groups: list[PromptGroup], prompts: list[PromptTree]) -> int:
    """Usable rollouts of un-anchored prompts that were not computed under the trace.

    Args:
        groups: of the step.
        prompts: of all its updates; a group with nothing to compute has none.
    """
    able = sum(usable(rollout) for group in groups if not group.anchored for rollout in group.rollouts)
    return able - sum(context == TRACE_CONDITIONED for prompt in prompts for context, _ in prompt.spans)


def loss_record(results: list[UpdateResult]) -> dict[str, Any]:
    """Means over the step's updates of each loss term; clip fractions are clipped tokens / surrogate tokens over all
    updates.
    """
    if not results:
        return {}
    record: dict[str, Any] = {}
    sums: dict[str, float] = {}
    for result in results:
        for key, value in result.metrics.items():
            sums[key] = max(sums.get(key, value), value) if key.startswith("max/") else sums.get(key, 0.0) + value
    record["loss/total"] = sum(r.loss for r in results) / len(results)
    for key, value in sums.items():
        if key.startswith("loss/"):
            record[key] = value / len(results)
        elif key.startswith("max/"):
            record[key] = value
    for name, top, bottom in (
        ("policy/clip_fraction_x", "clip/x", "tokens/x"),
        ("policy/clip_fraction_h", "clip/h", "tokens/h"),
        ("policy/kl_ref", "kl/sum", "kl/count"),
        ("policy/approx_kl_x", "approx_kl/x", "tokens/x"),
        ("policy/approx_kl_h", "approx_kl/h", "tokens/h"),
    ):
        if sums.get(bottom):
            record[name] = sums[top] / sums[bottom]
    record["policy/grad_norm"] = sum(r.grad_norm for r in results) / len(results)
    moved = [r.moved for r in results if r.moved is not None]
    if moved:
        record["policy/moved"] = sum(moved) / len(moved)
    record["policy/lr"] = results[-1].lr
    record["policy/updates"] = len(results)
    record["tokens/trained"] = sum(r.tokens for r in results)
    return record
