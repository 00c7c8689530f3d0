"""``traces.share``: how many of a step's prompts are of tasks with a trace."""

from __future__ import annotations

from collections import Counter

import pytest

from pact_nemo.config.schema import Config
from pact_nemo.data.dataset import Dataset
from pact_nemo.data.tasks import prompts_of_step, traced_in_steps
from pact_nemo.environments.base import Task
from pact_nemo.errors import ConfigError
from pact_nemo.traces.spans import TraceTokens

TASKS = [Task(f"t{i}", f"g{i}", "c", (({"role": "user", "content": str(i)},),), (), ((),)) for i in range(12)]
NAMES = [task.id for task in TASKS[:4]]
FEW = Dataset(TASKS, [], {}, {name: TraceTokens([1], [0], [-1], [0], [1]) for name in NAMES}, {})


def of(share: float | None, size: int = 4, steps: int = 100) -> Config:
    config = Config()
    config.traces.share, config.trainer.batch_size, config.trainer.steps = share, size, steps
    return config


def traced(config: Config, steps: int) -> list[int]:
    return [sum(task.id in NAMES for task in FEW.prompts_of_step(config, step)) for step in range(steps)]


def test_a_share_of_the_prompts_is_of_tasks_with_a_trace() -> None:
    steps = [FEW.prompts_of_step(of(0.5), step) for step in range(8)]
    assert traced(of(0.5), 8) == [2] * 8
    assert all(len({task.id for task in batch}) == 4 for batch in steps), "no prompt twice in a batch"
    visited = Counter(task.id for batch in steps for task in batch if task.id in NAMES)
    assert set(visited.values()) == {4}, "each of them as often as the others"
    places = {tuple(task.id in NAMES for task in batch) for batch in steps}
    assert len(places) > 1, "mini-batches would be of one kind"
    assert FEW.prompts_of_step(of(0.5), 3) == steps[3]
    assert FEW.prompts_of_step(of(1.0), 0) != FEW.prompts_of_step(of(0.0), 0)
    plain = [task.id for task in FEW.prompts_of_step(of(None), 2)]
    assert plain == [task.id for task in prompts_of_step(TASKS, 2, 4, Config().run.seed)]
    with pytest.raises(ConfigError, match=r"traces\.share=0\.1 of a batch of 4 is no prompt in 2 steps"):
        FEW.prompts_of_step(of(0.1, steps=2), 0)
    with pytest.raises(ConfigError, match=r"traces\.share=1\.0 needs 5 training tasks with a trace .* there are 4"):
        FEW.prompts_of_step(of(1.0, size=5), 0)
    with pytest.raises(ConfigError, match=r"traces\.share=0\.41 needs 5 training tasks with a trace .* there are 4"):
        FEW.prompts_of_step(of(0.41, size=10), 0)  # in its tenth step; it is refused in the first


def test_a_share_whose_prompts_are_whole_visits_what_it_always_has() -> None:
    for step in range(9):
        batch = {task.id for task in FEW.prompts_of_step(of(0.5), step)}
        with_trace = prompts_of_step(TASKS[:4], step, 2, f"{Config().run.seed}:traced")
        without = prompts_of_step(TASKS[4:], step, 2, f"{Config().run.seed}:bare")
        assert batch == {task.id for task in [*with_trace, *without]}


def test_what_a_step_cannot_have_whole_is_carried_over() -> None:
    assert traced(of(0.25, size=6), 8) == [1, 2, 1, 2, 1, 2, 1, 2]
    assert traced(of(0.9), 10) == [3, 4, 3, 4, 4, 3, 4, 3, 4, 4], "other tasks are visited as well"
    assert sum(traced(of(0.1), 10)) == 4
    assert traced_in_steps(0.3, 10, 50) == [3] * 50 and traced_in_steps(0.29, 100, 50) == [29] * 50
    steps = [FEW.prompts_of_step(of(0.25, size=6), step) for step in range(80)]
    assert all(len({task.id for task in batch}) == 6 for batch in steps), "no prompt twice in a batch"
    visited = Counter(task.id for batch in steps for task in batch if task.id in NAMES)
    assert max(visited.values()) - min(visited.values()) <= 9 and sum(visited.values()) == 120
    again = FEW.prompts_of_step(of(0.25, size=6), 33)
    assert again == steps[33], "a resumed run visits the same"
