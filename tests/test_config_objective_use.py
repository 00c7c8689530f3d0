"""What of ``objective`` a method reads, against what changes when it is set."""

from __future__ import annotations

import logging
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from pact_nemo import cli
from pact_nemo.config.load import load_config
from pact_nemo.config.objective_use import unread, words_without_effect
from pact_nemo.config.schema import ObjectiveConfig
from pact_nemo.environments.base import Outcome, Task, ToolCall
from pact_nemo.methods.registry import METHODS, method_class, method_named
from pact_nemo.methods.rewards import REWARD_SETTINGS
from pact_nemo.rollouts.types import Rollout, Turn

#: of each setting of rewards and advantages another value than the default
OTHER = {"outcome": "answer_f1", "outcome_weight": 3.0, "matching": "greedy", "call_penalty": 0.5}
OTHER |= {"turn_level": False, "gamma": 0.1, "combine": "mean"}


def rollout(calls: list[list[ToolCall]], *, text: str, score: float) -> Rollout:
    """Tool turns with these calls, and a final turn with this text."""
    turns = [Turn(0, 1, text, [*made], call_errors=[]) for made in [*calls, []]]
    found = Rollout("t", 0, [1], [2], [1], [0.0], [], Outcome(score == 1.0, score), 0)
    found.turns = turns
    return found


def test_every_key_is_one_of_the_schema() -> None:
    known = {field.name for field in fields(ObjectiveConfig)}
    for name in METHODS:
        assert unread(method_class(name)) <= known and set(method_class(name).reward_settings) <= set(REWARD_SETTINGS)


def test_what_is_told_apart_is_what_changes_rewards_and_advantages() -> None:
    expected = (ToolCall("f", {"a": 1, "b": 2}), ToolCall("f", {"a": 1, "c": 3}))
    task = Task("t", "t", "c", (({"role": "user", "content": "?"},),), (), (expected,), reference_answer="x y")
    right, wrong = [ToolCall("f", {"a": 1, "b": 2})], [ToolCall("h", {"c": 3})]
    first, second = (
        [ToolCall("f", {"a": 1, "b": 2, "c": 3})],
        [ToolCall("f", {"b": 2})],
    )  # greedy pairs the first with b
    group = [
        rollout([first, second], text="<answer>x</answer>", score=1.0),
        rollout([right, wrong], text="<answer>z</answer>", score=0.0),
        rollout([wrong, wrong], text="<answer>z</answer>", score=0.0),
    ]
    for name in METHODS:
        if not method_class(name).trains_by_rl:
            continue
        base = ObjectiveConfig(**{"matching": "hungarian"})
        for key, value in OTHER.items():
            rewards, advantages = [], []
            for objective in (base, replace(base, **{key: value})):
                method = method_named(name, objective)
                rewards.append([method.turn_rewards(task, one) for one in group])
                advantages.append(method.advantages(rewards[0], [True] * 3, traced=False)[0])
            before, after = rewards if key in REWARD_SETTINGS else advantages
            same = all(np.allclose(a, b) for a, b in zip(before, after, strict=True))
            assert same == (key in unread(method_class(name))), (name, key)


def test_words_without_effect_are_told() -> None:
    words = ["objective.sft_coef=0.5", "objective.schedule.call=none", "objective.kl_coef=0", "optimizer.lr=1e-5"]
    told = {
        name: words_without_effect(load_config(None, [f"method={name}", *own]), words)
        for name, own in (("pact", []), ("grpo", []), ("chord", []), ("sft", ["warmup.steps=1", "trainer.steps=0"]))
    }
    assert told == {"pact": [], "grpo": words[:2], "chord": words[:2], "sft": words[:3]}


@pytest.mark.parametrize(
    ("others", "word", "idle"),
    [
        (["objective.schedule.kind=adaptive"], "objective.schedule.horizon=9", True),
        ([], "objective.schedule.horizon=9", False),
        ([], "objective.schedule.success_target=0.9", True),
        (["objective.schedule.kind=adaptive"], "objective.schedule.success_target=0.9", False),
        (["objective.schedule.reasoning=fixed"], "objective.schedule.fixed_level=2", False),
        ([], "objective.schedule.fixed_level=2", True),
        (["objective.schedule.call=fixed"], "objective.schedule.call_end=0.1", True),
        (["objective.schedule.call=fixed"], "objective.schedule.call_start=0.1", False),
        (["method=luffy"], "objective.clip_low=0.1", True),
        (["method=luffy", "objective.clip=true"], "objective.clip_low=0.1", False),
        ([], "traces.variants=9", True),
        (["traces.augment=[call_order]"], "traces.variants=9", False),
        ([], "traces.fields.messages=talk", True),
        (["traces.path=talks.jsonl"], "traces.fields.messages=talk", False),
    ],
)
def test_a_word_that_needs_another_setting_is_told_without_it(others: list[str], word: str, idle: bool) -> None:
    assert words_without_effect(load_config(None, [*others, word]), [word]) == ([word] if idle else [])


def test_the_command_says_so_and_runs(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = Path(__file__).resolve().parents[1] / "conf" / "grpo_bfcl-smollm2_135m-cpu.yaml"
    monkeypatch.setattr(sys, "argv", ["recipe", "--config", str(preset), "objective.anchor_prob=1"])
    monkeypatch.setattr(cli, "_launched", lambda *_: 0)
    monkeypatch.delenv("RANK", raising=False)
    with caplog.at_level(logging.WARNING), pytest.raises(SystemExit) as end:
        cli.main(lambda config, resume: None, str(preset), "", None)
    assert end.value.code == 0
    assert "objective.anchor_prob=1 changes nothing with method=grpo and the other settings" in caplog.text
