"""What a training method is asked. The loop, the token trees and the policy know no method by name.

A method is a subclass of :class:`Method` in a file of its own. It overrides what it does otherwise. What it leaves
alone is plain GRPO: an outcome reward, group-normalised advantages and the clipped surrogate under the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor

from pact_nemo.environments.base import Task
from pact_nemo.methods.rewards import outcome_rewards
from pact_nemo.objective.advantages import Normalisation, group_advantages
from pact_nemo.objective.components import REASONING, is_taught
from pact_nemo.objective.loss import Term, batch_loss
from pact_nemo.objective.schedules import TraceSchedule
from pact_nemo.objective.surrogate import Clip
from pact_nemo.rollouts.types import Rollout

if TYPE_CHECKING:
    from pact_nemo.config.schema import ObjectiveConfig
    from pact_nemo.traces.spans import TraceTokens


@dataclass
class NoConfig:
    """Of a method without settings of its own."""


@dataclass(frozen=True)
class Coefficients:
    """Factors of a step's terms.

    Attributes:
        rl: of both surrogates.
        sft: of the weights of the trace's tokens (beta_SFT).
    """

    rl: float
    sft: float


class Method:
    """One run's method, made once from its settings. It holds no state that a step changes.

    Attributes:
        source: the paper or code that it follows.
        Config: dataclass of the method's own settings, the section ``method_config``.
        defaults: settings of ``objective`` that the method has another default for than the project.
        uses_traces: whether it reads traces at all.
        conditions_on_trace: whether un-anchored prompts' ratios are evaluated under [x; h*] (eq. 7-8).
        anneals: whether :meth:`trace_mask` goes by the schedule; ``anneal/*`` is recorded of such methods alone.
        trace_is_sample: whether the trace is one more sample of its group, with an advantage and a tempered log-prob.
        turn_level: whether the turn-level advantage (eq. 30-31) is added to the trajectory advantage.
        reward_settings: keys of ``objective`` that :meth:`turn_rewards` reads.
        trains_by_rl: False for a method that is the warm-up alone.
        sft_settings: keys of the settings that weigh the SFT term of a method that uses traces, for the report's
            advice; none where it has no such term.
        terms: terms of the loss that it has besides the surrogates, the SFT terms, the KL and the entropy term.
    """

    source: ClassVar[str] = ""
    Config: ClassVar[type] = NoConfig
    defaults: ClassVar[Mapping[str, object]] = {}
    uses_traces: ClassVar[bool] = False
    conditions_on_trace: ClassVar[bool] = False
    anneals: ClassVar[bool] = False
    trace_is_sample: ClassVar[bool] = False
    turn_level: ClassVar[bool] = False
    reward_settings: ClassVar[tuple[str, ...]] = ("outcome", "outcome_weight")
    trains_by_rl: ClassVar[bool] = True
    sft_settings: ClassVar[tuple[str, ...]] = ("objective.sft_coef",)

    def __init__(self, objective: ObjectiveConfig, config: Any = None):
        self.objective = objective
        self.config = config if config is not None else self.Config()
        self.terms: tuple[Term, ...] = ()
        low, high = (objective.clip_low, objective.clip_high) if objective.clip else (None, None)
        self.clip = Clip(low, high, objective.dual_clip)

    @property
    def trace_rl(self) -> bool:
        """Whether un-anchored prompts' ratios are evaluated under c_h in this run."""
        return self.objective.trace_rl and self.conditions_on_trace

    # ------------------------------------------------------------------------------------------ rewards and advantages

    def turn_rewards(self, task: Task, rollout: Rollout) -> np.ndarray:
        """[T] reward of each assistant turn of a rollout."""
        return outcome_rewards(task, rollout, self.objective)

    def advantages(
        self, rewards: Sequence[np.ndarray], mask: Sequence[bool], *, traced: bool
    ) -> tuple[list[np.ndarray], float]:
        """Advantages of one prompt's K rollouts.

        Args:
            rewards: per rollout [T_k].
            mask: False for rollouts that failed through no fault of the policy.
            traced: whether the prompt has a trace.

        Returns:
            per rollout [T_k], and the advantage of the trace as a sample of its group (0 where it is none).
        """
        objective, joins = self.objective, traced and self.trace_is_sample
        # the expert's solution is verified, so its outcome is 1
        expert = [np.array([objective.outcome_weight])] if joins else []
        result = group_advantages(
            [*rewards, *expert],
            gamma=objective.gamma,
            normalise=Normalisation(
                objective.advantage_eps, std_floor=objective.advantage_std_floor, divide=objective.advantage_std
            ),
            turn_level=objective.turn_level and self.turn_level,
            combine=objective.combine,
            mask=[*mask, *[True] * joins],
        )
        return result.combined[: len(rewards)], float(result.combined[-1][0]) if joins else 0.0

    # ------------------------------------------------------------------------------------------------- the trace's term

    def coefficients(self, step: int) -> Coefficients:
        """Factors of the terms at a step (counted from 0)."""
        return Coefficients(rl=1.0, sft=self.objective.sft_coef)

    def trace_mask(self, trace: TraceTokens, schedule: TraceSchedule, step: int) -> np.ndarray:
        """[H] m_n(s) >= 0: how strongly each token of h* is taught. Here: reasoning and calls alike, at every step."""
        return is_taught(np.asarray(trace.component)).astype(np.float64)

    def trace_streams(
        self, component: np.ndarray, weights: np.ndarray, *, sample_weight: float, advantage: float
    ) -> dict[str, np.ndarray | float]:
        """Streams of the trace's n scored tokens, by name; one that is left out is 0 there.

        Args:
            component: [n] component ids.
            weights: [n] SFT weights, denominators and coefficient included.
            sample_weight: weight of a token of the trace as a sample of its group (``trace_is_sample``).
            advantage: of the trace as that sample.
        """
        reasoning = component == REASONING
        return {
            "w_sft_reasoning": np.where(reasoning, weights, 0.0),
            "w_sft_call": np.where(reasoning, 0.0, weights),
        }

    # --------------------------------------------------------------------------------------------------------- the loss

    def surrogate(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
        """Per-token loss of the policy's own tokens, and where it has no gradient; see
        :func:`pact_nemo.objective.surrogate.clipped_surrogate`.

        Args:
            logprobs, old_logprobs, advantages: [S]; 0 on tokens without a weight, which add nothing.

        Returns:
            ([S] loss, not reduced and not weighted; [S] bool).
        """
        return self.clip(logprobs, old_logprobs, advantages)

    def loss(self, logprobs: Tensor, streams: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the given tokens and its metrics; see :func:`pact_nemo.objective.loss.batch_loss`."""
        return batch_loss(logprobs, streams, surrogate=self.surrogate, terms=self.terms)
