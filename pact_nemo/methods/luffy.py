"""LUFFY (arXiv 2504.14945): the trace is one more, off-policy, sample of its group, with policy shaping."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor

from pact_nemo.config.ranges import Ranges
from pact_nemo.methods.base import Method
from pact_nemo.objective.loss import Term

if TYPE_CHECKING:
    from pact_nemo.config.schema import ObjectiveConfig


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


@dataclass
class LuffyConfig:
    """Settings of LUFFY."""

    shaping: float = 0.1  #: gamma of f(p) = p / (p + gamma), > 0

    ranges: ClassVar[Ranges] = {"shaping": "> 0"}


class Luffy(Method):
    """K rollouts and the trace make a group of K + 1."""

    source: ClassVar[str] = "arXiv 2504.14945"
    Config: ClassVar[type] = LuffyConfig
    defaults: ClassVar[Mapping[str, object]] = {
        "kl_coef": 0.0,
        "aggregation": "constant-length",
        "advantage_std": False,
        "clip": False,
    }
    uses_traces: ClassVar[bool] = True
    trace_is_sample: ClassVar[bool] = True
    sft_settings: ClassVar[tuple[str, ...]] = ()

    def __init__(self, objective: ObjectiveConfig, config: Any = None):
        super().__init__(objective, config)
        gamma = self.config.shaping
        self.terms = (
            Term(
                "off",
                "w_off",
                lambda logprobs, streams, w: shaped_off_policy(logprobs, streams["advantages"], w, gamma),
            ),
        )

    def trace_streams(
        self, component: np.ndarray, weights: np.ndarray, *, sample_weight: float, advantage: float
    ) -> dict[str, np.ndarray | float]:
        """Every token of the sample has its advantage and its weight."""
        return {"w_off": sample_weight, "advantages": advantage}
