"""Everything a run holds, built once: data, policy, rollout generator, schedules, run folder. The loop reads; this
wires.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from pact_nemo.chat.template import ChatFormat
from pact_nemo.checkpoints import resume
from pact_nemo.checkpoints.embedded import materialise_embedded_model
from pact_nemo.checkpoints.hf import export_version
from pact_nemo.checkpoints.manifest import export_path, prune_exports, read_manifest, verify_manifest
from pact_nemo.checkpoints.quantised import materialise
from pact_nemo.config.schema import Config
from pact_nemo.environments.base import Environment
from pact_nemo.errors import CheckpointError, Interrupted, PactError
from pact_nemo.methods.registry import make_method
from pact_nemo.objective.adaptive import AdaptiveClock, between
from pact_nemo.objective.schedules import Clock, StepClock, TraceSchedule
from pact_nemo.objective.trace_quality import TraceQuality
from pact_nemo.policy.export.fp8_block import FP8_BLOCK
from pact_nemo.policy.model_folder import check_model_folder
from pact_nemo.policy.policy import MegatronPolicy
from pact_nemo.rollouts.overlap import Ahead
from pact_nemo.runtime.files import remove_unfinished
from pact_nemo.runtime.interrupt import StopRequest
from pact_nemo.tracking.metrics_log import MetricsLog
from pact_nemo.tracking.run_folder import Workspace
from pact_nemo.tracking.terminal import RunProgress
from pact_nemo.training.dataset import Dataset
from pact_nemo.training.distributed import on_rank_zero, rank
from pact_nemo.training.generation import Generator

log = logging.getLogger(__name__)


def model_path(config: Config) -> Path:
    """The HF folder to start from: the user's, or the embedded model converted into the cache."""
    if config.model.path is not None:
        return Path(config.model.path)
    return on_rank_zero(lambda: materialise_embedded_model(Path(config.run.cache_dir)))


def served_path(config: Config, source: Path) -> Path:
    """The HF folder that rollout servers start from, on one rank only: ``source``, or where it or the refits are FP8, a
    copy of it in the cache that has the refits' dtype."""
    dtype = config.rollout.export_dtype
    if config.trainer.replay is not None or not (dtype == FP8_BLOCK or check_model_folder(source).quantised):
        return source
    return materialise(source, Path(config.run.cache_dir), dtype)


def anneal_clock(config: Config) -> Clock:
    schedule = config.objective.schedule
    if schedule.kind == AdaptiveClock.kind:
        return AdaptiveClock(schedule.success_target, schedule.smoothing)
    if schedule.horizon is not None:
        return StepClock(schedule.horizon)
    assert config.trainer.steps is not None, "the tasks were not counted"  # training/open_run.py: _settle
    return StepClock(max(config.trainer.steps, 1), given=False)


def trace_schedule(config: Config) -> TraceSchedule:
    schedule = config.objective.schedule
    return TraceSchedule(
        reasoning=schedule.reasoning,
        call=schedule.call,
        reasoning_scale=schedule.reasoning_scale,
        fixed_level=schedule.fixed_level,
        call_start=schedule.call_start,
        call_end=schedule.call_end,
        clock=anneal_clock(config),
    )


class Experiment:
    """The state of a run between two steps.

    Attributes:
        step: finished RL steps; also the index of the next one.
        warmup_step: finished warm-up steps.
        version: weight version being served; raised by one at every refit.
        ahead: the next step's rollouts, where ``trainer.overlap`` has them sampled beside the update.
        rollout_seconds: what generating the step's rollouts took; None where they were not generated now (a replay, a
            resumed batch).
    """

    def __init__(
        self,
        config: Config,
        workspace: Workspace,
        chat: ChatFormat,
        environment: Environment,
        dataset: Dataset,
        policy: MegatronPolicy,
        generator: Generator,
        progress: RunProgress,
        source: Path,
        stop: StopRequest,
    ):
        self.config, self.workspace, self.chat = config, workspace, chat
        self.environment, self.dataset = environment, dataset
        self.policy, self.generator, self.progress = policy, generator, progress
        self.source, self.stop = source, stop
        self.schedule = trace_schedule(config)
        self.method = make_method(config)
        self.quality = TraceQuality(config.traces.quality_smoothing) if config.traces.quality else None
        self.boundary_ids = (
            chat.boundary_ids() if config.traces.control != "none" else chat.boundary_after_nothing_ids()
        )
        self.step = 0
        self.warmup_step = 0
        self.version = 0
        self.ahead = Ahead()
        self.rollout_seconds: float | None = None
        self.saving: resume.BackgroundSave | None = None
        self.metrics: MetricsLog | None = None
        self.plan: dict[str, Any] | None = None  # of rank 0, made at the start
        self.scores: dict[str, dict[str, Any]] = {}
        self.seconds: dict[str, float] = {}

    @property
    def total_steps(self) -> int:
        """RL steps of the whole run."""
        assert self.config.trainer.steps is not None, "the tasks were not counted"  # training/open_run.py: _settle
        return self.config.trainer.steps

    @property
    def anchor_prob(self) -> float:
        """q of the step that is next."""
        objective = self.config.objective
        return between(objective.anchor_prob, objective.schedule.anchor_end, self.schedule.clock.progress(self.step))

    # -- weights
    # ------------------------------------------------------------------------------------------------------------------

    def export(self, version: int) -> Path:
        """Write the current weights as ``exports/v<version>``: complete and checksummed before the folder has its
        name.
        """
        folder = export_path(self.workspace.exports, version)

        def there() -> bool:
            """A whole export of this version; :meth:`restore` removed those that an earlier attempt wrote after its
            last checkpoint.
            """
            if not folder.exists():
                return False
            verify_manifest(folder, expect_version=version)
            return True

        if not on_rank_zero(there):
            export_version(self.policy, self.workspace.exports, version, dtype=self.config.rollout.export_dtype)
        return folder

    def refit(self) -> dict[str, float]:
        """Export, then make the server load it. A replayed run has no server and only counts the version.

        Returns:
            seconds by part, of the slowest server: ``refit/export``, ``verify``, ``pause``, ``reload``, ``finish``;
            ``refit/bytes``; and what became of servers since the last refit: ``server/restarts``, ``rollout/reissued``.
        """
        self.version += 1
        if self.config.trainer.replay is not None:
            return {}
        start = time.perf_counter()
        folder = self.export(self.version)
        export_s = time.perf_counter() - start

        def reload() -> dict[str, float]:
            reports = self.generator.refit(folder, self.version)
            self._tidy(
                lambda: prune_exports(
                    self.workspace.exports, keep=self.config.rollout.keep_exports, protect={self.version}
                )
            )
            parts = {
                f"refit/{part}": max(getattr(report, f"{part}_s") for report in reports)
                for part in ("verify", "pause", "reload", "finish")
            }
            return {
                "refit/export": export_s,
                **parts,
                "refit/bytes": float(reports[0].bytes),
                **self.generator.counts(),
            }

        return on_rank_zero(reload)

    def serve_current(self) -> None:
        """After a resume: make the server load the restored weights before it answers anything (a replayed run has
        none).
        """
        if self.config.trainer.replay is not None:
            return
        folder = self.export(self.version)
        on_rank_zero(lambda: self.generator.refit(folder, self.version))

    def replay_file(self, step: int) -> Path:
        """Dumped rollouts of ``step`` in the run folder that ``trainer.replay`` names."""
        assert self.config.trainer.replay is not None
        return Workspace(Path(self.config.trainer.replay)).step_rollouts(step)

    @property
    def reference_path(self) -> Path:
        """The frozen KL reference: the policy that RL starts from; where there is a warm-up, its result, kept in full
        precision.
        """
        return export_path(self.workspace.folder / "reference", 0) if self.config.warmup.steps > 0 else self.source

    def freeze_reference(self) -> None:
        """Keep the policy that RL starts from for the KL term; written once, so that a resumed run reads the same
        one.
        """
        if self.config.objective.kl_coef == 0:
            return
        if not on_rank_zero(self.reference_path.exists):
            export_version(self.policy, self.reference_path.parent, 0, dtype=self.policy.weight_dtype)
        self.policy.load_reference(self.reference_path)

    # -- resume
    # ------------------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside weights, optimizer and RNG. Data position, fixed schedules and gate are
        functions of step and seed.
        """
        return {
            "step": self.step,
            "warmup_step": self.warmup_step,
            "version": self.version,
            "scores": self.scores,
            "seconds": self.seconds,
            "seed": self.config.run.seed,
            "clock": self.schedule.clock.state(),
            "trace_quality": asdict(self.quality) if self.quality is not None else None,
            "ahead": self.ahead.state(),
        }

    def checkpoint_if_due(self) -> None:
        trainer = self.config.trainer
        self.finish_saving(wait=False)
        if self.step == self.total_steps or (trainer.checkpoint_every and self.step % trainer.checkpoint_every == 0):
            with self.progress.phase("checkpoint", brief=True):
                self.checkpoint(background=trainer.async_checkpoint and self.step < self.total_steps)

    def checkpoint(self, *, background: bool = False) -> None:
        """Save now, or start to, then delete all but the newest ``trainer.keep_checkpoints``."""
        start = time.perf_counter()
        self.finish_saving(wait=True)
        if on_rank_zero(resume.checkpoint_path(self.workspace.checkpoints, self.policy.step).exists):
            return  # nothing has been trained since; what stands under a checkpoint's name is whole
        if background:
            self.saving = resume.BackgroundSave(self.policy, self.workspace.checkpoints, self.state())
        else:
            resume.save(self.policy, self.workspace.checkpoints, self.state())
            self._prune_checkpoints()
        self.seconds["checkpoint"] = self.seconds.get("checkpoint", 0.0) + time.perf_counter() - start

    def finish_saving(self, *, wait: bool) -> None:
        """Make a checkpoint that was written in the background visible, once it is whole; ``wait`` for that.
        Collective.
        """
        if self.saving is None or not (wait or self.saving.finished()):
            return
        saving, self.saving = self.saving, None
        saving.finish()
        self._prune_checkpoints()

    def _prune_checkpoints(self) -> None:
        on_rank_zero(
            lambda: self._tidy(lambda: resume.prune(self.workspace.checkpoints, self.config.trainer.keep_checkpoints))
        )

    def _tidy(self, delete: Callable[[], object]) -> None:
        """Delete what is old. That it can't be done, or must not (the newest is not whole), is said and ends no run:
        the old ones stay.
        """
        try:
            delete()
        except CheckpointError as error:
            self.progress.message(f"nothing old was deleted: {error}")

    def restore(self) -> bool:
        """Continue from the newest complete checkpoint; torn newer ones are removed with a warning. False when there is
        none: the run starts from its beginning.

        Raises:
            CheckpointError: the checkpoint belongs to another seed or model, or was annealed by another kind of clock.
        """
        folder = on_rank_zero(self._newest_checkpoint)
        if folder is None:
            on_rank_zero(lambda: self._forget_exports_after(-1))
            return False
        state = resume.load(self.policy, folder)
        if state["seed"] != self.config.run.seed:
            raise CheckpointError(
                f"{folder} was made with run.seed={state['seed']}, the config says {self.config.run.seed}"
            )
        self.step, self.warmup_step, self.version = state["step"], state["warmup_step"], state["version"]
        self.scores, self.seconds = state["scores"], state["seconds"]
        if "clock" not in state:
            raise CheckpointError(
                f"{folder} holds no state of the annealing: an older version of this package made it; start a new run"
            )
        try:
            self.schedule.clock.load(state["clock"])
        except (KeyError, ValueError) as error:
            raise CheckpointError(
                f"{folder}: the schedule can't go on from here: {error}; resume with the objective.schedule.kind that"
                " the run had"
            ) from error
        on_rank_zero(lambda: self._forget_exports_after(self.version))
        if self.quality is not None and state.get("trace_quality") is not None:
            self.quality = TraceQuality(**state["trace_quality"])
        if rank() == 0:
            self.ahead.load_state(state.get("ahead"), str(folder))
        return True

    def leave_if_asked(self) -> None:
        """Between two steps: if a rank was asked to stop, checkpoint and raise. Collective.

        Raises:
            Interrupted: says how to go on.
        """
        if self.stop.agreed():
            self.leave()

    def leave(self) -> NoReturn:
        """Checkpoint what is finished and raise Interrupted. Collective."""
        done = f"after step {self.step}" if self.step else f"after warm-up step {self.warmup_step}"
        if self.policy.step > 0:
            self.checkpoint()
            done += ", which is checkpointed"
        else:
            done = "before the first step"
        self.finish_saving(wait=True)
        raise Interrupted(f"{self.stop.name}: stopped {done}; go on with --resume {self.workspace.folder}")

    def give_up(self, problem: PactError) -> NoReturn:
        """Checkpoint what is finished and raise the problem, of the same type, with how to go on. Collective."""
        if self.policy.step > 0:
            self.checkpoint()
        self.finish_saving(wait=True)
        remedy = f"What was finished before is checkpointed: go on with --resume {self.workspace.folder}"
        raise type(problem)(f"step {self.step + 1}: {problem}\n{remedy}") from problem

    def _forget_exports_after(self, version: int) -> None:
        """Remove what an attempt wrote after the checkpoint that the run goes on from: the same version numbers will be
        other weights.
        """
        reference = [self.reference_path] if version < 0 and self.config.warmup.steps > 0 else []
        for folder in (*self.workspace.exports.glob("v*"), self.workspace.hf, *reference):
            if not folder.exists():
                continue
            try:
                newer = read_manifest(folder).version > version
            except CheckpointError:
                newer = True
            if newer:
                log.warning("removing %s: it is newer than the checkpoint", folder)
                shutil.rmtree(folder)

    def _newest_checkpoint(self) -> Path | None:
        root = self.workspace.checkpoints
        resume.remove_unfinished(root)
        for place in (
            self.workspace.folder,
            self.reference_path.parent,
        ):  # exports that were cut off: the final one, the reference
            if place.is_relative_to(self.workspace.folder):
                remove_unfinished(place)
        folder = resume.latest_complete(root)
        for step in resume.steps(root):
            torn = resume.checkpoint_path(root, step)
            if folder is None or torn.name > folder.name:
                log.warning("removing %s: it is not complete", torn)
                shutil.rmtree(torn)
        return folder

    # -- reporting
    # ----------------------------------------------------------------------------------------------------------------

    def log_step(self, stage: str, record: dict[str, Any]) -> None:
        """Append to metrics.jsonl and TensorBoard and show one line."""
        step = self.step if stage == "rl" else self.warmup_step
        if stage == "rl" and self.rollout_seconds:
            record["rollout/tokens_per_second"] = record["tokens/policy"] / self.rollout_seconds
        if rank() == 0:
            assert self.metrics is not None
            self.metrics.append({"step": step, "stage": stage, **record})
            self.progress.step_line({"step": step, "stage": stage, **record})
        for key, value in record.items():
            if key.startswith("time/") and key != "time/total":
                phase = key.removeprefix("time/")
                self.seconds[phase] = self.seconds.get(phase, 0.0) + value
        if stage == "warmup":
            self.seconds["warmup"] = self.seconds.get("warmup", 0.0) + record["time/total"]
