"""The clipped surrogate (eq. 4-5 and 7-8: one function, the context decides which) and the sampler correction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

#: (log-probs, old log-probs, advantages), [S] each -> ([S] loss, [S] bool: the token has no gradient). Not reduced, not
#: weighted. All three are 0 on tokens without a weight.
Surrogate = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

#: bound on log-ratios before exp, in nats; exp(20) = 4.9e8 is far outside every clip range and far inside float32
MAX_LOG_RATIO = 20.0


def log_ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """[S] numerator - denominator in nats, clamped to +-``MAX_LOG_RATIO``.

    A wild token so gives a large finite ratio and, outside the bound, no gradient, where exp would overflow to Inf. NaN
    stays NaN.
    """
    return (numerator - denominator).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


@dataclass(frozen=True)
class Clip:
    """The range of ratios inside which a token has a gradient.

    Attributes:
        low, high: epsilon on either side, 0 <= low <= 1, high >= 0; both None = no clipping (LUFFY's public code).
        dual: c > 1: a token of negative advantage loses at most c |A|, however far its ratio has grown (dual clip,
            arXiv 1912.09729; 3.0 in verl). None = off.

    Raises:
        ValueError: the range is not a range around 1, one side alone is given, or ``dual`` is not above 1 + high.
    """

    low: float | None = 0.2
    high: float | None = 0.2
    dual: float | None = None

    def __post_init__(self) -> None:
        if (self.low is None) != (self.high is None):
            raise ValueError(f"clip range [1 - {self.low}, 1 + {self.high}] has one side only")
        if self.low is not None and self.high is not None and not (0.0 <= self.low <= 1.0 and self.high >= 0.0):
            raise ValueError(f"clip range [1 - {self.low}, 1 + {self.high}] is not a range of ratios around 1")
        if self.dual is not None and not self.dual > 1.0 + (self.high or 0.0):
            raise ValueError(
                f"dual clip {self.dual} must be above the clip range's upper end, {1.0 + (self.high or 0.0)}"
            )

    def __call__(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
        """See :func:`clipped_surrogate`."""
        return clipped_surrogate(logprobs, old_logprobs, advantages, self)


def clipped_surrogate(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip: Clip) -> tuple[Tensor, Tensor]:
    """Per-token loss -min(r A, clip(r, 1 - low, 1 + high) A), r = exp(logprobs - old_logprobs). With a dual clip c and
    A < 0 it is at most -c A: the loss is min(max(-r A, -clip(r) A), -c A).

    No reduction and no denominator: the caller weighs the tokens (:mod:`pact_nemo.objective.weights`).

    Args:
        logprobs: [S] natural-log probabilities of the policy being trained, with gradient.
        old_logprobs: [S] the same under pi_old in the same context; no gradient flows into them. See :func:`log_ratio`
            for extreme values.
        advantages: [S].
        clip: range of ratios.

    Returns:
        ([S] loss, [S] bool: a clipped branch was taken, so the token has no gradient).
    """
    ratio = log_ratio(logprobs, old_logprobs.detach()).exp()
    gain = ratio * advantages
    stopped = torch.zeros_like(gain, dtype=torch.bool)
    if clip.low is not None and clip.high is not None:
        clipped = ratio.clamp(1.0 - clip.low, 1.0 + clip.high) * advantages
        stopped = (clipped < gain).detach()
        gain = torch.minimum(gain, clipped)
    if clip.dual is not None:
        floor = clip.dual * advantages
        beyond = (advantages < 0) & (gain < floor).detach()
        stopped = stopped | beyond
        gain = torch.where(beyond, floor, gain)
    return -gain, stopped


def truncated_importance(old_logprobs: Tensor, sampler_logprobs: Tensor, cap: float) -> Tensor:
    """[S] min(pi_old / pi_sampler, cap) of sampled tokens, detached.

    The correction for a rollout engine whose log-probs differ from the trainer's (precision, kernels) for the same
    weights.

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
