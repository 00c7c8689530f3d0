"""What a run says of itself, step by step. Rank 0 writes; every rank counts seconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pact_nemo.runtime.collective import rank
from pact_nemo.tracking.metrics_log import MetricsLog
from pact_nemo.tracking.terminal import RunProgress
from pact_nemo.training.state import RunState


@dataclass
class Recorder:
    """Records of steps, in metrics.jsonl, TensorBoard and on the terminal.

    Attributes:
        metrics: opened on rank 0 before the first step.
    """

    state: RunState
    progress: RunProgress
    metrics: MetricsLog | None = None

    def step(self, stage: str, record: dict[str, Any]) -> None:
        """Write down a finished step.

        Args:
            stage: ``warmup`` or ``rl``.
            record: its numbers; ``time/<phase>`` are seconds.
        """
        state = self.state
        finished = state.step if stage == "rl" else state.warmup_step
        if rank() == 0:
            assert self.metrics is not None
            row = {"step": finished, "stage": stage, **record}
            self.metrics.append(row)
            self.progress.step_line(row)
        for key, value in record.items():
            if key.startswith("time/") and key != "time/total":
                state.spend(key.removeprefix("time/"), value)
        if stage == "warmup":
            state.spend("warmup", record["time/total"])
