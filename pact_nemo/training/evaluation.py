"""Held-out score by the benchmark's own checker: at the ends of the run's stages, and between its steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pact_nemo.errors import Interrupted, ServerError, ServerLost
from pact_nemo.monitoring.held_out_scores import Score, episode_rewards, summarise
from pact_nemo.runtime.collective import on_rank_zero
from pact_nemo.runtime.words import count_of
from pact_nemo.tracking.episodes import dump_evaluation
from pact_nemo.training.stopwatch import Stopwatch

if TYPE_CHECKING:
    from pact_nemo.training.run import TrainingRun


def evaluate(run: TrainingRun, name: str) -> None:
    """Play every held-out task with the weights being served, dump the episodes as ``eval/<name>.jsonl`` and keep the
    score.

    ``name`` is ``base`` (before the warm-up), ``before`` or ``after``; one that a resumed run has already is not played
    again, and one whose weights are gone is left out. Replayed runs have no server and skip it.
    """
    config, state = run.config, run.state
    wanted = config.evaluation.after if name == "after" else config.evaluation.before
    if not wanted or name in state.scores or config.trainer.replay is not None:
        return
    past, stage = {"base": (state.warmup_step, "the warm-up"), "before": (state.step, "RL")}.get(name, (0, ""))
    if past:  # evaluation.before was switched on as the run was resumed
        run.progress.message(
            f"no {run.config.tasks.scored} score {name}: {stage} is past {count_of(past, 'step')}, its weights are gone"
        )
        return
    try:
        score = played(run, name)
    except Interrupted:
        run.checkpoints.leave()
    run.recorder.evaluation(name, score.to_dict(), score.seconds)


def due_between(run: TrainingRun, step: int, last: int) -> bool:
    """Whether ``evaluation.every`` asks for a score after ``step`` finished steps of a stage of ``last``: never after
    its last, which ``before`` or ``after`` has.
    """
    every = run.config.evaluation.every
    return every > 0 and step % every == 0 and step < last and run.config.trainer.replay is None


def score_between(
    run: TrainingRun, stage: str, step: int, record: dict[str, Any], watch: Stopwatch
) -> ServerError | ServerLost | None:
    """Play the held-out tasks after a step, with the weights being served; the episodes are
    ``eval/<stage>/step_<step>.jsonl``, and the step's record gets ``held_out/score``, ``call_reward`` and ``failed``.

    The step is finished, so nothing here may lose it. Where a signal cuts the evaluation off it has no score, and the
    run leaves behind the step.

    Returns:
        why the run can't go on, to be raised once the step is recorded and checkpointed.
    """
    try:
        with watch("evaluation", lambda: run.sharing.seconds):
            score = played(run, f"{stage}/step_{step:06d}")
    except Interrupted:
        run.progress.message(f"the evaluation after {stage} step {step} was cut off; it has no score")
        return None
    except (ServerError, ServerLost) as error:
        return error
    record["held_out/score"] = score.score
    record["held_out/call_reward"] = score.call_reward
    record["held_out/failed"] = score.failed
    return None


def played(run: TrainingRun, name: str) -> Score:
    """Every held-out task, played and dumped. Collective.

    Raises:
        Interrupted: a signal came; nothing was dumped.
    """
    config, tasks, version = run.config, run.dataset.held_out, run.state.version

    def play() -> Score:
        rollouts, seconds = run.generator.evaluation(tasks, name=name, version=version)
        rewards, call_rewards = episode_rewards(config, tasks, rollouts)
        dump_evaluation(run.workspace.evaluation(name), tasks, rollouts, rewards)
        return summarise(tasks, rollouts, call_rewards, version, seconds)

    run.sharing.engines()
    score = on_rank_zero(play)
    failed = f", {score.failed} of them failed and count 0" if score.failed else ""
    run.progress.message(
        f"{config.tasks.scored} score {name}: {score.score:.3f} over {count_of(score.n, 'episode')}{failed}"
        f" ({score.seconds:.0f} s)"
    )
    return score
