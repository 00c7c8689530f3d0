"""What the report says in words: each rule on numbers that are on one side of its limit and on the other."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from pact_nemo.report.advice import advice
from pact_nemo.report.data import Run
from pact_nemo.report.page import render

CONFIG: dict[str, Any] = {"trainer": {"batch_size": 10, "mini_batch_size": 10}, "objective": {"group_size": 4}}
STEP: dict[str, Any] = {
    "stage": "rl",
    "rollout/count": 40,
    "groups/zero_advantage": 2,
    "reward/success": 0.5,
    "rollout/truncated_turn_tokens": 0,
    "rollout/truncated_turns": 0,
    "rollout/truncated_response_tokens": 0,
}


def run_of(*changes: dict[str, Any], steps: int = 8, warmup: list[dict[str, Any]] | None = None) -> Run:
    """A run whose i-th step has the i-th changes, the last ones from there on."""
    records = [STEP | {"step": i + 1} | (changes[min(i, len(changes) - 1)] if changes else {}) for i in range(steps)]
    return Run(Path("runs/r"), {}, CONFIG, "", warmup or [], records)


def told_with(run: Run, **settings: Any) -> Run:
    """The run with further settings, dots written as two underscores."""
    run.config = copy.deepcopy(run.config)
    for name, value in settings.items():
        *sections, key = name.split("__")
        place = run.config
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
    return run


def keys(run: Run) -> list[str]:
    return [found.key for found in advice(run)]


def test_a_healthy_run_is_told_nothing_and_one_without_steps_neither() -> None:
    assert advice(run_of()) == [] == advice(run_of(steps=0))


@pytest.mark.parametrize(
    ("success", "says"),
    [(0.0, "start from a better one"), (0.5, "objective.group_size"), (0.95, "The tasks are solved")],
)
def test_groups_without_an_advantage(success: float, says: str) -> None:
    found = advice(run_of({"groups/zero_advantage": 6, "reward/success": success}))
    assert (
        [a.key for a in found] == ["same_scores"]
        and says in found[0].change
        and found[0].finding.startswith("60% of the groups")
    )
    assert keys(run_of({"groups/zero_advantage": 5, "reward/success": success})) == []


@pytest.mark.parametrize(
    ("limit", "says"),
    [("turn_tokens", "max_turn_tokens"), ("turns", "traces.closing"), ("response_tokens", "max_response_tokens")],
)
def test_rollouts_that_were_cut(limit: str, says: str) -> None:
    found = advice(run_of({f"rollout/truncated_{limit}": 11}))
    assert (
        [a.key for a in found] == ["cut_rollouts"]
        and says in found[0].change
        and "28%" in found[0].finding
        and ", 28% " in found[0].finding
    )
    assert keys(run_of({f"rollout/truncated_{limit}": 10})) == []


def test_a_policy_that_unlearnt_how_to_end() -> None:
    def cut(count: int) -> list[dict[str, Any]]:
        row = {"status": "ok", "outcome": None, "task": {"category": "c"}}
        return [row | {"limit": "turns" if index < count else None} for index in range(8)]

    run = run_of()
    run.episodes = {"before": cut(1), "after": cut(8)}
    found = advice(run)
    assert [a.key for a in found] == ["closing"] and "100% of the held-out episodes" in found[0].finding
    assert "12% before" in found[0].finding
    for before, after in ((1, 3), (8, 1), (8, 8)):
        run.episodes = {"before": cut(before), "after": cut(after)}
        assert keys(run) == []
    run.episodes = {"after": cut(8)}
    assert keys(run) == [], "nothing to compare with"
    stuck = [{**row, "turns": [{"text": "[a()]"}] * 2} for row in cut(5)[:5]] + cut(8)[5:]
    run.episodes = {"before": cut(1), "after": stuck}
    (found,) = advice(run)
    assert "5 of them repeat their last message" in found.finding and "warmup.steps" in found.change


def test_a_batch_that_is_mostly_noise_is_told_with_the_prompts_that_it_would_need() -> None:
    def signal(term: str, product: float, norm: float = 2.0) -> dict[str, float]:
        return {f"signal/{term}_product": product, f"signal/{term}_norm": norm}

    found = advice(run_of(signal("rl", 0.1) | signal("sft", 0.6)))
    assert [a.key for a in found] == ["rl_noise"]
    assert (
        "10% of the RL gradient is signal at 10 prompts" in found[0].finding and "about 90 prompts" in found[0].finding
    )  # 10 * 0.9 / 0.1
    assert "no number of prompts" in advice(run_of(signal("sft", -0.1)))[0].finding
    assert keys(run_of(signal("rl", 0.3), signal("rl", 0.1), {})) == []  # 4 * 0.4 / 8: 20 %
    assert keys(run_of(signal("rl", 0.5), signal("rl", 0.0, norm=6.0), {})) == ["rl_noise"], "by the sums: 5 %"


def norms(rl: float, sft: float, **settings: Any) -> Run:
    signal = {"signal/rl_norm": rl, "signal/sft_norm": sft, "signal/rl_product": rl**2, "signal/sft_product": sft**2}
    return told_with(run_of(signal), **settings)


def test_a_term_that_outweighs_the_other() -> None:
    (found,) = advice(norms(0.5, 6.0, objective__sft_coef=0.3))
    assert found.key == "balance" and "The gradient of SFT is 12 times as long as that of RL" in found.finding
    assert "objective.sft_coef=0.3 in that of SFT" in found.finding, "the norm has the coefficient in it"
    assert found.change.startswith("objective.sft_coef=0.025 would"), "0.3 / 12"
    (found,) = advice(norms(6.0, 0.5, objective__sft_coef=0.1))
    assert "of RL is 12 times" in found.finding and found.change.startswith("objective.sft_coef=1.2 would")
    assert keys(norms(1.0, 5.0)) == [] == keys(norms(5.0, 1.0)) == keys(norms(6.0, 0.5, objective__sft_coef=0))
    assert keys(norms(0.5, 6.0, method="chord")) == [], "it has two weights"


def test_updates_below_the_resolution_of_bfloat16() -> None:
    found = advice(
        run_of({"policy/moved": 0.01, "policy/updates": 2}, warmup=[{"stage": "warmup", "policy/moved": 0.02}])
    )
    assert [a.key for a in found] == ["resolution"] and "All 9 steps together changed at most 18% of" in found[
        0
    ].finding
    assert keys(run_of({"policy/moved": 0.04})) == [], "32 % of them"


def test_imitation_that_is_saturated_or_forgotten() -> None:
    def with_traces(values: list[float]) -> Run:
        warmup = [
            {"step": i + 1, "stage": "warmup", "held_out/trace_call": value} for i, value in enumerate(values[:-1])
        ]
        return run_of({}, {}, {"held_out/trace_call": values[-1]}, {}, steps=4, warmup=warmup)

    assert keys(with_traces([-1.0, -0.5, -0.2])) == []
    assert "saturated" in advice(with_traces([-1.0, -0.2, -0.2, -0.199]))[0].change
    assert "forgets or overfits" in advice(with_traces([-1.0, -0.2, -0.25]))[0].change
    assert keys(with_traces([-0.2, -0.3])) == []  # two measurements show no trend


def likelihoods(*rl: float, warmup: tuple[float, ...] = (), **settings: Any) -> Run:
    """A run that measured held-out traces in every step."""
    records = [{"step": i, "stage": "warmup", "held_out/trace_call": value} for i, value in enumerate(warmup, 1)]
    return told_with(
        run_of(*({"held_out/trace_call": value} for value in rl), steps=len(rl), warmup=records), **settings
    )


@pytest.mark.parametrize("method", ["grpo", "matchtir", "ftrl", "toolrl", "luffy"])
def test_a_method_without_an_sft_term_is_not_told_of_its_weight(method: str) -> None:
    assert keys(likelihoods(-0.5, -0.5, -0.5, method=method)) == []
    assert keys(likelihoods(-0.5, -0.5, warmup=(-0.9, -0.5), method=method)) == [], "two of the warm-up are no trend"
    (found,) = advice(likelihoods(-0.5, -0.6, -0.7, method=method))
    assert "lower optimizer.lr, or raise objective.kl_coef" in found.change and "sft_coef" not in found.change
    (found,) = advice(likelihoods(-0.2, -0.2, warmup=(-0.9, -0.2, -0.2), method=method))
    assert "Fewer warmup.steps" in found.change and "sft_coef" not in found.change
    (found,) = advice(likelihoods(-0.5, -0.5, warmup=(-0.9, -0.2, -0.5), method=method))
    assert "lower warmup.lr or warmup.steps" in found.change, "it was the warm-up that lost"


@pytest.mark.parametrize("method", ["chord", "chord_phi"])
def test_chord_is_told_of_its_own_weight_of_sft(method: str) -> None:
    both = "method_config.mu_start and method_config.mu_end"
    for values in ((-0.5, -0.5, -0.5), (-0.5, -0.6, -0.7)):
        (found,) = advice(likelihoods(*values, method=method))
        assert both in found.change and "sft_coef" not in found.change
    noisy = run_of({"signal/sft_product": 0.1, "signal/sft_norm": 2.0})
    (found,) = advice(told_with(noisy, method=method))
    assert found.key == "sft_noise" and both in found.change and "sft_coef" not in found.change
    assert keys(likelihoods(-0.5, -0.5, -0.5, method=method, method_config={"mu_start": 0.0, "mu_end": 0.0})) == []


def test_a_method_from_outside_is_judged_by_its_losses() -> None:
    assert keys(likelihoods(-0.5, -0.5, -0.5, method="gone.py:Mine")) == []
    run = likelihoods(-0.5, -0.5, -0.5, method="gone.py:Mine")
    run.rl[0]["loss/sft_call"] = 0.1
    (found,) = advice(run)
    assert "objective.sft_coef" in found.change


def test_sft_alone_is_told_of_the_warm_ups_settings() -> None:
    moved = [{"step": 1, "stage": "warmup", "policy/moved": 0.02}]
    (found,) = advice(told_with(run_of(steps=0, warmup=moved), method="sft"))
    assert found.key == "resolution" and "warmup.lr" in found.change and "optimizer.lr" not in found.change
    (found,) = advice(likelihoods(warmup=(-0.9, -0.2, -0.2), method="sft"))
    assert "Go on by RL" in found.change
    open_ends = told_with(run_of(steps=0, warmup=[{"step": 1, "stage": "warmup"}]), method="sft")
    row: dict[str, Any] = {"status": "ok", "outcome": None, "task": {"category": "c"}}
    open_ends.episodes = {"base": [row] * 4, "before": [row | {"limit": "turns"}] * 4}
    open_ends.episodes["after"] = open_ends.episodes["before"]
    (found,) = advice(open_ends)
    assert found.key == "closing" and "(warmup.closing), lower warmup.lr or warmup.steps." in found.change


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"method": "pact"}, "nothing teaches a final answer. Teach a closing message (traces.closing), lower opt"),
        ({"method": "pact", "traces__closing": "Done."}, "unlearnt how to end. Lower optimizer.lr"),
        ({"method": "grpo"}, "nothing teaches a final answer. Lower optimizer.lr"),
        ({"method": "grpo", "warmup__steps": 4}, "Teach a closing message (warmup.closing), lower"),
        ({"method": "grpo", "warmup__steps": 4, "warmup__closing": "Done."}, "unlearnt how to end. Lower"),
    ],
)
def test_what_would_teach_an_end(settings: dict[str, Any], says: str) -> None:
    run = told_with(run_of({"rollout/truncated_turns": 11}), **settings)
    row: dict[str, Any] = {"status": "ok", "outcome": None, "task": {"category": "c"}}
    run.episodes = {"before": [row] * 4, "after": [row | {"limit": "turns"}] * 4}
    cut, closing = advice(run)
    assert (cut.key, closing.key) == ("cut_rollouts", "closing") and says in closing.change
    for key in ("traces.closing", "warmup.closing"):
        assert (key in cut.change) == (key in closing.change) == (f"({key})" in says)


def test_a_privilege_gap_that_grows() -> None:
    gaps = [{"latent/gap_success": value} for value in (0.1, 0.1, 0.1, 0.1, 0.5, 0.5, 0.5, 0.5)]
    assert keys(run_of(*gaps)) == ["reliance"] and keys(run_of(*reversed(gaps))) == []


def test_the_page_shows_it() -> None:
    page = render(run_of({"groups/zero_advantage": 6}))
    assert "What the numbers say" in page and "60% of the groups had no advantage" in page
    healthy = render(run_of())
    assert "No rule found anything to change." in healthy
    assert "Not measured, so no rule looked at it" in healthy and "<code>diagnostics.gradient_every</code>" in healthy
    assert "in the last step, at" in advice(run_of({"groups/zero_advantage": 6}, steps=1))[0].finding
