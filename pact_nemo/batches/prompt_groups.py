"""Where rollouts and traces meet: a prompt, its K rollouts, their advantages, the gate and the trace.

This runs after generation has ended, so nothing here can reach the rollout server.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pact_nemo.environments.base import Task
from pact_nemo.errors import DataError, NumericsError
from pact_nemo.methods.base import Method
from pact_nemo.objective.gate import anchored
from pact_nemo.rollouts.types import Rollout
from pact_nemo.traces.spans import TraceTokens


@dataclass(frozen=True)
class Gate:
    """The anchoring gate of a step (eq. 13): Bernoulli(``anchor_prob``) by (seed, step, prompt)."""

    seed: int
    step: int
    anchor_prob: float

    def closes(self, task_id: str) -> bool:
        """z: whether this prompt is trained on under the prompt alone."""
        return anchored(self.seed, self.step, task_id, self.anchor_prob)


@dataclass(frozen=True)
class TraceUse:
    """A prompt's trace in a step.

    Attributes:
        tokens: h*, or None where no verified trace exists.
        weight: factor of the trace's SFT weights, in [0, 1].
        control: what RL is conditioned on in place of h* (``traces.control``); None: on h*.
    """

    tokens: TraceTokens | None = None
    weight: float = 1.0
    control: TraceTokens | None = None


@dataclass
class PromptGroup:
    """One prompt of a step with everything the update needs.

    Attributes:
        rollouts: all K, failed ones included (they carry no loss).
        rewards: per rollout, [T_k] turn rewards.
        advantages: per rollout, [T_k] combined advantages A^g + A^l.
        anchored: the gate z, True = prompt-only RL.
        trace: h* as tokens, or None where no verified trace exists or the method reads none (then ``anchored``).
        trace_advantage: of the trace as one more sample of the group.
        trace_weight, control: see :class:`TraceUse`.
    """

    task: Task
    rollouts: list[Rollout]
    rewards: list[np.ndarray]
    advantages: list[np.ndarray]
    anchored: bool
    trace: TraceTokens | None
    trace_advantage: float = 0.0
    trace_weight: float = 1.0
    control: TraceTokens | None = None

    @property
    def prompt_ids(self) -> list[int]:
        """x, [P]: what every usable rollout was sampled under; without one, what the first would have been."""
        return next(filter(usable, self.rollouts), self.rollouts[0]).prompt_ids


def rollouts_of(groups: list[PromptGroup]) -> list[Rollout]:
    """The rollouts of all groups, prompt by prompt."""
    return [rollout for group in groups for rollout in group.rollouts]


def usable(rollout: Rollout) -> bool:
    """Whether a rollout carries loss: it did not fail and the policy wrote a token of it."""
    return rollout.status != "failed" and any(rollout.loss_mask)


def has_policy_tokens(group: PromptGroup) -> bool:
    """Whether any rollout of the group carries loss."""
    return any(usable(rollout) for rollout in group.rollouts)


def has_advantage(group: PromptGroup, k: int) -> bool:
    """Whether rollout k can move the policy: some turn's advantage isn't 0."""
    return usable(group.rollouts[k]) and bool(np.any(group.advantages[k] != 0))


def form_group(task: Task, rollouts: list[Rollout], trace: TraceUse, method: Method, gate: Gate) -> PromptGroup:
    """Rewards (eq. 24-28), advantages (eq. 29-32) and the gate (eq. 13) of one prompt.

    Raises:
        DataError: two usable rollouts were sampled under different prompts; names task and rollouts.
        NumericsError: a reward is not finite; names task and rollout.
    """
    able = [rollout for rollout in rollouts if usable(rollout)]
    other = next((rollout for rollout in able if rollout.prompt_ids != able[0].prompt_ids), None)
    if other is not None:
        raise DataError(
            f"rollouts {able[0].sample} and {other.sample} of task {task.id!r} were sampled under different prompts, so"
            " they are no group: opening() of a session has to give Task.user_turns[0] in every episode"
            " (docs/extend/environment.md)"
        )
    rewards = [method.turn_rewards(task, rollout) for rollout in rollouts]
    for rollout, reward in zip(rollouts, rewards, strict=True):
        if not np.all(np.isfinite(reward)):
            raise NumericsError(
                f"the rewards of {task.id}, rollout {rollout.sample}, are not finite: {reward.tolist()}",
                names=["reward"],
            )
    tokens = trace.tokens if method.uses_traces else None
    mask = [rollout.status != "failed" and bool(rollout.turns) for rollout in rollouts]
    advantages, of_trace = method.advantages(rewards, mask, traced=tokens is not None)
    # the gate chooses between two contexts, so it is asked only where there are two
    closed = tokens is None or (method.conditions_on_trace and gate.closes(task.id))
    return PromptGroup(task, rollouts, rewards, advantages, closed, tokens, of_trace, trace.weight, trace.control)
