"""One prompt for all rollouts of a task: in training a session opens with the task's own first messages."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pact_nemo.batches.prompt_groups import Gate, PromptGroup, TraceUse, form_group
from pact_nemo.batches.prompt_trees import grow_tree
from pact_nemo.chat.template import ChatFormat
from pact_nemo.config.load import load_config
from pact_nemo.config.schema import ObjectiveConfig
from pact_nemo.data.dataset import build_dataset
from pact_nemo.data.tasks import build_environment
from pact_nemo.environments.base import Outcome, Task
from pact_nemo.environments.outside import OutsideEnvironment
from pact_nemo.environments.spec import EnvironmentSpec
from pact_nemo.errors import ConfigError, DataError, EnvironmentFailure
from pact_nemo.methods.registry import method_named
from pact_nemo.rollouts.batch import run_batch
from pact_nemo.rollouts.episode import EpisodeSetup
from pact_nemo.rollouts.types import Rollout, Turn
from pact_nemo.serving.config import Sampling
from pact_nemo.tracking.terminal import RunProgress
from pact_nemo.training import generation
from tests.workers.episode_kit import LIMITS, SEEDS, ScriptedEnvironment, ScriptedPolicy, ScriptedSession, make_task

REPO = Path(__file__).resolve().parents[1]


def says(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


class Opens(ScriptedSession):
    """Opens with the request, or for ``every`` so many seeds with another one."""

    seed, every = 0, 0

    def seeded(self, seed: int) -> None:
        self.seed = seed

    def opening(self) -> list[dict[str, str]]:
        other = self.every and self.seed % self.every == 0
        return says(f"case {self.seed}") if other else [dict(message) for message in self.task.user_turns[0]]


class World(ScriptedEnvironment):
    every = 0
    broken: tuple[str, ...] = ()

    def tasks(self) -> list[Task]:
        return [make_task(f"t{i}") for i in range(3)]

    def start(self, task: Task) -> Any:
        if task.id in self.broken:
            raise RuntimeError("no room")
        session = Opens(task)
        session.every = self.every
        self.sessions.append(session)
        return session


def outside(world: World) -> OutsideEnvironment:
    return OutsideEnvironment("world.py:World", world, EnvironmentSpec(World), None)


# --- before anything starts


def test_sessions_that_open_with_another_prompt_are_refused_before_anything_starts() -> None:
    world = World()
    environment = outside(world)
    tasks = environment.tasks()
    environment.check_openings(tasks)
    world.every = 2
    with pytest.raises(ConfigError, match=r"environment='world.py:World': opening\(\) of a session of task 't0' gave"):
        environment.check_openings(tasks)
    assert all(session.closed for session in world.sessions)
    world.every, world.broken = 0, ("t1",)  # its episodes will fail, and are counted then
    environment.check_openings(tasks)


def test_an_environment_whose_sessions_have_no_opening_is_not_asked() -> None:
    asked: list[str] = []

    class Plain(World):
        def start(self, task: Task) -> Any:
            asked.append(task.id)
            return ScriptedSession(task)

    environment = outside(Plain())
    environment.check_openings(environment.tasks())
    assert asked == ["t0"]  # by tasks() itself


def test_a_run_asks_the_tasks_that_it_trains_on(chat: ChatFormat, tmp_path: Path) -> None:
    shop = (REPO / "docs/extend/environment.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    own = "\n    def opening(self):\n        return [{'role': 'user', 'content': 'another request'}]\n"
    path = tmp_path / "shop.py"
    assert "class Visit:\n" in shop
    path.write_text(shop.replace("class Visit:\n", f"class Visit:{own}\n"), encoding="utf-8")
    config = load_config(REPO / "conf/pact-smollm2_135m-cpu.yaml", [f"environment={path}:Shop", "tasks.held_out=10"])
    with pytest.raises(ConfigError, match=r"another request.*which isn't Task\.user_turns\[0\]"):
        build_dataset(config, build_environment(config), chat)


# --- as an episode begins


def test_an_episode_of_training_refuses_another_prompt_and_one_of_evaluation_plays_it(chat: ChatFormat) -> None:
    world = World()
    world.every = 1
    setup = EpisodeSetup(cast(Any, world), chat, LIMITS, Sampling(), SEEDS)

    def play(setup: EpisodeSetup, concurrency: int = 4) -> list[Rollout]:
        tasks, policy = [make_task("t0"), make_task("t1")], ScriptedPolicy(chat, ["Hello."] * 4)
        return asyncio.run(run_batch(tasks, 2, setup, clients=[policy], concurrency=concurrency))

    prompts = {tuple(rollout.prompt_ids) for rollout in play(setup)}
    assert len(prompts) == 4, "each under its own"
    with pytest.raises(ConfigError, match="training needs the same prompt in every episode"):
        play(replace(setup, one_prompt=True))
    world.sessions.clear()
    with pytest.raises(ConfigError, match="task 't0'"):
        play(replace(setup, one_prompt=True), 1)
    assert world.sessions[0].closed
    world.every = 0
    assert [rollout.status for rollout in play(replace(setup, one_prompt=True))] == ["ok"] * 4


def test_training_rollouts_have_one_prompt_and_evaluations_may_have_others(
    chat: ChatFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[bool] = []

    async def batch(tasks: Any, samples: int, setup: EpisodeSetup, **rest: Any) -> list[Rollout]:
        found.append(setup.one_prompt)
        return [Rollout("t0", 0, [1], [2], [1], [-0.5], [], None, 0)]

    monkeypatch.setattr(generation, "run_batch", batch)
    with RunProgress(total_steps=1, enabled=False) as progress:
        config = load_config(REPO / "conf/pact-smollm2_135m-cpu.yaml")
        made = generation.Generator(config, chat, cast(Any, World()), progress, tmp_path / "log")
        made._ready = True
        made._fleet = cast(Any, SimpleNamespace(check_version=lambda v: None, routes=lambda n: [], living=[]))
        made.rollouts([make_task()], 1, step=0, version=0)
        made.evaluation([make_task()], name="before", version=0)
    assert found == [True, False]


# --- a group


def rollout(sample: int, prompt: list[int], status: Any = "ok") -> Rollout:
    outcome = None if status == "failed" else Outcome(True, 1.0)
    return Rollout("t0", sample, prompt, [5, 0], [1, 1], [-0.5, -0.5], [Turn(0, 2, "x")], outcome, 0, status=status)


def group_of(*rollouts: Rollout) -> PromptGroup:
    method = method_named("grpo", ObjectiveConfig(group_size=2))
    return form_group(make_task(), list(rollouts), TraceUse(), method, Gate(1, 0, 0.4))


def test_rollouts_of_different_prompts_are_no_group() -> None:
    with pytest.raises(DataError, match=r"rollouts 0 and 2 of task 't0' were sampled under different prompts"):
        group_of(rollout(0, [1, 2]), rollout(1, [1, 2]), rollout(2, [1, 3]))


def test_the_tree_begins_with_the_prompt_of_a_usable_rollout() -> None:
    group = group_of(rollout(0, [8, 8], "failed"), rollout(1, [1, 2]), rollout(2, [1, 2]))
    tree = grow_tree(group, [], method_named("grpo", ObjectiveConfig()), contexts=["x"]).tree
    assert tree.segments[0].token_ids.tolist()[:2] == [1, 2]
    lost = group_of(rollout(0, [8, 8], "failed"), rollout(1, [8, 8], "failed"))
    assert lost.prompt_ids == [8, 8]


def test_an_environment_that_fails_as_it_opens_fails_its_episode_only(chat: ChatFormat) -> None:
    class Fails(World):
        def start(self, task: Task) -> Any:
            session = super().start(task)
            session.opening = lambda: (_ for _ in ()).throw(EnvironmentFailure("gone"))
            return session

    setup = EpisodeSetup(cast(Any, Fails()), chat, LIMITS, Sampling(), SEEDS, one_prompt=True)
    (played,) = asyncio.run(run_batch([make_task()], 1, setup, clients=[ScriptedPolicy(chat, [])], concurrency=1))
    assert played.status == "failed" and played.error == "EnvironmentFailure: gone"
