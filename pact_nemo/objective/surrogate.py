"""The clipped surrogate (eq. 4-5 and 7-8: one function, the context decides which) and the sampler correction."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0  #: bound on log-ratios before exp, in nats; exp(20) = 4.9e8 is far outside every clip range and far inside float32


def log_ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """[S] numerator - denominator in nats, clamped to +-``MAX_LOG_RATIO``.

    A wild token so gives a large finite ratio and, outside the bound, no gradient, where exp would overflow to Inf. NaN stays NaN.
    """
    return (numerator - denominator).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def clipped_surrogate(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """Per-token loss -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), r = exp(logprobs - old_logprobs).

    No reduction and no denominator: the caller weighs the tokens (:mod:`pact_nemo.objective.weights`).

    Args:
        logprobs: [S] natural-log probabilities of the policy being trained, with gradient.
        old_logprobs: [S] the same under pi_old in the same context; no gradient flows into them. See :func:`log_ratio` for extreme values.
        advantages: [S].
        clip_low, clip_high: epsilon on either side; 0 <= clip_low <= 1, clip_high >= 0.

    Returns:
        ([S] loss, [S] bool: the clipped branch was taken, so the token has no gradient).

    Raises:
        ValueError: the clip range is not a range around 1.
    """
    if not (0.0 <= clip_low <= 1.0 and clip_high >= 0.0):
        raise ValueError(f"clip range [1 - {clip_low}, 1 + {clip_high}] is not a range of ratios around 1")
    ratio = log_ratio(logprobs, old_logprobs.detach()).exp()
    plain = ratio * advantages
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages
    return -torch.minimum(plain, clipped), (clipped < plain).detach()


def truncated_importance(old_logprobs: Tensor, sampler_logprobs: Tensor, cap: float) -> Tensor:
    """[S] min(pi_old / pi_sampler, cap) of sampled tokens, detached.

    The correction for a rollout engine whose log-probs differ from the trainer's (precision, kernels) for the same weights.

    Raises:
        ValueError: ``cap`` is not positive.
        FloatingPointError: a weight is NaN.
    """
    if cap <= 0.0:
        raise ValueError(f"importance cap is {cap}; it must be > 0")
    weights = log_ratio(old_logprobs.detach(), sampler_logprobs.detach()).exp().clamp(max=cap)
    if not bool(torch.isfinite(weights).all()):
        raise FloatingPointError("an importance weight is NaN: pi_old or sampler log-probs are not finite")
    return weights
