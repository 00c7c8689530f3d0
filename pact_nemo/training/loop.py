"""Algorithm 1 of the paper: rollouts from the prompt alone, advantages, gate, the two contexts, one update, refit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pact_nemo.environments.base import Task
from pact_nemo.errors import ConfigError, Interrupted, NumericsError, ServerLost, TooManyFailures
from pact_nemo.objective.trace_quality import TraceQuality, beats
from pact_nemo.policy.policy import UpdateResult
from pact_nemo.policy.trees import TokenTree
from pact_nemo.rollouts.overlap import Batch
from pact_nemo.rollouts.store import read_rollouts
from pact_nemo.rollouts.types import Rollout
from pact_nemo.tracking.terminal import RunProgress
from pact_nemo.training import alarms, diagnostics, gradient_signal, held_out_traces, numerics
from pact_nemo.training.dataset import prompts_of_step
from pact_nemo.training.distributed import on_rank_zero, rank
from pact_nemo.training.experiment import Experiment
from pact_nemo.training.prompt_groups import Gate, PromptGroup, TraceUse, form_group, has_policy_tokens
from pact_nemo.training.prompt_trees import (
    PROMPT_ONLY,
    PromptTree,
    carried_over,
    contexts_needed,
    grow_tree,
    tempered,
)
from pact_nemo.training.records import dump_step
from pact_nemo.training.streams import Scores, with_streams


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
    """Run every step from where the experiment stands to the run's last."""
    config = experiment.config
    while experiment.step < experiment.total_steps:
        experiment.leave_if_asked()
        watch = Stopwatch(experiment.progress)
        with watch("rollout"):
            try:
                groups = collect(experiment)
            except Interrupted:  # nothing of this step has touched the weights: what is finished is the step before
                experiment.leave()
            except ServerLost as error:
                experiment.give_up(error)
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        if (problem := alarms.too_many(rollouts, config.alarms)) is not None:
            experiment.give_up(TooManyFailures(problem))
        if config.trainer.overlap and experiment.step + 1 < experiment.total_steps:
            start_ahead(experiment)
        record = optimise(experiment, groups, watch) | diagnostics.data_record(experiment.dataset.dropped, groups)
        clock = experiment.schedule.clock
        if clock.adapts:
            clock.observe(record["reward/success"], mean_gap(record))
            record["anneal/progress"] = clock.progress(experiment.step)
        if experiment.quality is not None:
            observe_traces(experiment.quality, groups, experiment.dataset.trace_results)
            record["trace/weight"] = sum(group.trace_weight for group in groups) / len(groups)
        experiment.step += 1
        if held_out_traces.due(config.diagnostics.trace_every, experiment.step, experiment.total_steps):
            with watch("diagnostics"):
                record |= held_out_traces.measure(experiment)
        lost: ServerLost | None = None
        try:
            with watch(
                "rollout"
            ):  # what is left of the next step's; servers change weights between batches, never within one
                on_rank_zero(experiment.ahead.finish)
            with watch("refit"):
                record |= experiment.refit()
        except ServerLost as error:  # the step's update is done: it is logged and checkpointed first
            lost = error
        record |= {f"failed/{kind}": count for kind, count in alarms.failures(rollouts).items()}
        for warning in filter(None, [alarms.told(rollouts), *alarms.spikes(record, config.alarms)]):
            experiment.progress.message(f"warning: step {experiment.step}: {warning}")
        record.update(watch.times)
        record["time/total"] = watch.total()
        experiment.log_step(
            "rl", record
        )  # before the checkpoint: a step that a checkpoint holds is in metrics.jsonl, whenever the run is cut
        if lost is not None:
            experiment.give_up(lost)
        experiment.checkpoint_if_due()


def tasks_of(experiment: Experiment, step: int) -> list[Task]:
    """The prompts of a step: a function of step and seed."""
    config = experiment.config
    return prompts_of_step(experiment.dataset.train, step, config.trainer.batch_size, config.run.seed)


def start_ahead(experiment: Experiment) -> None:
    """Have rank 0 sample the next step's rollouts from the weights being served, beside the update that comes now."""
    if rank() == 0 and experiment.config.trainer.replay is None:
        step, version, k = experiment.step + 1, experiment.version, experiment.config.objective.group_size
        tasks = tasks_of(experiment, step)
        experiment.ahead.start(step, lambda: experiment.generator.rollouts(tasks, k, step=step, version=version))


def collect(experiment: Experiment) -> list[PromptGroup]:
    """K prompt-only rollouts per prompt, then rewards, advantages and the gate. Traces join here, after generation has
    ended.
    """
    config, step = experiment.config, experiment.step
    tasks = tasks_of(experiment, step)
    k = config.objective.group_size

    def sample() -> Batch:
        if config.trainer.replay is not None:
            rollouts = replayed(experiment.replay_file(step), [task.id for task in tasks for _ in range(k)])
            return Batch(step, rollouts, None)
        if (ready := experiment.ahead.take(step)) is not None:
            return ready
        started = time.perf_counter()
        rollouts = experiment.generator.rollouts(tasks, k, step=step, version=experiment.version)
        return Batch(step, rollouts, time.perf_counter() - started)

    batch = on_rank_zero(sample)
    rollouts, experiment.rollout_seconds = batch.rollouts, batch.seconds
    gate = Gate(config.run.seed, step, experiment.anchor_prob)
    groups = [
        form_group(task, rollouts[i * k : (i + 1) * k], trace_of(experiment, task), experiment.method, gate)
        for i, task in enumerate(tasks)
    ]
    if config.trainer.dump_rollouts:
        file, keep = experiment.workspace.step_rollouts(step), config.trainer.keep_rollouts
        on_rank_zero(lambda: dump_step(file, groups, keep=keep))
    return groups


def trace_of(experiment: Experiment, task: Task) -> TraceUse:
    """A prompt's trace in this step: one of its variants, by (seed, step, task)."""
    seed, step, dataset = experiment.config.run.seed, experiment.step, experiment.dataset
    return TraceUse(
        dataset.trace_for(task.id, seed, step),
        weight=experiment.quality.weight(task.id) if experiment.quality is not None else 1.0,
        control=dataset.control_for(task.id, seed, step),
    )


def replayed(path: Path, expected: list[str]) -> list[Rollout]:
    """Dumped rollouts of the very prompts that this step has.

    Raises:
        ConfigError: they are another run's: seed, batch size, group size or tasks differ.
    """
    rollouts = read_rollouts(path)
    found = [rollout.task_id for rollout in rollouts]
    if found != expected:
        first = next(
            (i for i, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]),
            min(len(found), len(expected)),
        )
        raise ConfigError(
            f"{path} holds {len(found)} rollouts, this step needs {len(expected)}; they differ from rollout {first + 1}"
            " on: replay with the run.seed, trainer.batch_size, objective.group_size and tasks of the run that dumped"
            " them"
        )
    return rollouts


def optimise(experiment: Experiment, groups: list[PromptGroup], watch: Stopwatch) -> dict[str, Any]:
    """Score pi_old and the reference, fill the weight streams with global denominators, update once per mini-batch.

    The first update is on-policy: its loss takes its own detached log-probs as pi_old, which they are by definition, so
    nothing is scored for it but what the sampler correction needs, pi_old(tau | x).
    """
    config, policy, method = experiment.config, experiment.policy, experiment.method
    size = config.trainer.mini_batch_size
    temperature = config.rollout.sampling.temperature
    correct_sampler = config.rollout.importance == "tis"
    adaptive = experiment.schedule.clock.adapts  # goes by every prompt's privilege gap
    both = config.trainer.both_contexts or correct_sampler or adaptive
    grown = [
        grow_tree(
            group,
            experiment.boundary_ids,
            method,
            contexts=contexts_needed(group, method, diagnostics=both),
            skip_zero_advantage=config.trainer.skip_zero_advantage and not adaptive,
        )
        for group in groups
    ]
    grown = tempered(grown, method, temperature)
    # a prompt whose rollouts all failed still teaches its trace and counts in |B|; one that scores no token at all is
    # not computed
    cut = [grown[start : start + size] for start in range(0, len(grown), size)]
    parts = [(members, len(part)) for part in cut if (members := [p for p in part if p.tree.num_scored])]
    prompts = [prompt for members, _ in parts for prompt in members]

    def under_prompt(
        prompts: list[PromptTree], score: Callable[[list[TokenTree]], list[torch.Tensor]]
    ) -> list[torch.Tensor]:
        """What ``score`` says of the rollouts under x alone, laid out as the full trees (0 elsewhere)."""
        chosen = [i for i, p in enumerate(prompts) if has_policy_tokens(p.group)]
        bare = [grow_tree(prompts[i].group, experiment.boundary_ids, method, contexts=(PROMPT_ONLY,)) for i in chosen]
        alone = dict(zip(chosen, tempered(bare, method, temperature), strict=True))
        values = dict(zip(alone, score([p.tree for p in alone.values()]), strict=True)) if alone else {}
        return [
            carried_over(alone[i], p, values[i]) if i in alone else torch.zeros(p.tree.num_scored)
            for i, p in enumerate(prompts)
        ]

    with watch("score"):
        # mini-batch by mini-batch: packed as in the update, and in its precision
        on_policy = 0 if config.trainer.score_first_update else 1  # updates whose own log-probs are pi_old's
        old: list[list[torch.Tensor] | None] = [None] * on_policy
        old += [policy.logprobs([p.tree for p in members]) for members, _ in parts[on_policy:]]
        if correct_sampler and on_policy and parts:
            old[0] = under_prompt(parts[0][0], policy.logprobs)
        reference = under_prompt(prompts, policy.reference_logprobs) if config.objective.kl_coef > 0 else None

    starts = [sum(len(members) for members, _ in parts[:number]) for number in range(len(parts))]

    def filled(number: int) -> list[PromptTree]:
        """The prompts of an update with their streams."""
        members, num_prompts = parts[number]
        part = slice(starts[number], starts[number] + len(members))
        scores = Scores(
            old[number],
            reference[part] if reference is not None else None,
            config.rollout.importance_cap if correct_sampler else None,
            on_policy=number < on_policy,
        )
        try:
            return with_streams(members, method, experiment.schedule, experiment.step, scores, num_prompts=num_prompts)
        except FloatingPointError as error:  # the same on every rank: what was scored is
            raise refused(
                experiment, NumericsError(str(error), names=["importance"], logprobs=old[number]), members, number
            ) from error

    every = config.diagnostics.gradient_every
    results: list[UpdateResult] = []
    signal: dict[str, float | None] = {}
    if parts and every and experiment.step % every == 0:
        with watch("diagnostics"):
            signal = gradient_signal.measure(policy, filled(0), method, seed=config.run.seed, step=experiment.step)
    with watch("update"):
        for number in range(len(parts)):
            members = filled(number)
            try:
                results.append(policy.update([p.tree for p in members], method.loss, entropy=True))
            except NumericsError as error:
                raise refused(experiment, error, members, number) from error
    scored = [*(result.logprobs for result in results[:on_policy]), *old[on_policy:]]
    before = [values for part in scored for values in part or ()]
    return diagnostics.step_record(experiment, groups, prompts, before, results) | signal


def refused(experiment: Experiment, error: NumericsError, members: list[PromptTree], number: int) -> NumericsError:
    """Name the samples behind a refused update and dump its mini-batch."""
    found = numerics.suspects(members, error.logprobs)
    path = experiment.workspace.numerics / f"step_{experiment.step:06d}_update_{number}.json"
    on_rank_zero(lambda: numerics.dump(path, error, members, found))
    return NumericsError(
        f"step {experiment.step + 1}: {error}; {numerics.described(found)}. The mini-batch is in {path}",
        names=error.names,
    )


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
    """Mean magnitude of the step's privilege gaps, of passed and failed rollouts; None where no prompt was conditioned
    on its trace.
    """
    gaps = [abs(record[key]) for key in ("latent/gap_success", "latent/gap_failure") if record.get(key) is not None]
    return sum(gaps) / len(gaps) if gaps else None
