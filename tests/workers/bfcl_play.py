"""BFCL environments made once, and episodes of calls that are given."""

from __future__ import annotations

from functools import cache

from pact_nemo.environments.base import Outcome, Task, ToolCall
from pact_nemo.environments.bfcl.data import CATEGORIES
from pact_nemo.environments.bfcl.environment import BFCLEnvironment
from tests.workers.bfcl_tasks import bfcl_environment


@cache
def environment(window: str, category: str | None = None, **settings: object) -> BFCLEnvironment:
    return bfcl_environment(categories=(category,) if category else CATEGORIES, window=window, **settings)


def left_behind() -> list[str]:
    """Names of the instances that BFCL's own runner keeps in its module."""
    from bfcl_eval.eval_checker.multi_turn_eval import multi_turn_utils

    return [key for key in vars(multi_turn_utils) if key.endswith("_instance")]


def play(env: BFCLEnvironment, task: Task, calls: list[list[ToolCall]]) -> tuple[Outcome, list[str]]:
    """Run an episode with the given calls per user turn, one call per assistant turn."""
    session = env.start(task)
    try:
        observations = []
        for turn in calls:
            for call in turn:
                observations += session.execute([call])
            session.next_user_turn()
        return session.outcome(), observations
    finally:
        session.close()


def reference(task: Task) -> list[list[ToolCall]]:
    """The task's ground truth."""
    return [list(turn) for turn in task.reference_calls]
