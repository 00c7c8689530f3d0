"""Cross-entropy of the expert trace under the prompt alone (eq. 9)."""

from __future__ import annotations

from torch import Tensor


def token_nll(logprobs: Tensor, weights: Tensor) -> Tensor:
    """[S] -w_n log pi(h*_n | x, h*_<n); their sum is the SFT term.

    Args:
        logprobs: [S] natural-log probabilities with gradient.
        weights: [S] w_n = beta m_n(s) / (Z |B|) (:func:`pact_nemo.objective.weights.sft_weights`): the denominator is
            inside.

    A token of weight 0 has value and gradient exactly 0, also where its log-prob is -Inf or NaN (0 * Inf would be NaN).
    """
    return -weights * logprobs.masked_fill(weights == 0, 0.0)
