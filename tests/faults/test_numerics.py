"""Numbers that lie stop a step before the optimizer, by name of term and sample, and leave the mini-batch; spikes and
failures are told.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pact_nemo.batches.prompt_groups import Gate, TraceUse, form_group
from pact_nemo.config.schema import AlarmsConfig
from pact_nemo.environments.base import Task
from pact_nemo.errors import NumericsError
from pact_nemo.methods.registry import make_method
from pact_nemo.monitoring import alarms
from pact_nemo.policy.config import OptimizerConfig
from pact_nemo.policy.policy import MegatronPolicy
from pact_nemo.rollouts.types import Rollout, Turn
from pact_nemo.tracking.run_folder import Workspace
from pact_nemo.training.stopwatch import Stopwatch
from pact_nemo.training.update import update
from tests.test_training_fast_paths import batch, settings
from tests.workers.policy_kit import make_model
from tools.benches.kit import stand_in


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("numerics"), "llama")


every_kind = pytest.mark.parametrize("rank", [0, 8])  # all weights, or adapters of that rank


def attempt(model: Path, folder: Path, break_it: Any, *, rank: int) -> tuple[MegatronPolicy, NumericsError, list[Path]]:
    config = settings(4)
    config.policy.lora.rank = rank
    policy = MegatronPolicy(config.policy, OptimizerConfig(lr=1e-3), model, seed=1, total_steps=4)
    policy.load_reference(model)
    run = stand_in(config, policy)
    run.workspace = Workspace(folder)
    groups = batch(config)
    break_it(groups, policy)
    before = [parameter.detach().clone() for parameter in policy.chunks[0].parameters()]
    with pytest.raises(NumericsError) as caught:
        update(run, groups, Stopwatch(run.progress))
    assert all(
        torch.equal(a, b) or a.isnan().any() for a, b in zip(before, policy.chunks[0].parameters(), strict=True)
    ), "weights changed"
    assert policy.step == 0
    return policy, caught.value, sorted((folder / "numerics").glob("*"))


@every_kind
def test_an_advantage_that_is_no_number_is_named_with_its_sample(model: Path, tmp_path: Path, rank: int) -> None:
    def nan(groups: Any, policy: Any) -> None:
        groups[0].advantages[1][:] = np.nan

    _, error, files = attempt(model, tmp_path, nan, rank=rank)
    assert (
        "bench_0, rollout 1" in str(error)
        and "advantages" in str(error)
        and "loss" in error.names
        and str(files[0]) in str(error)
    )
    dumped = json.loads(files[0].read_text())
    assert {row["rollout"] for row in dumped["suspects"]} == {1} and {row["task"] for row in dumped["suspects"]} == {
        "bench_0"
    }
    assert (
        len(dumped["prompts"]) == 4
        and "nan" in dumped["prompts"][0]["streams"]["advantages"]
        and len(dumped["prompts"][0]["segments"]) > 3
    )


@every_kind
def test_weights_that_are_broken_show_in_every_log_prob(model: Path, tmp_path: Path, rank: int) -> None:
    def nan(groups: Any, policy: Any) -> None:
        with torch.no_grad():
            next(policy.chunks[0].parameters())[:] = float("inf")

    _, error, files = attempt(model, tmp_path, nan, rank=rank)
    assert "logprobs of bench_0, rollout 0" in str(error) and "more" in str(error)
    dumped = json.loads(files[0].read_text())
    assert {row["task"] for row in dumped["suspects"]} >= {"bench_0", "bench_3"} and {
        row["context"] for row in dumped["suspects"]
    } == {"x"}


@every_kind
def test_a_gradient_that_overflows_alone_is_called_that(model: Path, tmp_path: Path, rank: int) -> None:
    def huge(groups: Any, policy: Any) -> None:
        layer = policy.chunks[0].decoder.layers[0].mlp.linear_fc1
        weight = layer.adapter.linear_out.weight if rank else layer.weight
        weight.register_hook(lambda gradient: gradient * float("inf"))

    _, error, _ = attempt(model, tmp_path, huge, rank=rank)
    assert error.names == ["grad_norm"] and "overflowed on its way back" in str(error)


def test_a_reward_that_is_no_number_stops_before_anything_is_computed() -> None:
    config = settings(4)
    groups = batch(config)
    rollouts = groups[0].rollouts
    assert rollouts[2].outcome is not None
    object.__setattr__(rollouts[2].outcome, "score", float("nan"))
    with pytest.raises(NumericsError, match="rewards of bench_0, rollout 2"):
        form_group(groups[0].task, rollouts, TraceUse(), make_method(config), Gate(0, 0, 0.0))


def test_spikes_are_told_with_their_setting() -> None:
    limits = AlarmsConfig(mismatch=0.1, kl=None, clip_fraction=0.5, privilege_gap=5.0)
    record = {
        "mismatch/mean_abs": 0.11,
        "policy/kl_ref": 99.0,
        "policy/clip_fraction_x": 0.5,
        "latent/gap_success": None,
        "latent/gap_failure": -6.0,
    }
    found = alarms.spikes(record, limits)
    assert (
        len(found) == 2
        and "alarms.mismatch=0.1" in found[0]
        and "alarms.privilege_gap=5" in found[1]
        and "-6" in found[1]
    )
    assert alarms.spikes({}, limits) == []


def played(error: str | None, number: int = 1) -> list[Rollout]:
    turn = Turn(0, 1, "")
    return [
        Rollout("t", k, [1], [2], [1], [-1.0], [turn], None, 0, status="failed" if error else "ok", error=error)
        for k in range(number)
    ]


def test_failures_are_counted_by_kind_and_too_many_end_the_run_with_the_top_cause() -> None:
    rollouts = [*played(None, 5), *played("EnvironmentFailure: tool crashed", 3), *played("ServerError: late", 2)]
    assert alarms.failures(rollouts) == {"EnvironmentFailure": 3, "ServerError": 2}
    assert alarms.too_many(rollouts, AlarmsConfig(failed_share=0.5)) is None
    problem = alarms.too_many([*rollouts, *played("EnvironmentFailure: tool crashed")], AlarmsConfig(failed_share=0.5))
    assert problem is not None and "6 of 11" in problem and "(4 times): EnvironmentFailure: tool crashed" in problem
    assert alarms.failure_summary(played(None)) is None


def test_a_failed_rollout_gets_no_gradient_and_moves_no_mean() -> None:
    config = settings(4)
    task = Task("t", "t", "bench", (), (), ())
    good = [group.rollouts for group in batch(config)][0]
    turns, error = [Turn(0, 2, "")], "EnvironmentFailure: x"
    broken = Rollout(
        "t", 3, good[0].prompt_ids, [5, 6], [1, 1], [-1.0, -1.0], turns, None, 0, status="failed", error=error
    )
    with_it = form_group(task, [*good, broken], TraceUse(), make_method(config), Gate(0, 0, 0.0))
    without = form_group(task, good, TraceUse(), make_method(config), Gate(0, 0, 0.0))
    for a, b in zip(with_it.advantages, without.advantages, strict=False):
        np.testing.assert_array_equal(a, b)
    assert not np.any(with_it.advantages[3])


def test_a_run_gives_up_with_a_checkpoint() -> None:
    from pact_nemo.errors import TooManyFailures
    from pact_nemo.training.checkpointer import Checkpointer

    calls: list[str] = []
    stand = SimpleNamespace(
        policy=SimpleNamespace(step=3),
        state=SimpleNamespace(step=2),
        workspace=SimpleNamespace(folder=Path("runs/x")),
        weights=SimpleNamespace(sharing=SimpleNamespace(trainer=lambda end: calls.append("trainer's turn"))),
        save=lambda: calls.append("checkpoint"),
        finish_saving=lambda wait: calls.append("finish"),
    )
    with pytest.raises(
        TooManyFailures, match="step 3: the cause\nWhat was finished before is checkpointed: go on with --resume runs/x"
    ):
        Checkpointer.give_up(stand, TooManyFailures("the cause"))  # type: ignore[arg-type]
    assert calls == ["trainer's turn", "checkpoint", "finish"]
