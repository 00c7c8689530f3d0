"""PACT (arXiv 2606.16215): matching rewards, the ratio under [x; h*] where the gate is open, and the annealed trace."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from pact_nemo.environments.base import Task
from pact_nemo.methods.base import Method
from pact_nemo.methods.rewards import REWARD_SETTINGS, matching_rewards
from pact_nemo.objective.schedules import TraceSchedule
from pact_nemo.rollouts.types import Rollout

if TYPE_CHECKING:
    from pact_nemo.traces.spans import TraceTokens


class Pact(Method):
    """Algorithm 1 of the paper."""

    source: ClassVar[str] = "arXiv 2606.16215"
    uses_traces: ClassVar[bool] = True
    conditions_on_trace: ClassVar[bool] = True
    anneals: ClassVar[bool] = True
    turn_level: ClassVar[bool] = True
    reward_settings: ClassVar[tuple[str, ...]] = REWARD_SETTINGS

    def turn_rewards(self, task: Task, rollout: Rollout) -> np.ndarray:
        """[T] matched calls and the outcome (eq. 24-28)."""
        return matching_rewards(task, rollout, self.objective)

    def trace_mask(self, trace: TraceTokens, schedule: TraceSchedule, step: int) -> np.ndarray:
        """[H] the component-aware, annealed weights (eq. 9-11)."""
        component, level = np.asarray(trace.component), np.asarray(trace.segment_level)
        return schedule.weights(component, level, np.asarray(trace.turn), step)
