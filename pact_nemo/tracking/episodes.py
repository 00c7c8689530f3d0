"""Rows that the run folder keeps of each rollout, readable again as rollouts and by the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pact_nemo.batches.prompt_trees import PromptGroup
from pact_nemo.environments.base import Task
from pact_nemo.rollouts.types import Rollout
from pact_nemo.runtime.files import write_text_atomic


def task_view(task: Task) -> dict[str, Any]:
    """What a reader of an episode needs to see of its task."""
    return {
        "category": task.category,
        "tags": list(task.tags),
        "user_turns": [list(turn) for turn in task.user_turns],
        "reference_calls": [
            [{"name": c.name, "arguments": c.arguments} for c in turn] for turn in task.reference_calls
        ],
    }


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    write_text_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def dump_step(path: Path, groups: list[PromptGroup], *, keep: int = 0) -> None:
    """Every rollout of a training step with its rewards, advantages and gate; ``trainer.replay`` reads it back.

    Of the step files beside it the newest ``keep`` stay (0: all).
    """
    rows = []
    for group in groups:
        view = task_view(group.task)
        for rollout, rewards, advantages in zip(group.rollouts, group.rewards, group.advantages, strict=True):
            rows.append(
                rollout.to_dict()
                | {
                    "rewards": rewards.tolist(),
                    "advantages": advantages.tolist(),
                    "anchored": group.anchored,
                    "task": view,
                }
            )
    _write(path, rows)
    for old in sorted(path.parent.glob("step_*.jsonl"))[:-keep] if keep else []:
        old.unlink(missing_ok=True)


def dump_evaluation(path: Path, tasks: list[Task], rollouts: list[Rollout], rewards: list[list[float]]) -> None:
    """Held-out episodes, in the same form as training rollouts (no advantages)."""
    views = {task.id: task_view(task) for task in tasks}
    rows = [
        r.to_dict() | {"rewards": w, "advantages": [], "task": views[r.task_id]}
        for r, w in zip(rollouts, rewards, strict=True)
    ]
    _write(path, rows)
