"""Adaptive annealing (beyond the paper): the schedule moves on as the policy learns, not as steps go by.

Progress rises with the success rate of rollouts, which are drawn before a prompt is trained on (in the first epoch
every prompt is new to the policy), and with the closing of the privilege gap, log pi(tau | x, h*) - log pi(tau | x): a
policy that writes the same with and without the trace needs it no more. Prefix level, lambda_a and the anchoring
probability are functions of progress.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from pact_nemo.objective.schedules import check_kind


@dataclass
class AdaptiveClock:
    """How far the policy has come, in [0, 1]; never falls, so that what was annealed away stays away. A clock of
    :class:`pact_nemo.objective.schedules.TraceSchedule`.

    Attributes:
        success_target: success rate at which the trace has done its work.
        smoothing: weight of the past in the exponential means of success and gap, in [0, 1).
        value: max over steps of the mean of (success / target) and (1 - gap / largest gap), both clipped to [0, 1]; of
            the first alone until a gap was seen. Gaps are magnitudes, in nats per token.
    """

    success_target: float = 0.6
    smoothing: float = 0.7
    value: float = 0.0
    success: float | None = None
    gap: float | None = None
    first_gap: float | None = None
    kind: ClassVar[str] = "adaptive"
    adapts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0.0 < self.success_target <= 1.0 or not 0.0 <= self.smoothing < 1.0:
            raise ValueError(
                f"success_target={self.success_target} must be in (0, 1] and smoothing={self.smoothing} in [0, 1)"
            )

    def observe(self, success: float | None, gap: float | None) -> None:
        """Take in one step's success rate and privilege gap, nats per token over all rollouts (either may be absent).
        Over rollouts drawn under the prompt its expectation is minus a KL divergence, 0 where the trace changes
        nothing.
        """
        if success is not None:
            self.success = (
                success if self.success is None else self.smoothing * self.success + (1 - self.smoothing) * success
            )
        if gap is not None:
            self.gap = abs(gap) if self.gap is None else self.smoothing * self.gap + (1 - self.smoothing) * abs(gap)
            self.first_gap = self.gap if self.first_gap is None else max(self.first_gap, self.gap)
        parts = []
        if self.success is not None:
            parts.append(min(self.success / self.success_target, 1.0))
        if self.gap is not None and self.first_gap:
            parts.append(1.0 - self.gap / self.first_gap)
        if parts:
            self.value = max(self.value, min(sum(parts) / len(parts), 1.0))

    def progress(self, step: int) -> float:
        """Progress now; ``step`` is not looked at."""
        return self.value

    def state(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "value": self.value,
            "success": self.success,
            "gap": self.gap,
            "first_gap": self.first_gap,
        }

    def load(self, state: dict[str, Any]) -> None:
        check_kind(state, self.kind)
        self.value, self.success = state["value"], state["success"]
        self.gap, self.first_gap = state["gap"], state["first_gap"]


def between(start: float, end: float | None, progress: float) -> float:
    """``start`` without an ``end``, else the point ``progress`` of the way from start to end; both are
    probabilities.
    """
    return start if end is None else start + (end - start) * progress
