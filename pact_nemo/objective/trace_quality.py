"""Trace-quality weighting (beyond the paper): a trace that the policy's own rollouts consistently beat loses its say.

One number per task, beta_SFT's factor for its trace: 1 - b, with b the exponential mean of the share of rollouts that
beat the trace. What is better: a higher score, or the same score with fewer calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


def beats(score: float, calls: int, trace_score: float, trace_calls: int) -> bool:
    """Whether a rollout is better than the trace: a higher outcome score, or the same with fewer calls."""
    return score > trace_score or (score == trace_score and calls < trace_calls)


@dataclass
class TraceQuality:
    """How often each task's trace was beaten.

    Attributes:
        smoothing: weight of the past, in [0, 1).
        beaten: task id -> b in [0, 1]; absent where the task was not visited yet (b = 0).
    """

    smoothing: float = 0.5
    beaten: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0.0 <= self.smoothing < 1.0:
            raise ValueError(f"smoothing={self.smoothing} must be in [0, 1)")

    def observe(self, task_id: str, wins: Sequence[bool]) -> None:
        """Take in one step's rollouts of a task: whether each beat the trace. Without rollouts nothing changes."""
        if wins:
            share = sum(wins) / len(wins)
            self.beaten[task_id] = self.smoothing * self.beaten.get(task_id, 0.0) + (1 - self.smoothing) * share

    def weight(self, task_id: str) -> float:
        """Factor of the task's trace in the SFT term, in [0, 1]."""
        return 1.0 - self.beaten.get(task_id, 0.0)
