"""Splits: no scenario is on both sides, whatever category or window its tasks come from."""

from __future__ import annotations

import pytest

from pact_nemo.environments.base import Task
from pact_nemo.environments.splits import split
from pact_nemo.errors import ConfigError
from tests.workers.bfcl_tasks import bfcl_environment


def _tasks(groups: int, per_group: int = 2) -> list[Task]:
    return [Task(f"t{g}#{k}", str(g), "c", (), (), ()) for g in range(groups) for k in range(per_group)]


def test_scenarios_are_on_one_side_across_categories_and_windows() -> None:
    full, turn = bfcl_environment().tasks(), bfcl_environment(window="turn").tasks()
    train, held_out = split(full + turn, 0.2, seed=3)
    assert len(train) + len(held_out) == len(full) + len(turn)
    assert not {task.group for task in train} & {task.group for task in held_out}
    assert len({task.group for task in held_out}) == 40
    ids = {task.id for task in held_out}
    number = held_out[0].group
    assert {f"multi_turn_{kind}_{number}" for kind in ("base", "miss_func", "miss_param", "long_context")} <= ids


def test_split_depends_on_seed_and_groups_only() -> None:
    tasks = _tasks(30)
    train, held_out = split(tasks, 7, seed=0)
    again_train, again_held = split(list(reversed(tasks)), 7, seed=0)
    assert {t.id for t in held_out} == {t.id for t in again_held} and {t.id for t in train} == {
        t.id for t in again_train
    }
    assert {t.id for t in split(tasks, 7, seed=1)[1]} != {t.id for t in held_out}
    assert len({t.group for t in held_out}) == 7
    assert [t.id for t in train] == [t.id for t in tasks if t in train]


@pytest.mark.parametrize("held_out", [0, 30, 0.0, 1.0, 0.001])
def test_an_empty_side_is_refused(held_out: float) -> None:
    with pytest.raises(ConfigError, match="empty"):
        split(_tasks(30), held_out, seed=0)
