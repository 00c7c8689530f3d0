"""From a step's groups to new weights: score, fill the streams, update once per mini-batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pact_nemo.batches.mini_batches import MiniBatch, mini_batches
from pact_nemo.batches.prompt_groups import PromptGroup, has_policy_tokens, rollouts_of
from pact_nemo.batches.prompt_trees import PROMPT_ONLY, PromptTree, carried_over, grow_tree, tempered
from pact_nemo.batches.streams import Scores, with_streams
from pact_nemo.errors import NumericsError
from pact_nemo.monitoring import diagnostics, gradient_signal, numerics
from pact_nemo.policy.trees import TokenTree
from pact_nemo.policy.update_result import UpdateResult
from pact_nemo.runtime.collective import on_rank_zero
from pact_nemo.training.run import TrainingRun
from pact_nemo.training.stopwatch import Stopwatch

Score = Callable[[list[TokenTree]], list[torch.Tensor]]


def update(run: TrainingRun, groups: list[PromptGroup], watch: Stopwatch) -> dict[str, Any]:
    """Score pi_old and the reference, fill the weight streams with global denominators, update once per mini-batch.

    The first update is on-policy: its loss takes its own detached log-probs as pi_old, which they are by definition, so
    nothing is scored for it but what the sampler correction needs, pi_old(tau | x).

    Returns:
        the step's record.

    Raises:
        NumericsError: a number is not finite; the weights are those of before. Names the samples behind it.
    """
    parts = cut(run, groups)
    with watch("score"):
        scores = scored(run, parts)
    signal: dict[str, float | None] = {}
    every, seed, step = run.config.diagnostics.gradient_every, run.config.run.seed, run.state.step
    if parts and every and step % every == 0:
        with watch("diagnostics"):
            prompts = filled(run, parts[0], scores[0])
            signal = gradient_signal.measure(run.policy, prompts, run.method, seed=seed, step=step)
    results: list[UpdateResult] = []
    with watch("update"):
        for part, known in zip(parts, scores, strict=True):
            members = filled(run, part, known)
            try:
                results.append(run.policy.update([p.tree for p in members], run.method.loss, entropy=True))
            except NumericsError as error:
                raise refused_update(run, error, members, part.number) from error
    # under pi_old: what was scored, or what the on-policy update computed itself
    old = [
        values
        for result, known in zip(results, scores, strict=True)
        for values in (result.logprobs if known.on_policy else known.old) or ()
    ]
    prompts = [prompt for part in parts for prompt in part.members]
    record = diagnostics.rollout_record(groups)
    if run.config.trainer.replay is None:
        versions = [rollout.weight_version for rollout in rollouts_of(groups)]
        record["rollout/lag"] = run.state.version - min(versions)
    record |= diagnostics.update_record(prompts, old, results)
    record["rollout/not_conditioned"] = diagnostics.not_conditioned(groups, prompts) if run.method.trace_rl else 0
    return record | signal | (diagnostics.anneal_record(run.schedule, step) if run.method.anneals else {})


def cut(run: TrainingRun, groups: list[PromptGroup]) -> list[MiniBatch]:
    """The step's updates, as the settings say what of them is computed."""
    config = run.config
    adaptive = run.state.clock.adapts  # goes by every prompt's privilege gap
    return mini_batches(
        groups,
        run.boundary_ids,
        run.method,
        size=config.trainer.mini_batch_size,
        diagnostics=config.trainer.both_contexts or config.rollout.importance == "tis" or adaptive,
        skip_zero_advantage=config.trainer.skip_zero_advantage and not adaptive,
        temperature=config.rollout.sampling.temperature,
    )


def scored(run: TrainingRun, parts: list[MiniBatch]) -> list[Scores]:
    """pi_old and the reference of each update's prompts; mini-batch by mini-batch: packed as in the update, and in its
    precision.
    """
    config, policy = run.config, run.policy
    correct_sampler = config.rollout.importance == "tis"
    cap = config.rollout.importance_cap if correct_sampler else None
    first = 0 if config.trainer.score_first_update else 1  # updates whose own log-probs are pi_old's
    old: list[list[torch.Tensor] | None] = [None] * min(first, len(parts))
    old += [policy.logprobs([p.tree for p in part.members]) for part in parts[first:]]
    if correct_sampler and first and parts:
        old[0] = under_prompt(run, parts[0].members, policy.logprobs)
    reference: list[torch.Tensor] | None = None
    if config.objective.kl_coef > 0:
        reference = under_prompt(run, [p for part in parts for p in part.members], policy.reference_logprobs)
    found, start = [], 0
    for part, values in zip(parts, old, strict=True):
        own = reference[start : start + len(part.members)] if reference is not None else None
        start += len(part.members)
        found.append(Scores(values, own, cap, on_policy=part.number < first))
    return found


def under_prompt(run: TrainingRun, prompts: list[PromptTree], score: Score) -> list[torch.Tensor]:
    """What ``score`` says of the rollouts under x alone, laid out as the full trees (0 elsewhere)."""
    chosen = [i for i, p in enumerate(prompts) if has_policy_tokens(p.group)]
    bare = [grow_tree(prompts[i].group, run.boundary_ids, run.method, contexts=(PROMPT_ONLY,)) for i in chosen]
    bare = tempered(bare, run.method, run.config.rollout.sampling.temperature)
    values = dict(zip(chosen, zip(bare, score([p.tree for p in bare]), strict=True), strict=True)) if bare else {}
    return [
        carried_over(values[i][0], p, values[i][1]) if i in values else torch.zeros(p.tree.num_scored)
        for i, p in enumerate(prompts)
    ]


def filled(run: TrainingRun, part: MiniBatch, scores: Scores) -> list[PromptTree]:
    """The prompts of an update with their streams."""
    try:
        return with_streams(part.members, run.method, run.schedule, run.state.step, scores, others=part.others)
    except FloatingPointError as error:  # the same on every rank: what was scored is
        broken = NumericsError(str(error), names=["importance"], logprobs=scores.old)
        raise refused_update(run, broken, part.members, part.number) from error


def refused_update(run: TrainingRun, error: NumericsError, members: list[PromptTree], number: int) -> NumericsError:
    """Name the samples behind a refused update and dump its mini-batch."""
    step, found = run.state.step, numerics.suspects(members, error.logprobs)
    path = run.workspace.numerics / f"step_{step:06d}_update_{number}.json"
    on_rank_zero(lambda: numerics.dump(path, error, members, found))
    what = numerics.suspects_in_words(found)
    return NumericsError(f"step {step + 1}: {error}; {what}. The mini-batch is in {path}", names=error.names)
