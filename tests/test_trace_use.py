"""What of a run uses its traces: checks, advice, clock and diagnostics agree where a term is off by another setting."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pact_nemo.batches.prompt_trees import PROMPT_ONLY, TRACE_CONDITIONED
from pact_nemo.config.load import load_config
from pact_nemo.config.trace_use import meets_traces, teaches
from pact_nemo.errors import ConfigError
from pact_nemo.monitoring.alarms import spikes
from pact_nemo.monitoring.diagnostics import latent
from pact_nemo.report.advice import advice, unmeasured
from pact_nemo.report.data import load_run
from pact_nemo.report.page import facts
from pact_nemo.training.state import new_state
from tests.fixtures.run_folders import make_run
from tests.test_report_advice import keys, run_of, told_with

PACT = {
    "objective.sft_coef": 0.1,
    "objective.anchor_prob": 0.4,
    "objective.schedule.call": "scale",
    "objective.schedule.reasoning": "segment",
}


@pytest.mark.parametrize(
    ("change", "meets", "any_token", "calls"),
    [
        ({}, True, True, True),
        ({"objective.sft_coef": 0.0}, True, False, False),
        ({"objective.anchor_prob": 1.0}, False, False, False),
        ({"objective.anchor_prob": 1.0, "objective.schedule.anchor_end": 0.2}, True, True, True),
        ({"objective.anchor_prob": 0.2, "objective.schedule.anchor_end": 1.0}, True, True, True),
        ({"traces.share": 0.0}, False, False, False),
        ({"objective.schedule.call": "none"}, True, True, False),
        ({"objective.schedule.call_start": 0.0, "objective.schedule.call_end": 0.0}, True, True, False),
        ({"objective.schedule.call_start": 0.0, "objective.schedule.call_end": 0.2}, True, True, True),
        ({"objective.schedule.call": "fixed", "objective.schedule.call_start": 0.0}, True, True, False),
        ({"objective.schedule.call": "none", "objective.schedule.reasoning_scale": 0.0}, True, False, False),
        ({"objective.schedule.call": "none", "objective.schedule.reasoning": "none"}, True, False, False),
    ],
)
def test_a_term_is_off_by_more_than_its_weight(
    change: dict[str, Any], meets: bool, any_token: bool, calls: bool
) -> None:
    setting = (PACT | change).get
    assert meets_traces(setting, gated=True) is meets
    assert (teaches(setting, gated=True), teaches(setting, gated=True, calls=True)) == (any_token, calls)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["traces.control=none", "objective.anchor_prob=1"], "traces.control=none: no prompt is conditioned"),
        (["traces.control=other_task", "traces.share=0"], "traces.share=0.0; leave it out"),
        (["traces.closing=Done.", "objective.anchor_prob=1"], "anchor_prob=1.0, .* leave it out"),
        (["traces.closing=Done.", "objective.schedule.call=none"], "schedule.call=none"),
        (
            ["traces.closing=Done.", "method=chord", "method_config.mu_start=0", "method_config.mu_end=0"],
            "method_config.mu_start=0.0, method_config.mu_end=0.0",
        ),
        (["traces.closing=Done.", "method=luffy", "traces.share=0"], "traces.share=0.0"),
    ],
)
def test_a_setting_that_nothing_would_read_is_refused(words: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_config(None, ["warmup.steps=0", *words])


def test_a_closing_is_taught_by_the_weight_that_the_method_has() -> None:
    """CHORD weighs its SFT term by mu; ``objective.sft_coef`` is not read there."""
    for method in ("chord", "luffy"):
        config = load_config(
            None, ["warmup.steps=0", "traces.closing=Done.", f"method={method}", "objective.sft_coef=0"]
        )
        assert config.traces.closing == "Done."


def test_advice_names_no_weight_of_a_term_that_is_off() -> None:
    flat = [{"held_out/trace_call": value} for value in (-0.5, -0.3, -0.3, -0.3)]
    falling = [{"held_out/trace_call": value} for value in (-0.3, -0.4, -0.5, -0.6)]
    assert "objective.sft_coef lowered" in advice(run_of(*flat, steps=4))[0].change
    for settings in (
        {"objective__anchor_prob": 1.0},
        {"traces__share": 0.0},
        {"objective__schedule__call": "none", "objective__schedule__reasoning": "none"},
        {"objective__schedule__call": "none"},  # reasoning is taught; calls, which were measured, are not
    ):
        assert advice(told_with(run_of(*flat, steps=4), **settings)) == []
        change = advice(told_with(run_of(*falling, steps=4), **settings))[0].change
        assert "RL forgets the traces" in change and "sft_coef" not in change


def test_a_gap_that_only_scatters_or_is_a_controls_is_no_reliance() -> None:
    grown = [{"latent/gap_success": value} for value in (0.1, 0.12, 0.1, 0.12, 0.5, 0.52, 0.5, 0.52)]
    assert keys(run_of(*grown)) == ["reliance"]
    assert keys(told_with(run_of(*grown), traces__control="none")) == []
    noise = [{"latent/gap_success": value} for value in (0.30, 0.31, 0.302, 0.29, 0.311, 0.30, 0.32, 0.30)]
    assert keys(run_of(*noise)) == []
    below = [{"latent/gap_success": value} for value in (-0.3, -0.3, -0.31, -0.3, -0.1, -0.1, -0.1, -0.1)]
    assert keys(run_of(*below)) == []


def test_what_is_measured_without_a_value_is_not_called_off() -> None:
    measures = {"diagnostics__gradient_every": 1, "diagnostics__trace_every": 2, "evaluation__every": 5}
    assert unmeasured(told_with(run_of(), **measures)) == []
    sft = run_of(steps=0, warmup=[{"step": 1, "stage": "warmup"}])
    assert [key for _, key in unmeasured(sft)] == ["evaluation.every", "diagnostics.trace_every"]


def test_the_clock_goes_by_the_gap_of_all_tokens() -> None:
    """One success of 100 tokens among failures of 20,000 is no half of the gap."""

    def prompt(length: int, gap: float, success: bool) -> tuple[Any, torch.Tensor]:
        rollout = SimpleNamespace(outcome=SimpleNamespace(success=success))
        spans = {(PROMPT_ONLY, 0): (0, length), (TRACE_CONDITIONED, 0): (length, 2 * length)}
        values = torch.cat([torch.full((length,), -1.0), torch.full((length,), gap - 1.0)])
        return SimpleNamespace(group=SimpleNamespace(rollouts=[rollout], trace=None), spans=spans), values

    prompts, values = zip(prompt(100, 2.0, True), prompt(20_000, 0.1, False), strict=True)
    found = latent(list(prompts), list(values))
    assert found["latent/gap_success"] == pytest.approx(2.0) and found["latent/gap_failure"] == pytest.approx(0.1)
    assert found["latent/gap"] == pytest.approx((200 + 2000) / 20_100, rel=1e-5)
    assert latent([], [])["latent/gap"] is None


def test_a_warm_up_that_was_cut_keeps_no_horizon() -> None:
    """Nothing was annealed yet, so a longer run anneals over its own steps; after a step the first horizon stays."""
    short = new_state(load_config(None, ["trainer.steps=4"]))
    for step, horizon in ((0, 24), (1, 4)):
        longer = new_state(load_config(None, ["trainer.steps=24"]))
        longer.load(short.as_row() | {"step": step}, "state.json")
        assert longer.clock.state()["horizon"] == horizon


def test_an_alarm_of_a_control_does_not_doubt_the_traces() -> None:
    limits = load_config(None).alarms
    said = spikes({"latent/gap_success": 99.0}, limits)
    assert said and "whether the traces fit their tasks" in said[0] and "traces.control" in said[0]


def test_the_report_places_a_run_by_its_rollouts_and_precision(tmp_path: Path) -> None:
    folder = make_run(tmp_path, steps=2)
    summary = json.loads((folder / "summary.json").read_text())
    told = {"trainer": "fp32", "server": "float32", "export": "float32"}
    (folder / "summary.json").write_text(json.dumps(summary | {"precision": told}))
    run = load_run(folder)
    prompts, each = run.setting("trainer.batch_size"), run.setting("objective.group_size")
    found = dict(facts(run))
    assert found["Precision"] == "trainer fp32, server float32, export float32"
    assert found["Rollouts a step"].replace("\u202f", "") == f"{prompts * each} ({prompts} x {each})"
    assert "Precision" not in dict(facts(replace(run, summary=summary)))  # of before it was kept
