"""Everything a run holds, put together once. The loop reads; this wires."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pact_nemo.chat.template import ChatFormat
from pact_nemo.config.schema import Config
from pact_nemo.data.dataset import Dataset
from pact_nemo.environments.base import Environment
from pact_nemo.methods.base import Method
from pact_nemo.methods.registry import make_method
from pact_nemo.objective.adaptive import between
from pact_nemo.objective.schedules import Clock, TraceSchedule
from pact_nemo.policy.policy import MegatronPolicy
from pact_nemo.runtime.interrupt import StopRequest
from pact_nemo.tracking.run_folder import Workspace
from pact_nemo.tracking.terminal import RunProgress
from pact_nemo.training.checkpointer import Checkpointer
from pact_nemo.training.generation import Generator
from pact_nemo.training.recorder import Recorder
from pact_nemo.training.served_weights import ServedWeights
from pact_nemo.training.state import RunState, new_state
from pact_nemo.training.time_sharing import TimeSharing


def trace_schedule(config: Config, clock: Clock) -> TraceSchedule:
    """Annealing as ``objective.schedule`` says it, by the given clock."""
    schedule = config.objective.schedule
    return TraceSchedule(
        reasoning=schedule.reasoning,
        call=schedule.call,
        reasoning_scale=schedule.reasoning_scale,
        fixed_level=schedule.fixed_level,
        call_start=schedule.call_start,
        call_end=schedule.call_end,
        clock=clock,
    )


@dataclass
class TrainingRun:
    """A run's parts. What is in the first block is given; what is in the second is made of it.

    Attributes:
        source: the HF folder that the run starts from.
        sharing: who has the memory of GPUs that trainer and engines share.
        boundary_ids: tokens between a trace (or its control) and a rollout behind it.
        plan: planned seconds and memory, on rank 0.
    """

    config: Config
    workspace: Workspace
    chat: ChatFormat
    environment: Environment
    dataset: Dataset
    policy: MegatronPolicy
    generator: Generator
    progress: RunProgress
    source: Path
    stop: StopRequest
    sharing: TimeSharing

    method: Method = field(init=False)
    state: RunState = field(init=False)
    schedule: TraceSchedule = field(init=False)
    boundary_ids: list[int] = field(init=False)
    weights: ServedWeights = field(init=False)
    checkpoints: Checkpointer = field(init=False)
    recorder: Recorder = field(init=False)
    plan: dict[str, Any] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        config, space, policy, progress = self.config, self.workspace, self.policy, self.progress
        self.method = make_method(config)
        self.state = new_state(config)
        self.schedule = trace_schedule(config, self.state.clock)
        nothing = config.traces.control == "none"
        self.boundary_ids = self.chat.boundary_after_nothing_ids() if nothing else self.chat.boundary_ids()
        self.weights = ServedWeights(
            config, space, policy, self.generator, self.source, self.state, progress.message, self.sharing
        )
        self.checkpoints = Checkpointer(config, space, policy, self.weights, self.state, progress, self.stop)
        self.recorder = Recorder(self.state, progress)

    @property
    def total_steps(self) -> int:
        """RL steps of the whole run."""
        assert self.config.trainer.steps is not None, "the tasks were not counted"  # training/open_run.py: _settle
        return self.config.trainer.steps

    @property
    def anchor_prob(self) -> float:
        """q of the step that is next."""
        objective = self.config.objective
        progress = self.state.clock.progress(self.state.step)
        return between(objective.anchor_prob, objective.schedule.anchor_end, progress)
