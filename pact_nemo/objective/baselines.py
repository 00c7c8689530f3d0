"""What the compared methods add to GRPO: CHORD's mixing and token weighting, LUFFY's shaped off-policy term."""

from __future__ import annotations

import math

from torch import Tensor

MU_SCHEDULES = ("cosine", "linear")


def chord_mu(step: int, start: float, end: float, decay_steps: int, schedule: str = "cosine") -> float:
    """CHORD's global weight of the SFT term at a step (counted from 0): from ``start`` to ``end`` over ``decay_steps``,
    then constant.

    ``cosine``: end + (start - end) (1 + cos(pi step / decay_steps)) / 2, as in its public code; ``linear``: a straight
    line.

    Raises:
        ValueError: a weight outside [0, 1], ``decay_steps`` below 1 or another schedule.
    """
    if not (0.0 <= start <= 1.0 and 0.0 <= end <= 1.0) or decay_steps < 1:
        raise ValueError(
            f"mu goes from {start} to {end} over {decay_steps} steps: weights are in [0, 1] and steps at least 1"
        )
    if schedule not in MU_SCHEDULES:
        raise ValueError(f"mu schedule {schedule!r} is none of {', '.join(MU_SCHEDULES)}")
    done = min(step / decay_steps, 1.0)
    left = 0.5 * (1.0 + math.cos(math.pi * done)) if schedule == "cosine" else 1.0 - done
    return end + (start - end) * left


def phi_weighted_nll(logprobs: Tensor, weights: Tensor) -> Tensor:
    """[S] -w_n phi_n log p_n with phi = p (1 - p), no gradient through phi: what the policy is sure of, either way,
    teaches little (CHORD-phi).

    A token of weight 0 has value and gradient exactly 0. Log-probs in nats; denominators are inside the weights.
    """
    used = logprobs.masked_fill(weights == 0, 0.0)
    probability = used.detach().exp()
    return -weights * probability * (1.0 - probability) * used


def shaped_off_policy(logprobs: Tensor, advantages: Tensor, weights: Tensor, gamma: float) -> Tensor:
    """[S] -w_n f(p_n) A_n with f(p) = p / (p + gamma): LUFFY's off-policy surrogate with policy shaping, not clipped.

    The expert's own probability is taken as 1, so the ratio is p; f lifts the gradient of tokens that the policy finds
    unlikely. A token of weight 0 has value and gradient exactly 0.

    Raises:
        ValueError: ``gamma`` is not positive.
    """
    if gamma <= 0.0:
        raise ValueError(f"shaping gamma={gamma} must be > 0")
    probability = logprobs.masked_fill(weights == 0, 0.0).exp()
    return -weights * advantages * probability / (probability + gamma)
