"""A step's rollouts, and the groups that they make with their traces."""

from __future__ import annotations

import time
from pathlib import Path

from pact_nemo.batches.prompt_groups import Gate, PromptGroup, TraceUse, form_group, rollouts_of
from pact_nemo.environments.base import Task
from pact_nemo.errors import ConfigError, DataError, Interrupted, ServerLost, TooManyFailures
from pact_nemo.monitoring import alarms
from pact_nemo.rollouts.overlap import Batch
from pact_nemo.rollouts.store import read_rollouts
from pact_nemo.rollouts.types import Rollout
from pact_nemo.runtime.collective import on_rank_zero, rank
from pact_nemo.tracking.episodes import dump_step
from pact_nemo.tracking.run_folder import Workspace
from pact_nemo.training.run import TrainingRun
from pact_nemo.training.stopwatch import Stopwatch


def collect(run: TrainingRun, watch: Stopwatch) -> tuple[list[PromptGroup], float | None]:
    """K prompt-only rollouts per prompt, then rewards, advantages and the gate. Traces join here, after generation has
    ended.

    Returns:
        a group per prompt; the seconds that generating its rollouts took, None where they were not generated now.

    Raises:
        ConfigError, DataError: the rollouts are of other prompts, or another run's.
        Interrupted, ServerLost, TooManyFailures: what was finished before is checkpointed.
    """
    try:
        run.sharing.engines()
        with watch("rollout"):
            groups, seconds = groups_of_step(run)
    except Interrupted:  # nothing of this step has touched the weights: what is finished is the step before
        run.checkpoints.leave()
    except (ConfigError, DataError, ServerLost) as error:
        run.checkpoints.give_up(error)
    if (problem := alarms.too_many(rollouts_of(groups), run.config.alarms)) is not None:
        run.checkpoints.give_up(TooManyFailures(problem))
    return groups, seconds


def tasks_of(run: TrainingRun, step: int) -> list[Task]:
    """The prompts of a step: a function of step and seed."""
    return run.dataset.prompts_of_step(run.config, step)


def start_ahead(run: TrainingRun) -> None:
    """With ``trainer.overlap``, have rank 0 sample the next step's rollouts, from the weights being served, beside the
    update that comes now.
    """
    config, step, version = run.config, run.state.step + 1, run.state.version
    if not config.trainer.overlap or step == run.total_steps:
        return
    if rank() == 0 and config.trainer.replay is None:
        tasks, k = tasks_of(run, step), config.objective.group_size
        run.state.ahead.start(step, lambda: run.generator.rollouts(tasks, k, step=step, version=version))


def groups_of_step(run: TrainingRun) -> tuple[list[PromptGroup], float | None]:
    """See :func:`collect`."""
    config, step = run.config, run.state.step
    tasks, k = tasks_of(run, step), config.objective.group_size
    batch = on_rank_zero(lambda: _sampled(run, tasks))
    gate = Gate(config.run.seed, step, run.anchor_prob)
    groups = [
        form_group(task, batch.rollouts[i * k : (i + 1) * k], trace_of(run, task), run.method, gate)
        for i, task in enumerate(tasks)
    ]
    if config.trainer.dump_rollouts:
        file, keep = run.workspace.step_rollouts(step), config.trainer.keep_rollouts
        on_rank_zero(lambda: dump_step(file, groups, keep=keep))
    return groups, batch.seconds


def _sampled(run: TrainingRun, tasks: list[Task]) -> Batch:
    """The step's rollouts, on rank 0: replayed, sampled ahead, or sampled now."""
    config, step, k = run.config, run.state.step, run.config.objective.group_size
    wanted = [task.id for task in tasks for _ in range(k)]
    if config.trainer.replay is not None:
        return Batch(step, replayed(Workspace(Path(config.trainer.replay)).step_rollouts(step), wanted), None)
    if (ready := run.state.ahead.take(step)) is not None:
        if config.trainer.overlap and [rollout.task_id for rollout in ready.rollouts] == wanted:
            return ready
        run.progress.message("the rollouts that were sampled ahead are of other settings; the step samples anew")
    started = time.perf_counter()
    rollouts = run.generator.rollouts(tasks, k, step=step, version=run.state.version)
    return Batch(step, rollouts, time.perf_counter() - started)


def trace_of(run: TrainingRun, task: Task) -> TraceUse:
    """A prompt's trace in this step: one of its variants, by (seed, step, task)."""
    seed, step, quality = run.config.run.seed, run.state.step, run.state.quality
    return TraceUse(
        run.dataset.trace_for(task.id, seed, step),
        weight=quality.weight(task.id) if quality is not None else 1.0,
        control=run.dataset.control_for(task.id, seed, step),
    )


def replayed(path: Path, expected: list[str]) -> list[Rollout]:
    """Dumped rollouts of the very prompts that this step has.

    Raises:
        ConfigError: they are another run's: seed, batch size, group size or tasks differ.
    """
    rollouts = read_rollouts(path)
    found = [rollout.task_id for rollout in rollouts]
    if found != expected:
        pairs = enumerate(zip(found, expected, strict=False))
        first = next((i for i, pair in pairs if pair[0] != pair[1]), min(len(found), len(expected)))
        raise ConfigError(
            f"{path} holds {len(found)} rollouts, this step needs {len(expected)}; they differ from rollout"
            f" {first + 1} on: replay with the run.seed, trainer.batch_size, objective.group_size and tasks of the run"
            " that dumped them"
        )
    return rollouts
