"""The training loop: the paper's Algorithm 1."""

from __future__ import annotations

from typing import Any

from pact_nemo.batches.prompt_groups import PromptGroup, rollouts_of
from pact_nemo.errors import ConfigError, PactError, ServerLost
from pact_nemo.monitoring import alarms, diagnostics, held_out_traces
from pact_nemo.objective.trace_quality import TraceQuality, beats
from pact_nemo.runtime.collective import on_rank_zero
from pact_nemo.training.collect import collect, start_ahead
from pact_nemo.training.evaluation import due_between, score_between
from pact_nemo.training.run import TrainingRun
from pact_nemo.training.stopwatch import Stopwatch
from pact_nemo.training.update import update


def train(run: TrainingRun) -> None:
    """Run every step from where the run stands to its last."""
    run.recorder.spend(run.sharing.taken())  # before the first step
    while run.state.step < run.total_steps:
        run.checkpoints.leave_if_asked()
        watch = Stopwatch(run.progress)
        groups, seconds = collect(run, watch)  # K rollouts under x, rewards, advantages, gate, trace
        start_ahead(run)
        run.sharing.trainer(drop=True)
        record = update(run, groups, watch)  # under x and [x; h*]
        run.state.step += 1
        record |= observe(run, groups, record, watch)
        lost: PactError | None = refit(run, record, watch)
        if lost is None and due_between(run, run.state.step, run.total_steps):
            lost = score_between(run, "rl", run.state.step, record, watch)
        record |= {f"failed/{kind}": count for kind, count in alarms.failures(rollouts_of(groups)).items()}
        record |= {**watch.times, **run.sharing.taken(), "time/total": watch.total()}
        if seconds:
            record["rollout/tokens_per_second"] = record["tokens/policy"] / seconds
        run.recorder.step("rl", record)  # before the checkpoint: a step that a checkpoint holds is in metrics.jsonl
        if lost is not None:
            run.checkpoints.give_up(lost)
        run.checkpoints.after_step()


def observe(run: TrainingRun, groups: list[PromptGroup], record: dict[str, Any], watch: Stopwatch) -> dict[str, Any]:
    """What a finished step tells: annealing and the traces' weights go by it, and warnings are shown.

    Returns:
        further numbers of the step.
    """
    state, config = run.state, run.config
    found: dict[str, Any] = diagnostics.data_record(run.dataset.dropped, groups)
    if state.clock.adapts:
        state.clock.observe(record["reward/success"], record["latent/gap"])
    if state.quality is not None:
        observe_traces(state.quality, groups, run.dataset.trace_results)
        found["trace/weight"] = sum(group.trace_weight for group in groups) / len(groups)
    if held_out_traces.due(config.diagnostics.trace_every, state.step, run.total_steps):
        with watch("diagnostics"):
            found |= held_out_traces.measure(run.policy, run.chat, run.dataset.held_out_traces)
    for warning in filter(None, [alarms.failure_summary(rollouts_of(groups)), *alarms.spikes(record, config.alarms)]):
        run.progress.message(f"warning: step {state.step}: {warning}")
    return found


def refit(run: TrainingRun, record: dict[str, Any], watch: Stopwatch) -> PactError | None:
    """Give the servers the new weights; adds its numbers to the record. A server that is given up, or an environment
    that the next step's rollouts refuse, is returned: this step's update is done, so it is logged and checkpointed.
    """
    try:
        with watch("rollout"):  # what is left of the next step's; servers change weights between batches, never within
            on_rank_zero(run.state.ahead.finish)
        with watch("refit", lambda: run.sharing.seconds + run.state.seconds.get("checkpoint", 0.0)):
            record |= run.weights.refit(run.checkpoints.in_trainers_turn)
        if (warning := alarms.engines_left(record)) is not None:
            run.progress.message(f"warning: step {run.state.step}: {warning}")
    except (ConfigError, ServerLost) as error:
        return error
    return None


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
