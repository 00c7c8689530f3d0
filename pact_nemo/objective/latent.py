"""Section 5's latent-trace view: log pi(tau | x) >= log p(h* | x) + log pi(tau | x, h*), as sums that add up over ranks
and prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pact_nemo.objective.components import CALL, REASONING


@dataclass(frozen=True)
class TokenSum:
    """A sum of nats over tokens; add two to merge them.

    Attributes:
        total: nats.
        count: tokens, the denominator of :attr:`mean`.
    """

    total: float = 0.0
    count: int = 0

    def __add__(self, other: TokenSum) -> TokenSum:
        return TokenSum(self.total + other.total, self.count + other.count)

    @property
    def mean(self) -> float | None:
        """Nats per token; None over no tokens (an empty set has no mean, and 0 would read as one)."""
        return self.total / self.count if self.count else None


def log_likelihood(logprobs: np.ndarray) -> TokenSum:
    """Log-likelihood of a [n] run of tokens, summed in float64: log pi(tau | x) or log pi(tau | c_h) of one rollout."""
    return TokenSum(float(np.sum(logprobs, dtype=np.float64)), len(logprobs))


def trace_log_likelihood(logprobs: np.ndarray, component: np.ndarray) -> dict[str, TokenSum]:
    """log p(h* | x) by component, ``reasoning`` and ``call``, over all tokens of that component whatever the annealing.

    Args:
        logprobs: [H] nats, under the prompt alone.
        component: [H] 0 other, 1 observation, 2 call, 3 reasoning.

    Raises:
        ValueError: the two differ in shape.
    """
    if logprobs.shape != component.shape:
        raise ValueError(f"log-probs have shape {logprobs.shape}, components {component.shape}")
    return {
        name: log_likelihood(logprobs[component == kind]) for name, kind in (("reasoning", REASONING), ("call", CALL))
    }


def privilege_gap(
    conditioned: Sequence[TokenSum], prompt_only: Sequence[TokenSum], success: Sequence[bool]
) -> dict[str, TokenSum]:
    """log pi(tau | c_h) - log pi(tau | x) over rollouts scored in both contexts, ``success`` and ``failure`` apart.

    ``.mean`` is in nats per policy token of that set of rollouts. Going to 0 on successes, the trace has been absorbed;
    growing, the policy relies on it.

    Args:
        conditioned, prompt_only: per rollout, its log-likelihood under c_h and under x.
        success: per rollout, the checker's verdict.

    Raises:
        ValueError: lengths differ, or a rollout has another number of tokens in one context than in the other.
    """
    gap = {"success": TokenSum(), "failure": TokenSum()}
    for h, x, won in zip(conditioned, prompt_only, success, strict=True):
        if h.count != x.count:
            raise ValueError(f"a rollout has {h.count} tokens under c_h and {x.count} under x")
        key = "success" if won else "failure"
        gap[key] = gap[key] + TokenSum(h.total - x.total, h.count)
    return gap
