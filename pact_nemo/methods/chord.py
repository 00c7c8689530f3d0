"""CHORD (arXiv 2508.11408): outcome-reward GRPO mixed with SFT on every trace. mu weighs the SFT term, 1 - mu the RL
terms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor

from pact_nemo.config.ranges import Ranges
from pact_nemo.methods.base import Coefficients, Method
from pact_nemo.objective.loss import Term

if TYPE_CHECKING:
    from pact_nemo.config.schema import ObjectiveConfig

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
        raise ValueError(f"mu goes from {start} to {end} over {decay_steps} steps: weights are in [0, 1], steps >= 1")
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


@dataclass
class ChordConfig:
    """Settings of CHORD-mu."""

    mu_start: float = 0.9  #: weight of the SFT term at the first step, in [0, 1]
    mu_end: float = 0.05  #: after ``mu_decay_steps``
    mu_decay_steps: int = 12  #: steps from the first weight to the last
    mu_schedule: str = "cosine"  #: how mu goes down: "cosine" or "linear"

    ranges: ClassVar[Ranges] = {
        "mu_start": "in [0, 1]",
        "mu_end": "in [0, 1]",
        "mu_decay_steps": ">= 1",
    }

    def __post_init__(self) -> None:
        chord_mu(0, self.mu_start, self.mu_end, self.mu_decay_steps, self.mu_schedule)


@dataclass
class ChordPhiConfig(ChordConfig):
    """Settings of CHORD-phi: mu stays."""

    mu_start: float = 0.1
    mu_end: float = 0.1


class Chord(Method):
    """CHORD-mu."""

    source: ClassVar[str] = "arXiv 2508.11408, CHORD-mu"
    Config: ClassVar[type] = ChordConfig
    defaults: ClassVar[Mapping[str, object]] = {
        "kl_coef": 0.0,
        "aggregation": "token-mean",
        "sft_aggregation": "token-mean",
    }
    uses_traces: ClassVar[bool] = True
    sft_settings: ClassVar[tuple[str, ...]] = ("method_config.mu_start", "method_config.mu_end")

    def coefficients(self, step: int) -> Coefficients:
        """1 - mu and mu."""
        own = self.config
        mu = chord_mu(step, own.mu_start, own.mu_end, own.mu_decay_steps, own.mu_schedule)
        return Coefficients(rl=1.0 - mu, sft=mu)


class ChordPhi(Chord):
    """CHORD-phi: the SFT tokens weighed by p (1 - p)."""

    source: ClassVar[str] = "arXiv 2508.11408, CHORD-phi"
    Config: ClassVar[type] = ChordPhiConfig

    def __init__(self, objective: ObjectiveConfig, config: Any = None):
        super().__init__(objective, config)
        self.terms = (Term("sft_phi", "w_sft_phi", lambda logprobs, streams, w: phi_weighted_nll(logprobs, w)),)

    def trace_streams(
        self, component: np.ndarray, weights: np.ndarray, *, sample_weight: float, advantage: float
    ) -> dict[str, np.ndarray | float]:
        """All tokens in the one term."""
        return {"w_sft_phi": weights}
