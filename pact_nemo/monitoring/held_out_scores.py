"""What held-out episodes come to: the score by the benchmark's own checker, and the reward of their calls."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass, field
from typing import Any

from pact_nemo.config.schema import Config
from pact_nemo.environments.base import Task
from pact_nemo.methods.rewards import matching_rewards
from pact_nemo.rollouts.types import Rollout


@dataclass(frozen=True)
class Score:
    """Mean of the benchmark's own score over episodes, 0-1 (BFCL: pass or fail; FTRL: Solve-F1; ToolHop: answer
    correctness). An episode that failed through no fault of the policy counts 0, and is counted in ``failed`` so that
    nobody mistakes it for the model's doing. ``metrics``: means of the benchmark's further numbers over the episodes
    that have a verdict.
    """

    score: float
    n: int
    call_reward: float | None
    failed: int
    categories: dict[str, dict[str, float]]
    weight_version: int
    seconds: float
    metrics: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def summarise(
    tasks: list[Task], rollouts: list[Rollout], call_rewards: list[float], version: int, seconds: float
) -> Score:
    """Denominators: ``score`` over all episodes but those that only prepare for others, ``call_reward`` over those with
    reference calls (None: none has), ``categories`` over the episodes of each category or tag."""
    by_task = {task.id: task for task in tasks}
    flat: list[float] = []
    passed: dict[str, list[float]] = defaultdict(list)
    further: dict[str, list[float]] = defaultdict(list)
    for rollout in rollouts:
        task, value = by_task[rollout.task_id], rollout.outcome.score if rollout.outcome is not None else 0.0
        if task.prepares:
            continue
        flat.append(value)
        for name in (task.category, *task.tags):
            passed[name].append(value)
        for metric, number in (rollout.outcome.metrics if rollout.outcome is not None else {}).items():
            further[metric].append(number)
    return Score(
        score=sum(flat) / len(flat),
        n=len(flat),
        call_reward=sum(call_rewards) / len(call_rewards) if call_rewards else None,
        failed=sum(r.status == "failed" and not by_task[r.task_id].prepares for r in rollouts),
        categories={name: {"score": sum(v) / len(v), "n": len(v)} for name, v in sorted(passed.items())},
        weight_version=version,
        seconds=seconds,
        metrics={metric: sum(values) / len(values) for metric, values in sorted(further.items())},
    )


def episode_rewards(
    config: Config, tasks: list[Task], rollouts: list[Rollout]
) -> tuple[list[list[float]], list[float]]:
    """Per episode: the reward of each turn; and, of the episodes whose task has reference calls, the mean matching
    reward of their tool turns (whatever the method trains on)."""
    by_task = {task.id: task for task in tasks}
    rewards, call_rewards = [], []
    for rollout in rollouts:
        task = by_task[rollout.task_id]
        rewards.append(matching_rewards(task, rollout, config.objective).tolist())
        if any(task.reference_calls):
            reward = float(matching_rewards(task, rollout, config.objective, outcome_weight=0.0).sum())
            call_rewards.append(reward / max(sum(turn.is_tool_turn for turn in rollout.turns), 1))
    return rewards, call_rewards
