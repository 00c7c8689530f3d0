"""The batch that is sampled beside an update: taken once, for its step only, and lost in no way that isn't said."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from pact_nemo.config.load import load_config
from pact_nemo.environments.base import Task
from pact_nemo.errors import ConfigError, DataError, Interrupted, ServerError
from pact_nemo.rollouts.overlap import Ahead
from pact_nemo.rollouts.types import Rollout
from pact_nemo.training import collect


def rollout(task: str = "a") -> Rollout:
    return Rollout(task, 0, [1, 2], [3, 4], [1, 1], [-0.5, -0.1], [], None, 7)


def test_a_batch_is_made_beside_the_caller_and_taken_once() -> None:
    ahead, go = Ahead(), threading.Event()

    def sample() -> list[Rollout]:
        assert go.wait(10)
        return [rollout()]

    ahead.start(3, sample)
    assert ahead.take(3) is None  # still being sampled
    go.set()
    ahead.finish()
    batch = ahead.take(3)
    assert batch is not None and batch.rollouts == [rollout()] and batch.seconds is not None
    assert ahead.take(3) is None


def test_a_batch_of_another_step_is_not_handed_out() -> None:
    ahead = Ahead()
    ahead.start(3, lambda: [rollout()])
    ahead.finish()
    assert ahead.take(4) is None


def test_what_generation_raises_reaches_the_trainer_and_an_interruption_drops_the_batch() -> None:
    ahead = Ahead()

    def dead() -> list[Rollout]:
        raise ServerError("the server is gone")

    ahead.start(1, dead)
    with pytest.raises(ServerError, match="gone"):
        ahead.finish()

    def stopped() -> list[Rollout]:
        raise Interrupted("SIGTERM")

    ahead.start(1, stopped)
    ahead.finish()
    assert ahead.take(1) is None and ahead.state() is None


def test_a_checkpoint_holds_the_batch_exactly() -> None:
    ahead, again = Ahead(), Ahead()
    ahead.start(5, lambda: [rollout("a"), rollout("b")])
    ahead.finish()
    again.load_state(ahead.state(), "step_000005")
    batch = again.take(5)
    assert batch is not None and batch.rollouts == [rollout("a"), rollout("b")] and batch.seconds is None
    state = ahead.state()
    assert state is not None
    state["rollouts"][1]["token_ids"].pop()
    with pytest.raises(DataError, match="step_000005.*2"):
        Ahead().load_state(state, "step_000005")


def test_generation_ahead_needs_the_sampler_correction() -> None:
    with pytest.raises(ConfigError, match="rollout.importance=tis"):
        load_config(None, ["trainer.overlap=true", "rollout.importance=off"])


@pytest.mark.parametrize(
    ("words", "names", "taken"),
    [
        ([], "aabb", True),
        ([], "aaaabbbb", False),  # objective.group_size was 4
        ([], "ccdd", False),  # trainer.batch_size was another, so the step had other prompts
        (["trainer.overlap=false"], "aabb", False),  # of older weights, and nothing says that they are corrected for
    ],
)
def test_a_resumed_run_takes_a_batch_of_its_own_settings_only(
    words: list[str], names: str, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(None, ["trainer.overlap=true", "objective.group_size=2", *words])
    ahead, said = Ahead(), list[str]()
    ahead.load_state({"step": 3, "rollouts": [rollout(name).to_dict() for name in names]}, "step_000003")
    fresh = [rollout(name) for name in "aabb"]
    run: Any = SimpleNamespace(
        config=config,
        state=SimpleNamespace(step=3, version=7, ahead=ahead),
        generator=SimpleNamespace(rollouts=lambda *_, **__: fresh),
        progress=SimpleNamespace(message=said.append),
    )
    batch = collect._sampled(run, [Task(name, name, "c", (), (), ()) for name in "ab"])
    assert [one.task_id for one in batch.rollouts] == list("aabb")
    assert (batch.rollouts is fresh) is not taken and bool(said) is not taken
