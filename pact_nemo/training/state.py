"""Where a run stands: what a checkpoint keeps beside weights, optimizer and random numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from pact_nemo.checkpoints.kl_reference import check_warmup, reference_of, stands
from pact_nemo.checkpoints.resume_folders import latest_complete, read_state
from pact_nemo.config.schema import Config
from pact_nemo.errors import CheckpointError
from pact_nemo.objective.adaptive import AdaptiveClock
from pact_nemo.objective.schedules import Clock, StepClock
from pact_nemo.objective.trace_quality import TraceQuality
from pact_nemo.rollouts.overlap import Ahead
from pact_nemo.runtime.collective import rank
from pact_nemo.tracking.run_folder import Workspace


@dataclass
class RunState:
    """The state of a run between two steps. Data position, fixed schedules and gate are functions of step and seed.

    Attributes:
        seed: ``run.seed``; a checkpoint of another seed is refused.
        clock: how far annealing has come.
        quality: how often each trace was beaten; None where traces keep their weight.
        ahead: the next step's rollouts, where ``trainer.overlap`` has them sampled beside the update.
        step: finished RL steps, so also the index of the next one.
        warmup_step: finished warm-up steps.
        version: weight version being served; raised by one at every refit.
        scores: evaluation results by stage.
        seconds: spent so far, by phase.
    """

    seed: int
    clock: Clock
    quality: TraceQuality | None = None
    ahead: Ahead = field(default_factory=Ahead)
    step: int = 0
    warmup_step: int = 0
    version: int = 0
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def spend(self, phase: str, seconds: float) -> None:
        """Add seconds to a phase's."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def as_row(self) -> dict[str, Any]:
        """Plain data, JSON-ready."""
        return {
            "step": self.step,
            "warmup_step": self.warmup_step,
            "version": self.version,
            "scores": self.scores,
            "seconds": self.seconds,
            "seed": self.seed,
            "clock": self.clock.state(),
            "trace_quality": asdict(self.quality) if self.quality is not None else None,
            "ahead": self.ahead.state(),
        }

    def load(self, row: dict[str, Any], file: str) -> None:
        """Go on from an :meth:`as_row`; ``file`` says where it is from, for messages.

        Raises:
            CheckpointError: it belongs to another seed, or was annealed by another kind of clock.
        """
        if row["seed"] != self.seed:
            raise CheckpointError(f"{file} was made with run.seed={row['seed']}, the config says {self.seed}")
        self.step, self.warmup_step, self.version = row["step"], row["warmup_step"], row["version"]
        self.scores, self.seconds = row["scores"], row["seconds"]
        if "clock" not in row:
            raise CheckpointError(
                f"{file} holds no state of the annealing: an older version of this package made it; start a new run"
            )
        try:
            if row["step"]:  # before the first step nothing was annealed, and this run may be longer
                self.clock.load(row["clock"])
        except (KeyError, ValueError) as error:
            raise CheckpointError(
                f"{file}: the schedule can't go on from here: {error}; resume with the objective.schedule.kind that the"
                " run had"
            ) from error
        if self.quality is not None and row.get("trace_quality") is not None:
            self.quality = TraceQuality(**row["trace_quality"])
        if rank() == 0:
            self.ahead.load_state(row.get("ahead"), file)


def new_state(config: Config) -> RunState:
    """Of a run before its first step."""
    quality = TraceQuality(config.traces.quality_smoothing) if config.traces.quality else None
    return RunState(config.run.seed, anneal_clock(config), quality)


def check_resume(config: Config, space: Workspace) -> None:
    """Refuse, before anything is started, what can't be gone on from; a new run has nothing. On one rank.

    Raises:
        CheckpointError: see :meth:`RunState.load`, :func:`check_warmup` and :func:`stands`.
    """
    if (folder := latest_complete(space.checkpoints)) is None:
        return
    state, warmup = new_state(config), config.warmup.steps
    state.load(read_state(folder)["caller"], str(folder))
    check_warmup(folder, wanted=warmup, done=state.warmup_step, rl_steps=state.step)
    if state.step and warmup and config.objective.kl_coef:
        stands(reference_of(space.folder), warmup_steps=warmup, rl_steps=state.step)


def anneal_clock(config: Config) -> Clock:
    """The clock of ``objective.schedule``."""
    schedule = config.objective.schedule
    if schedule.kind == AdaptiveClock.kind:
        return AdaptiveClock(schedule.success_target, schedule.smoothing)
    if schedule.horizon is not None:
        return StepClock(schedule.horizon)
    assert config.trainer.steps is not None, "the tasks were not counted"  # training/open_run.py: _settle
    return StepClock(max(config.trainer.steps, 1), given=False)
