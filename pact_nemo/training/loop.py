"""Algorithm 1 of the paper: rollouts from the prompt alone, advantages, gate, the two contexts, one update, refit."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from pact_nemo.objective.adaptive import AdaptiveSchedule
from pact_nemo.objective.loss import pact_loss
from pact_nemo.objective.trace_quality import TraceQuality, beats
from pact_nemo.policy.policy import UpdateResult
from pact_nemo.rollouts.store import read_rollouts
from pact_nemo.rollouts.types import Rollout
from pact_nemo.training import diagnostics
from pact_nemo.training.batch import (
    PROMPT_ONLY,
    PromptGroup,
    PromptTree,
    contexts_needed,
    fill_streams,
    form_group,
    grow_tree,
)
from pact_nemo.training.data import prompts_of_step
from pact_nemo.training.distributed import on_rank_zero
from pact_nemo.training.experiment import Experiment
from pact_nemo.training.progress import RunProgress
from pact_nemo.training.records import dump_step


class Stopwatch:
    """Seconds by phase of one step, ``times["time/<phase>"]``; the phase is also what the terminal shows meanwhile."""

    def __init__(self, progress: RunProgress) -> None:
        self.times: dict[str, float] = {}
        self._progress = progress
        self._start = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            with self._progress.phase(phase, brief=True):
                yield
        finally:
            key = f"time/{phase}"
            self.times[key] = self.times.get(key, 0.0) + time.perf_counter() - start

    def total(self) -> float:
        return time.perf_counter() - self._start


def train(experiment: Experiment) -> None:
    """Run every step from where the experiment stands to ``trainer.steps``."""
    config = experiment.config
    while experiment.step < config.trainer.steps:
        watch = Stopwatch(experiment.progress)
        with watch("rollout"):
            groups = collect(experiment)
        record = optimise(experiment, groups, watch)
        if isinstance(experiment.schedule, AdaptiveSchedule):
            experiment.schedule.progress.observe(record["reward/success"], mean_gap(record))
            record["anneal/progress"] = experiment.schedule.progress.value
        if experiment.quality is not None:
            observe_traces(experiment.quality, groups, experiment.dataset.trace_results)
            record["trace/weight"] = sum(group.trace_weight for group in groups) / len(groups)
        experiment.step += 1
        with watch("refit"):
            experiment.refit()
        with watch("checkpoint"):
            experiment.checkpoint_if_due()
        record.update(watch.times)
        record["time/total"] = watch.total()
        experiment.log_step("rl", record)


def collect(experiment: Experiment) -> list[PromptGroup]:
    """K prompt-only rollouts per prompt, then rewards, advantages and the gate. Traces join here, after generation has ended."""
    config = experiment.config
    tasks = prompts_of_step(experiment.dataset.train, experiment.step, config.trainer.batch_size, config.run.seed)
    k = config.objective.group_size
    objective = replace(config.objective, anchor_prob=experiment.anchor_prob)

    def sample() -> list[Rollout]:
        if config.trainer.replay is not None:
            return read_rollouts(experiment.replay_file(experiment.step))
        return experiment.generator.rollouts(tasks, k, step=experiment.step, version=experiment.version)

    rollouts = on_rank_zero(sample)
    groups = [
        form_group(
            task,
            rollouts[i * k : (i + 1) * k],
            experiment.dataset.trace_for(task.id, config.run.seed, experiment.step),
            objective,
            seed=config.run.seed,
            step=experiment.step,
            trace_weight=experiment.quality.weight(task.id) if experiment.quality is not None else 1.0,
        )
        for i, task in enumerate(tasks)
    ]
    if config.trainer.dump_rollouts:
        on_rank_zero(lambda: dump_step(experiment.workspace.step_rollouts(experiment.step), groups))
    return groups


def optimise(experiment: Experiment, groups: list[PromptGroup], watch: Stopwatch) -> dict[str, Any]:
    """Score pi_old and the reference, fill the weight streams with global denominators, update once per mini-batch."""
    config, policy = experiment.config, experiment.policy
    objective = config.objective
    several_updates = config.trainer.mini_batch_size < config.trainer.batch_size
    correct_sampler = config.rollout.importance == "tis"
    prompts = [
        grow_tree(group, experiment.boundary_ids, objective, contexts=contexts_needed(group, objective, diagnostics=True))
        for group in groups
        if diagnostics.has_policy_tokens(group)
    ]
    prompt_only = [grow_tree(p.group, experiment.boundary_ids, objective, contexts=(PROMPT_ONLY,)) for p in prompts]

    with watch("score"):
        old: list[torch.Tensor] | None = None
        if several_updates:
            old = policy.logprobs([p.tree for p in prompts])
        elif correct_sampler:
            # One on-policy update: the loss takes its own detached log-probs as pi_old (identical by definition); the sampler
            # correction still needs pi_old(tau | x), and only that.
            old = spread(prompt_only, prompts, policy.logprobs([p.tree for p in prompt_only]))
        reference = None
        if objective.kl_coef > 0:
            reference = spread(prompt_only, prompts, policy.reference_logprobs([p.tree for p in prompt_only]))

    loss_fn = partial(pact_loss, clip_low=objective.clip_low, clip_high=objective.clip_high, shaping=objective.shaping)
    results: list[UpdateResult] = []
    size = config.trainer.mini_batch_size
    with watch("update"):
        for start in range(0, len(prompts), size):
            part = slice(start, start + size)
            fill_streams(
                prompts[part],
                objective,
                experiment.schedule,
                experiment.step,
                old=old[part] if old is not None else None,
                reference=reference[part] if reference is not None else None,
                importance_cap=config.rollout.importance_cap if correct_sampler else None,
            )
            if not several_updates:
                for prompt in prompts[part]:
                    prompt.tree.streams.pop("old_logprobs", None)
            results.append(policy.update([p.tree for p in prompts[part]], loss_fn))
    return diagnostics.step_record(experiment, groups, prompts, old, results)


def observe_traces(quality: TraceQuality, groups: list[PromptGroup], results: dict[str, tuple[float, int]]) -> None:
    """Tell which rollouts of the step beat their task's trace."""
    for group in groups:
        if group.task.id in results:
            wins = [
                beats(rollout.outcome.score, sum(len(turn.calls) for turn in rollout.turns), *results[group.task.id])
                for rollout in group.rollouts
                if rollout.outcome is not None
            ]
            quality.observe(group.task.id, wins)


def mean_gap(record: dict[str, Any]) -> float | None:
    """The step's privilege gap, of passed and failed rollouts alike; None where no prompt was conditioned on its trace."""
    gaps = [record[key] for key in ("latent/gap_success", "latent/gap_failure") if record.get(key) is not None]
    return sum(gaps) / len(gaps) if gaps else None


def spread(source: list[PromptTree], target: list[PromptTree], values: list[torch.Tensor]) -> list[torch.Tensor]:
    """Carry per-rollout values of the prompt-only trees over to the same rollouts' prompt-only ranges in the full trees (0 elsewhere)."""
    carried = []
    for from_tree, to_tree, value in zip(source, target, values, strict=True):
        out = torch.zeros(to_tree.tree.num_scored, dtype=value.dtype)
        for key, (start, end) in from_tree.spans.items():
            if key in to_tree.spans:
                out[slice(*to_tree.spans[key])] = value[start:end]
        carried.append(out)
    return carried
