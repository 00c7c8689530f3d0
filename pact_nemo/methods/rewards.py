"""Rewards of a rollout's turns, from what the task knows and the episode brought."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pact_nemo.environments.answers import answer_f1
from pact_nemo.environments.base import Task
from pact_nemo.objective.rewards import CallsOf, TurnCalls, turn_rewards
from pact_nemo.rollouts.types import Rollout

if TYPE_CHECKING:
    from pact_nemo.config.schema import ObjectiveConfig


#: keys of ``objective`` that :func:`matching_rewards` reads
REWARD_SETTINGS = ("outcome", "outcome_weight", "matching", "call_penalty")


def reference_of(task: Task) -> CallsOf:
    """A task's reference calls."""
    expected = task.reference_calls
    return CallsOf(
        [call for calls in expected for call in calls],
        [group_of(task, index) for index, calls in enumerate(expected) for _ in calls],
    )


def written_by(task: Task, rollout: Rollout) -> CallsOf:
    """The calls that the policy wrote and that could be read."""
    turns = rollout.turns
    return CallsOf(
        [call for turn in turns for call in turn.calls],
        [group_of(task, turn.user_turn) for turn in turns for _ in turn.calls],
    )


def group_of(task: Task, user_turn: int) -> int:
    """The label of a user turn's calls: only those of the same label may match. Where another user answers in each
    episode, all calls have one."""
    return 0 if task.any_turn else user_turn


def outcome_of(task: Task, rollout: Rollout, objective: ObjectiveConfig) -> float:
    """The outcome reward in [0, 1] (eq. 28): the checker's score, or the F1 of the final message's tagged answer (0
    without one).

    A held-out task without a reference answer keeps the checker's score; a training task always has one where the F1 is
    asked for (:func:`pact_nemo.data.dataset.build_dataset`).
    """
    if objective.outcome == "answer_f1" and task.reference_answer is not None:
        last = rollout.turns[-1] if rollout.turns else None
        said = last is not None and not last.is_tool_turn and rollout.status == "ok"
        return answer_f1(last.visible, task.reference_answer) if said and last is not None else 0.0
    return rollout.outcome.score if rollout.outcome is not None else 0.0


def matching_rewards(
    task: Task, rollout: Rollout, objective: ObjectiveConfig, *, outcome_weight: float | None = None
) -> np.ndarray:
    """[T] rewards of matched calls, and the outcome on the last turn (eq. 24-28).

    Args:
        outcome_weight: None = ``objective.outcome_weight``.
    """
    return _rewards(task, rollout, objective, reference_of(task), objective.call_penalty, outcome_weight)


def outcome_rewards(task: Task, rollout: Rollout, objective: ObjectiveConfig) -> np.ndarray:
    """[T] rewards of the outcome alone, on the last turn (eq. 28)."""
    return _rewards(task, rollout, objective, CallsOf([], []), 0.0, None)


def _rewards(
    task: Task,
    rollout: Rollout,
    objective: ObjectiveConfig,
    reference: CallsOf,
    penalty: float,
    outcome_weight: float | None,
) -> np.ndarray:
    return turn_rewards(
        [
            TurnCalls(turn.calls, group_of(task, turn.user_turn), turn.is_tool_turn, len(turn.call_errors))
            for turn in rollout.turns
        ],
        reference,
        outcome=outcome_of(task, rollout, objective),
        method=objective.matching,
        penalty=penalty,
        outcome_weight=objective.outcome_weight if outcome_weight is None else outcome_weight,
    )
