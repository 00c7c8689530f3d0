"""Per-token estimates of KL(pi || reference) from sampled tokens (Schulman's k1, k2, k3)."""

from __future__ import annotations

import torch
from torch import Tensor

from pact_nemo.objective.surrogate import MAX_LOG_RATIO


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k3") -> Tensor:
    """[S] estimate in nats, d = log ref - log pi.

    ``k1``: -d; unbiased, may be negative, and its gradient is 0 in expectation, so it measures and doesn't train.
    ``k2``: d^2 / 2; biased, but its gradient is that of the KL in expectation.
    ``k3``: exp(d) - d - 1; unbiased and never negative. d is cut at ``MAX_LOG_RATIO`` from above, where exp would
    overflow: a token that the policy finds e^20 times less likely than the reference has a large finite value and no
    gradient. Below 0 nothing is cut.

    Args:
        logprobs: [S] natural-log probabilities under the policy, with gradient.
        ref_logprobs: [S] under the reference; no gradient flows into them.

    Raises:
        ValueError: another estimator.
    """
    difference = ref_logprobs.detach() - logprobs
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return 0.5 * difference.square()
    if estimator == "k3":
        difference = difference.clamp(max=MAX_LOG_RATIO)
        return torch.expm1(difference) - difference
    raise ValueError(f"KL estimator {estimator!r} is none of k1, k2, k3")
