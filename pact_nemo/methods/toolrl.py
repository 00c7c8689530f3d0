"""ToolRL (arXiv 2504.13958): a format and correctness reward, group-normalised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pact_nemo.environments.base import Task
from pact_nemo.methods.base import Method
from pact_nemo.methods.rewards import reference_of, written_by
from pact_nemo.objective.baseline_rewards import toolrl_reward
from pact_nemo.rollouts.types import Rollout


@dataclass
class ToolRLConfig:
    """Settings of ToolRL."""

    strict: bool = True  #: one unreadable call gives the lowest correctness reward


class ToolRL(Method):
    """One reward per rollout, on its last turn."""

    source: ClassVar[str] = "arXiv 2504.13958: format and correctness reward, group-normalised"
    Config: ClassVar[type] = ToolRLConfig
    defaults: ClassVar[Mapping[str, object]] = {"aggregation": "token-mean", "matching": "greedy"}
    reward_settings: ClassVar[tuple[str, ...]] = ("matching",)

    def turn_rewards(self, task: Task, rollout: Rollout) -> np.ndarray:
        """[T] the rollout's reward on its last turn, 0 elsewhere."""
        rewards = np.zeros(len(rollout.turns))
        if not rollout.turns:
            return rewards
        written, reference = written_by(task, rollout), reference_of(task)
        readable = not any(turn.call_errors for turn in rollout.turns)
        rewards[-1] = toolrl_reward(
            written,
            reference,
            well_formed=rollout.status == "ok" and readable,
            readable=readable,
            method=self.objective.matching,
            strict=self.config.strict,
        )
        return rewards
