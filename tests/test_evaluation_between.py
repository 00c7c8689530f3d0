"""Held-out scores between steps (``evaluation.every``)."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pact_nemo.config.load import load_config
from pact_nemo.errors import ConfigError, Interrupted, ServerError, ServerLost
from pact_nemo.report.advice import advice, unmeasured
from pact_nemo.report.curves import held_out_scores, rl_curves, warmup_curves
from pact_nemo.report.data import Run
from pact_nemo.training import evaluation, loop, warmup
from pact_nemo.training.recorder import Recorder
from pact_nemo.training.state import new_state
from pact_nemo.training.stopwatch import Stopwatch
from tests.workers.recipe_runs import recipe, records, weights

SMALL = [
    "trainer.replay=null",
    "trainer.steps=2",
    "warmup.steps=2",
    "rollout.sampling.concurrency=1",
    "rollout.sampling.max_turn_tokens=16",
    "rollout.sampling.max_turns=2",
    "rollout.server.max_model_len=512",
    "rollout.server.cpu_threads=1",
    "trainer.batch_size=2",
    "objective.group_size=2",
]


def learnt(run: Path) -> list[dict[str, Any]]:
    """A run's records without what was measured and what refits took."""
    return [{k: v for k, v in row.items() if not k.startswith(("refit/", "held_out/"))} for row in records(run)]


def test_a_run_that_is_scored_between_its_steps_learns_the_same(stage: dict[str, Any]) -> None:
    """A real server, with and without: not a bit of what is trained differs, and every step between has a score."""
    plain = recipe(stage, "scored-ends", *SMALL, "evaluation.before=false")
    scored = recipe(stage, "scored-between", *SMALL, "evaluation.every=1")
    assert learnt(scored) == learnt(plain)
    one, other = weights(plain), weights(scored)
    assert one.keys() == other.keys() and all(torch.equal(other[name], value) for name, value in one.items())
    rows = {(row["stage"], row["step"]): row.get("held_out/score") for row in records(scored)}
    assert {place for place, score in rows.items() if score is not None} == {("warmup", 1), ("rl", 1)}
    # the last step of a stage is what `before` and `after` play
    assert not any("held_out/score" in row for row in records(plain))
    played = {str(path.relative_to(scored / "eval")) for path in (scored / "eval").rglob("*.jsonl")}
    between = {"warmup/step_000001.jsonl", "rl/step_000001.jsonl"}
    assert played == {"base.jsonl", "before.jsonl", "after.jsonl"} | between
    report = (scored / "report.html").read_text()
    assert report.count("Held-out score</") >= 2


def stand_in(played: Any, *words: str) -> Any:
    """What the measurement touches of a run."""
    said: list[str] = []
    progress = SimpleNamespace(message=said.append, phase=lambda *_, **__: nullcontext())
    config = load_config(None, ["trainer.steps=10", *words])
    sharing = SimpleNamespace(seconds=0.0)
    return SimpleNamespace(config=config, progress=progress, said=said, played=played, sharing=sharing)


def test_when_a_score_is_due() -> None:
    run = stand_in(None, "evaluation.every=3")
    assert [step for step in range(1, 10) if evaluation.due_between(run, step, 9)] == [3, 6]
    never = stand_in(None)
    assert not any(evaluation.due_between(never, step, 9) for step in range(1, 10))
    with pytest.raises(ConfigError, match=r"evaluation\.every=-1"):
        load_config(None, ["evaluation.every=-1", "trainer.steps=10"])


def test_one_that_a_signal_cuts_off_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    run = stand_in(None)

    def cut(*_: Any) -> None:
        raise Interrupted("SIGTERM")

    monkeypatch.setattr(evaluation, "played", cut)
    watch = Stopwatch(run.progress)
    record: dict[str, Any] = {}
    assert evaluation.score_between(run, "rl", 4, record, watch) is None
    assert record == {} and "time/evaluation" in watch.times
    assert run.said == ["the evaluation after rl step 4 was cut off; it has no score"]


@pytest.mark.parametrize(
    ("name", "warmup_step", "step", "said"),
    [
        ("base", 0, 0, None),
        ("before", 4, 0, None),
        ("after", 4, 10, None),
        ("base", 2, 0, "no held-out score base: the warm-up is past 2 steps, its weights are gone"),
        ("before", 4, 1, "no held-out score before: RL is past 1 step, its weights are gone"),
    ],
)
def test_a_score_whose_weights_are_gone_is_left_out_and_said(
    monkeypatch: pytest.MonkeyPatch, name: str, warmup_step: int, step: int, said: str | None
) -> None:
    """``evaluation.before`` may be switched on as a run is resumed."""
    score = SimpleNamespace(to_dict=lambda: {"score": 0.5}, seconds=1.0)
    monkeypatch.setattr(evaluation, "played", lambda *_: score)
    run = stand_in(None, "warmup.steps=4")
    run.state = new_state(run.config)
    run.state.warmup_step, run.state.step = warmup_step, step
    run.recorder = Recorder(run.state, run.progress)
    evaluation.evaluate(run, name)
    assert (run.said, list(run.state.scores)) == (([], [name]) if said is None else ([said], []))


class GaveUp(Exception):
    pass


def lost_run(*words: str) -> Any:
    """Enough of a run for its loops; what it does of recording and checkpointing is in ``did``."""
    did: list[str] = []

    def give_up(problem: Exception) -> None:
        did.append("checkpointed")
        raise GaveUp from problem

    def phase(*_: Any, **__: Any) -> Any:
        return nullcontext(SimpleNamespace(advance=lambda: None))

    return SimpleNamespace(
        config=load_config(None, ["trainer.steps=10", "evaluation.every=1", *words]),
        total_steps=10,
        progress=SimpleNamespace(message=lambda text: None, phase=phase),
        state=SimpleNamespace(step=3, warmup_step=0, spend=lambda *_: None, seconds={}),
        sharing=SimpleNamespace(taken=dict, trainer=lambda **_: None, engines=lambda: None, seconds=0.0),
        checkpoints=SimpleNamespace(leave_if_asked=lambda: None, give_up=give_up),
        recorder=SimpleNamespace(step=lambda stage, record: did.append("recorded"), spend=lambda record: 0.0),
        weights=SimpleNamespace(refit=lambda: None),
        dataset=SimpleNamespace(held_out_traces=[], warmup_tasks=lambda count: []),
        did=did,
    )


@pytest.mark.parametrize("problem", [ServerLost("given up after 3 restarts"), ServerError("all episodes failed")])
@pytest.mark.parametrize("stage_of_run", ["rl", "warmup"])
def test_a_server_that_is_lost_meanwhile_loses_no_step(
    monkeypatch: pytest.MonkeyPatch, problem: Exception, stage_of_run: str
) -> None:
    def lost(*_: Any) -> None:
        raise problem

    monkeypatch.setattr(evaluation, "played", lost)
    run = lost_run("warmup.steps=5")
    monkeypatch.setattr(warmup, "prompts_of_step", lambda *_: [])
    monkeypatch.setattr(warmup, "sft_step", lambda *_: {})
    for name, value in (("collect", ([], None)), ("start_ahead", None), ("observe", {}), ("refit", None)):
        monkeypatch.setattr(loop, name, lambda *_, value=value: value)
    monkeypatch.setattr(loop, "update", lambda *_: {"tokens/policy": 0})
    with pytest.raises(GaveUp):
        loop.train(run) if stage_of_run == "rl" else warmup.warm_up(run, lambda *_: None)
    assert run.did == ["recorded", "checkpointed"]


def test_seconds_of_a_scored_warm_up_step_are_counted_once() -> None:
    config = load_config(None, ["trainer.steps=10"])
    recorder = Recorder(new_state(config), SimpleNamespace(step_line=lambda row: None))  # type: ignore[arg-type]
    recorder.trackers = SimpleNamespace(append=lambda row: None)  # type: ignore[assignment]
    recorder.step("warmup", {"time/refit": 2.0, "time/evaluation": 30.0, "time/total": 40.0})
    assert recorder.state.seconds == {"refit": 2.0, "evaluation": 30.0, "warmup": 8.0}


def scored_run(*scores: float | None, ends: dict[str, float], warmup: tuple[float | None, ...] = ()) -> Run:
    def rows(stage: str, values: tuple[float | None, ...]) -> list[dict[str, Any]]:
        return [{"step": i, "stage": stage, "held_out/score": value} for i, value in enumerate(values, 1)]

    summary = {"eval": {name: {"score": score, "n": 100} for name, score in ends.items()}}
    return Run(Path("runs/r"), summary, {}, "", rows("warmup", warmup), rows("rl", scores))


def test_a_curve_begins_and_ends_with_the_stage() -> None:
    run = scored_run(None, 0.4, None, ends={"base": 0.0, "before": 0.3, "after": 0.5}, warmup=(None, 0.1, None, None))
    points = {
        stage: [(row["step"], row["held_out/score"]) for row in held_out_scores(run, stage)]
        for stage in ("warmup", "rl")
    }
    assert points == {"warmup": [(0, 0.0), (2, 0.1), (4, 0.3)], "rl": [(0, 0.3), (2, 0.4), (3, 0.5)]}
    for charts in (warmup_curves(run), rl_curves(run)):
        assert charts[0].title == "Held-out score"
    plain = scored_run(None, None, ends={"before": 0.3, "after": 0.5})
    assert len(held_out_scores(plain, "rl")) == 2
    assert all(chart.title != "Held-out score" for chart in rl_curves(plain)), "two ends are no curve"


def test_the_curve_of_sft_ends_with_the_run() -> None:
    run = scored_run(ends={"base": 0.0, "after": 0.5}, warmup=(0.2, None))
    assert [row["held_out/score"] for row in held_out_scores(run, "warmup")] == [0.0, 0.2, 0.5]


def test_a_run_that_only_harmed_is_told() -> None:
    found = advice(scored_run(0.48, None, ends={"before": 0.5, "after": 0.01}))
    assert [one.key for one in found] == ["past_best"]
    assert "0.500 before the first step and is 0.010" in found[0].finding and "optimizer.lr" in found[0].change
    unseen = scored_run(None, None, ends={"before": 0.5, "after": 0.01})  # as by default: nothing between the ends
    assert [one.finding for one in advice(unseen)] == [one.finding for one in found]
    assert ("the held-out score between the steps", "evaluation.every") in unmeasured(unseen)


@pytest.mark.parametrize(("end", "told"), [(0.3, True), (0.42, False), (0.6, False)])
def test_a_run_that_was_better_before_its_end_is_told(end: float, told: bool) -> None:
    """0.5 and 0.42 of 100 tasks are within two standard errors of their difference, 0.14."""
    rl = advice(scored_run(0.5, None, ends={"before": 0.2, "after": end}))
    sft = advice(scored_run(ends={"after": end}, warmup=(0.5, None)))
    assert [found.key for found in rl] == [found.key for found in sft] == (["past_best"] if told else [])
    if told:
        assert "0.500 after step 1 and is 0.300" in rl[0].finding
        assert "trainer.steps" in rl[0].change and "warmup.steps" in sft[0].change


def test_the_best_of_many_evaluations_is_no_alarm_by_itself() -> None:
    """A policy that stays as it is, scored 21 times on 100 tasks: two standard errors would be passed in every fifth
    run."""
    rng = np.random.default_rng(0)
    alarms = 0
    for row in rng.binomial(100, 0.4, size=(400, 21)) / 100:
        before, *between, after = row.tolist()
        alarms += "past_best" in [
            one.key for one in advice(scored_run(*between, ends={"before": before, "after": after}))
        ]
    assert alarms / 400 < 0.05


def test_what_counts_as_a_worse_end() -> None:
    run = scored_run(0.5, None, ends={"before": 0.2, "after": 0.3})
    assert [one.key for one in advice(run)] == ["past_best"]
    run.config = {"evaluation": {"samples": 10}}
    assert advice(run) == [], "a hundred episodes of ten tasks"
    run.config = {}
    for failed, told in ((3, True), (20, False)):
        run.summary["eval"]["after"]["failed"] = failed
        assert bool(advice(run)) == told, "20 episodes that failed through no fault of the policy count 0"
