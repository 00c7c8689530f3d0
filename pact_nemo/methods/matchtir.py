"""MatchTIR (arXiv 2601.10712): PACT's rewards and advantages without a trace. The row L_RL^x of PACT's table 2."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from pact_nemo.environments.base import Task
from pact_nemo.methods.base import Method
from pact_nemo.methods.rewards import REWARD_SETTINGS, matching_rewards
from pact_nemo.rollouts.types import Rollout


class MatchTIR(Method):
    """Turn-level rewards of matched calls, trajectory and turn-level advantages."""

    source: ClassVar[str] = "arXiv 2601.10712; the row L_RL^x of PACT's table 2"
    turn_level: ClassVar[bool] = True
    reward_settings: ClassVar[tuple[str, ...]] = REWARD_SETTINGS

    def turn_rewards(self, task: Task, rollout: Rollout) -> np.ndarray:
        """[T] matched calls and the outcome (eq. 24-28)."""
        return matching_rewards(task, rollout, self.objective)
