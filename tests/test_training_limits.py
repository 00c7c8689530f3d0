"""Limits of episodes: evaluation goes by the benchmark's own, whatever training does."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pact_nemo.config.limits import evaluation_limits, training_limits
from pact_nemo.config.load import load_config
from pact_nemo.environments.bfcl.session import FORCE_TERMINATED
from pact_nemo.errors import ConfigError, ServerError
from pact_nemo.rollouts.chat_episode import play_by_chat
from pact_nemo.serving.chat_endpoint import CUT, chat_endpoint, whole
from tests.workers.bfcl_tasks import bfcl_environment

CONF = Path(__file__).resolve().parents[1] / "conf"


@pytest.mark.parametrize(("name", "turns"), [("pact_bfcl", 21), ("pact_ftrl", 10), ("pact_toolhop", 9)])
def test_full_settings_are_evaluated_under_the_benchmarks_own_limit(name: str, turns: int) -> None:
    overrides = [] if name == "pact_bfcl" else ["tasks.path=rows.jsonl"]
    for sampling in ([], ["rollout.sampling.max_turns_per_user_turn=2", "rollout.sampling.max_turns=2"]):
        config = load_config(CONF / f"{name}.yaml", [*overrides, *sampling])
        limits = evaluation_limits(config)
        assert limits.max_turns_per_user_turn == turns and limits.max_turns > 1000
        assert limits.max_response_tokens == config.rollout.sampling.max_response_tokens == 23000
        assert (training_limits(config).max_turns == 2) is bool(sampling)


def test_the_cpu_preset_is_evaluated_as_it_was() -> None:
    config = load_config(CONF / "pact_bfcl-smollm2_135m-cpu.yaml")
    assert evaluation_limits(config).max_turns_per_user_turn == training_limits(config).max_turns_per_user_turn == 3
    assert evaluation_limits(load_config(None, ["evaluation.max_turns_per_user_turn=5"])).max_turns_per_user_turn == 5
    with pytest.raises(ConfigError, match="evaluation.max_turns_per_user_turn=0"):
        load_config(None, ["evaluation.max_turns_per_user_turn=0"])


@pytest.mark.parametrize(("steps", "passes"), [(20, True), (21, False)])
def test_bfcls_twenty_steps_and_a_closing_message_pass_and_one_step_more_is_force_terminated(
    steps: int, passes: bool
) -> None:
    """``count > MAXIMUM_STEP_LIMIT`` after a step with calls ends bfcl-eval's inference, and its runner fails what was
    cut.
    """
    from bfcl_eval.constants.default_prompts import MAXIMUM_STEP_LIMIT

    assert MAXIMUM_STEP_LIMIT == 20
    environment = bfcl_environment(("multi_turn_base",))
    task = environment.tasks()[0]
    limits = evaluation_limits(load_config(CONF / "pact_bfcl.yaml"))

    def call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        return {"id": name, "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}

    def complete(messages: Any, tools: Any) -> dict[str, Any]:
        users = [index for index, message in enumerate(messages) if message["role"] == "user"]
        since = sum(message["role"] == "assistant" for message in messages[users[-1] :])
        wanted = task.reference_calls[len(users) - 1]
        idle = (
            steps - 1 if len(users) == len(task.reference_calls) else 0
        )  # in the last user turn, after the calls that matter
        if since == 0:
            return {"content": "", "tool_calls": [call(each.name, each.arguments) for each in wanted]}
        return {"content": "", "tool_calls": [call("pwd", {})]} if since <= idle else {"content": "Done."}

    rollout = play_by_chat(environment, task, 0, complete, limits)
    assert rollout.outcome is not None and rollout.outcome.success is passes
    assert (rollout.status, rollout.outcome.reason) == (("ok", "ok") if passes else ("truncated", FORCE_TERMINATED))
    assert rollout.limit == (None if passes else "turns")
    assert sum(turn.is_tool_turn for turn in rollout.turns if turn.user_turn == len(task.reference_calls) - 1) == steps


def test_a_message_that_the_endpoint_cut_off_ends_the_episode_as_in_training() -> None:
    """Half a message closed the user turn, and passed where it held the answer."""
    environment = bfcl_environment(("multi_turn_base",))
    task = environment.tasks()[0]
    limits = evaluation_limits(load_config(CONF / "pact_bfcl.yaml"))
    rollout = play_by_chat(environment, task, 0, lambda *_: {"role": "assistant", "content": "I am", CUT: True}, limits)
    assert (rollout.status, rollout.limit, len(rollout.turns)) == ("truncated", "turn_tokens", 1)
    assert rollout.turns[0].finish_reason == "length" and rollout.outcome is not None and not rollout.outcome.success


@pytest.mark.parametrize(("reason", "cut"), [("length", True), ("stop", False), (None, False)])
def test_an_endpoints_finish_reason_is_kept(reason: str | None, cut: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    reply = {"choices": [{"message": {"role": "assistant", "content": "I am"}, "finish_reason": reason}]}
    opener = SimpleNamespace(open=lambda *_, **__: BytesIO(json.dumps(reply).encode()))
    monkeypatch.setattr("pact_nemo.serving.chat_endpoint.proxies.opener", lambda *_: opener)
    answer = chat_endpoint("http://127.0.0.1:1", "m", "key", 5.0, 0.0)([{"role": "user", "content": "?"}], [])
    assert bool(answer.get(CUT)) is cut
    if cut:
        with pytest.raises(ServerError, match="the verdict was cut off at the endpoint's token limit"):
            whole(answer, "the verdict")
    else:
        assert whole(answer, "the verdict") == answer
