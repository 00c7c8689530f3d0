"""Held-out splits by group: all tasks of one scenario are on the same side."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from pact_nemo.environments.base import Task
from pact_nemo.errors import ConfigError


def rank(name: str, seed: int) -> str:
    """A place in an order that depends on (seed, name) alone."""
    return hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()


def split(tasks: Sequence[Task], held_out: float | int, seed: int) -> tuple[list[Task], list[Task]]:
    """Split into (train, held out); both keep the order of ``tasks``.

    Args:
        tasks: tasks of one or more categories.
        held_out: a float in (0, 1): fraction of the groups; an int: number of groups.
        seed: the order in which groups are picked. Every group's place in it depends on (seed, group) alone, so adding
            tasks moves no other group across a fixed fraction by more than the change in count.

    Raises:
        ConfigError: ``held_out`` leaves one side empty.
    """
    groups = sorted({task.group for task in tasks}, key=lambda group: rank(group, seed))
    count = held_out if isinstance(held_out, int) else round(held_out * len(groups))
    if not 0 < count < len(groups):
        raise ConfigError(
            f"tasks.held_out={held_out!r} of {len(groups)} groups leaves one side empty; set it to a number between"
        )
    chosen = set(groups[:count])
    return [task for task in tasks if task.group not in chosen], [task for task in tasks if task.group in chosen]
