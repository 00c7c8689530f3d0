"""Trajectory and turn-level advantages (eq. 29-32)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Advantages:
    """Advantages of one prompt's K rollouts.

    Attributes:
        trajectory: [K] A^g.
        turn: per rollout [T_k], A^l.
        combined: per rollout [T_k], what every policy token of turn t gets.
    """

    trajectory: np.ndarray
    turn: list[np.ndarray]
    combined: list[np.ndarray]


@dataclass(frozen=True)
class Normalisation:
    """How a group's values become advantages: (v - mean) / (max(std, floor) + eps).

    Attributes:
        eps: added to the standard deviation.
        ddof: 1 (sample standard deviation, denominator K - 1) is what verl's GRPO and MatchTIR's public code compute
            with ``torch.std``; 0 is the population's (denominator K).
        std_floor: a standard deviation below it is taken as this much. Values that differ by next to nothing then give
            advantages of next to nothing, in the same order, where dividing by their own deviation would blow the
            difference up to about 1. 0 = no floor.
        divide: False: v - mean alone, in units of the reward (LUFFY's public code, Dr. GRPO).

    Raises:
        ValueError: ``ddof`` is neither 0 nor 1, or ``std_floor`` is negative.
    """

    eps: float = 1e-6
    ddof: int = 1
    std_floor: float = 0.0
    divide: bool = True

    def __post_init__(self) -> None:
        if self.ddof not in (0, 1):
            raise ValueError(f"ddof={self.ddof} is neither 0 (population) nor 1 (sample)")
        if not self.std_floor >= 0.0:
            raise ValueError(f"std_floor={self.std_floor} must be >= 0")

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """[K] advantages; exactly 0 for fewer than two values or for values that are all the same."""
        if len(values) < 2 or np.all(values == values[0]):
            return np.zeros(len(values))
        centred = values - values.mean()
        return centred / (max(values.std(ddof=self.ddof), self.std_floor) + self.eps) if self.divide else centred


def returns_to_go(rewards: np.ndarray, gamma: float) -> np.ndarray:
    """[T] R^l_t = sum over u >= t of gamma^(u-t) r_u."""
    out = np.zeros(len(rewards))
    running = 0.0
    for t in range(len(rewards) - 1, -1, -1):
        running = rewards[t] + gamma * running
        out[t] = running
    return out


def group_advantages(
    rewards: Sequence[np.ndarray],
    *,
    gamma: float = 0.9,
    normalise: Normalisation = Normalisation(),  # noqa: B008 - frozen
    turn_level: bool = True,
    combine: str = "sum",
    mask: Sequence[bool] | None = None,
) -> Advantages:
    """Advantages of the K rollouts of one prompt.

    Args:
        rewards: per rollout [T_k] turn rewards.
        gamma: discount of the turn-level return.
        normalise: of returns over the group, and of returns-to-go over the rollouts that reach a turn.
        turn_level: False leaves A^l out (A^l = 0).
        combine: ``sum`` A^g + A^l (eq. 32) or ``mean`` of the two (MatchTIR's public code); A^g alone is its own mean.
        mask: False for rollouts that failed through no fault of the policy: left out of every statistic, advantage 0.

    The turn-level normalisation at turn t is over the unmasked rollouts that reach turn t; a turn reached by one
    rollout gets 0, and a prompt with one unmasked rollout has no advantages at all.

    Raises:
        ValueError: ``combine`` is neither, ``mask`` has another length, or a reward is not finite.
    """
    if combine not in ("sum", "mean"):
        raise ValueError(f"combine={combine!r} is neither 'sum' nor 'mean'")
    if mask is not None and len(mask) != len(rewards):
        raise ValueError(f"mask has {len(mask)} entries for {len(rewards)} rollouts")
    if any(not np.all(np.isfinite(r)) for r in rewards):
        raise ValueError("a turn reward is not finite")
    valid = [k for k in range(len(rewards)) if mask is None or mask[k]]
    trajectory = np.zeros(len(rewards))
    trajectory[valid] = normalise(np.array([float(rewards[k].sum()) for k in valid]))
    turn = [np.zeros(len(r)) for r in rewards]
    if turn_level:
        to_go = {k: returns_to_go(rewards[k], gamma) for k in valid}
        for t in range(max((len(rewards[k]) for k in valid), default=0)):
            reached = [k for k in valid if len(rewards[k]) > t]
            for k, value in zip(reached, normalise(np.array([to_go[k][t] for k in reached])), strict=True):
                turn[k][t] = value
    scale = 0.5 if combine == "mean" and turn_level else 1.0
    combined = [np.zeros(len(r)) for r in rewards]
    for k in valid:
        combined[k] = scale * (trajectory[k] + turn[k])
    return Advantages(trajectory, turn, combined)
