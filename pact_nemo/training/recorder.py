"""What a run says of itself, step by step. Rank 0 writes; every rank counts seconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pact_nemo.runtime.collective import rank
from pact_nemo.tracking.base import Trackers
from pact_nemo.tracking.terminal import RunProgress
from pact_nemo.training.state import RunState


@dataclass
class Recorder:
    """Records of steps and evaluations, for the trackers and on the terminal.

    Attributes:
        trackers: opened on rank 0 before the first step.
    """

    state: RunState
    progress: RunProgress
    trackers: Trackers | None = None

    def step(self, stage: str, record: dict[str, Any]) -> None:
        """Write down a finished step.

        Args:
            stage: ``warmup`` or ``rl``.
            record: its numbers; ``time/<phase>`` are seconds.
        """
        state = self.state
        finished = state.step if stage == "rl" else state.warmup_step
        if rank() == 0:
            assert self.trackers is not None
            row = {"step": finished, "stage": stage, **record}
            self.trackers.append(row)
            self.progress.step_line(row)
        named = self.spend(record)
        if stage == "warmup":  # what of it has no name of its own
            state.spend("warmup", record["time/total"] - named)

    def spend(self, record: dict[str, Any]) -> float:
        """Count the seconds by phase, of a step or of moves between trainer and engines that belong to none. Returns
        their sum.
        """
        phases = {key: value for key, value in record.items() if key.startswith("time/") and key != "time/total"}
        for key, value in phases.items():
            self.state.spend(key.removeprefix("time/"), value)
        return sum(phases.values())

    def evaluation(self, name: str, score: dict[str, Any], seconds: float) -> None:
        """Keep a held-out evaluation's score."""
        self.state.scores[name] = score
        if self.trackers is not None:
            self.trackers.evaluation(name, score)
        self.state.spend("evaluation", seconds)
