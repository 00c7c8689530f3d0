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


def normalise(values: np.ndarray, eps: float, ddof: int = 1) -> np.ndarray:
    """[K] (v - mean) / (std + eps); exactly 0 for fewer than two values or for values that are all the same.

    ``ddof=1`` (sample standard deviation, denominator K - 1) is what verl's GRPO and MatchTIR's public code compute with ``torch.std``;
    ``ddof=0`` is the population's (denominator K).
    """
    if len(values) < 2 or np.all(values == values[0]):
        return np.zeros(len(values))
    return (values - values.mean()) / (values.std(ddof=ddof) + eps)


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
    eps: float = 1e-6,
    turn_level: bool = True,
    combine: str = "sum",
    mask: Sequence[bool] | None = None,
    ddof: int = 1,
) -> Advantages:
    """Advantages of the K rollouts of one prompt.

    Args:
        rewards: per rollout [T_k] turn rewards.
        gamma: discount of the turn-level return.
        eps: added to each standard deviation.
        turn_level: False leaves A^l out (A^l = 0).
        combine: ``sum`` A^g + A^l (eq. 32) or ``mean`` of the two (MatchTIR's public code).
        mask: False for rollouts that failed through no fault of the policy: left out of every statistic, advantage 0.
        ddof: see :func:`normalise`.

    The turn-level normalisation at turn t is over the unmasked rollouts that reach turn t; a turn reached by one rollout gets 0, and a
    prompt with one unmasked rollout has no advantages at all.

    Raises:
        ValueError: ``combine`` is neither, ``ddof`` is neither 0 nor 1, ``mask`` has another length, or a reward is not finite.
    """
    if combine not in ("sum", "mean"):
        raise ValueError(f"combine={combine!r} is neither 'sum' nor 'mean'")
    if ddof not in (0, 1):
        raise ValueError(f"ddof={ddof} is neither 0 (population) nor 1 (sample)")
    if mask is not None and len(mask) != len(rewards):
        raise ValueError(f"mask has {len(mask)} entries for {len(rewards)} rollouts")
    if any(not np.all(np.isfinite(r)) for r in rewards):
        raise ValueError("a turn reward is not finite")
    valid = [k for k in range(len(rewards)) if mask is None or mask[k]]
    trajectory = np.zeros(len(rewards))
    trajectory[valid] = normalise(np.array([float(rewards[k].sum()) for k in valid]), eps, ddof)
    turn = [np.zeros(len(r)) for r in rewards]
    if turn_level:
        to_go = {k: returns_to_go(rewards[k], gamma) for k in valid}
        for t in range(max((len(rewards[k]) for k in valid), default=0)):
            reached = [k for k in valid if len(rewards[k]) > t]
            for k, value in zip(reached, normalise(np.array([to_go[k][t] for k in reached]), eps, ddof), strict=True):
                turn[k][t] = value
    scale = 1.0 if combine == "sum" else 0.5
    combined = [np.zeros(len(r)) for r in rewards]
    for k in valid:
        combined[k] = scale * (trajectory[k] + turn[k])
    return Advantages(trajectory, turn, combined)
