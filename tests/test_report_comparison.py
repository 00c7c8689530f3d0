"""Runs side by side: what counts as one method, where its mean ends, and what SFT is compared with."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from fixtures.run_folders import make_run

from pact_nemo.report import write_report
from pact_nemo.report.charts import Chart
from pact_nemo.report.comparison import compare, differences, learning_curves
from pact_nemo.report.data import Run, load_run
from pact_nemo.report.page import render


def run_of(method: str, seed: int, *, own: dict[str, Any] | None = None, success: tuple[float, ...] = ()) -> Run:
    config = {"run": {"seed": seed}, "method": method, "method_config": own or {}}
    records = [{"step": i, "stage": "rl", "reward/success": value} for i, value in enumerate(success, 1)]
    return Run(Path(f"runs/{method}{seed}"), {}, config, "", [], records)


def test_a_methods_own_settings_are_told_where_its_runs_differ() -> None:
    chord = [run_of("chord", seed, own={"mu_start": mu}) for seed, mu in ((1, 0.9), (2, 0.5))]
    assert differences(chord) == [("method_config.mu_start", ["0.9", "0.5"])]
    assert differences([*chord, run_of("grpo", 1)]) == [("method_config.mu_start", ["0.9", "0.5", "–"])]
    assert "method_config.mu_start" in render(chord[0], chord[1:])
    alike = [run_of("chord", seed, own={"mu_start": 0.9}) for seed in (1, 2)]
    assert differences([*alike, run_of("grpo", 1), run_of("toolrl", 1, own={"strict": True})]) == []


def test_runs_of_one_label_that_are_no_seeds_of_one_setting_are_named() -> None:
    arms = [run_of("pact", 1) for _ in range(3)]
    for run, control in zip(arms, (None, "none", "other_task"), strict=True):
        run.config["traces"] = {"control": control}
    unlike, shared = compare(arms).warnings[:2]
    assert "The runs of pact differ in traces.control," in unlike and "run.label" in unlike
    assert "Runs of pact share seed 1" in shared and "differ in traces.control" in render(arms[0], arms[1:])
    for run in arms:
        run.config["run"]["label"] = run.summary["label"] = f"pact_{run.setting('traces.control')}"
    seeds = [run_of("grpo", seed) for seed in (1, 2)]
    assert not [text for text in compare([*arms, *seeds]).warnings if "differ" in text or "share" in text]


def readings(chart: Chart, method: str) -> list[str]:
    return next(series.readings for series in chart.series if series.label == method)


def test_a_mean_over_seeds_ends_with_its_shortest_run() -> None:
    runs = [run_of("pact", 1, success=(0.1,) * 10), run_of("pact", 2, success=(0.5,) * 20)]
    runs += [run_of("grpo", 1, success=(0.2,) * 20), run_of("pact", 3)]
    (chart,) = learning_curves(runs)
    assert "as far as all of them go" in chart.note
    pact = readings(chart, "pact")
    assert pact[:10] == ["30 %"] * 10 and len(set(pact[10:])) == 1
    assert "50 %" not in pact and "30 %" not in pact[10:]
    assert readings(chart, "grpo") == ["20 %"] * 20


@pytest.fixture
def sft(tmp_path: Path) -> Path:
    """SFT alone: its evaluations before and after RL are of the same weights."""
    folder = make_run(tmp_path, method="pact", steps=1, warmup=4, passed=(3, 9, 9))
    config = (folder / "config.yaml").read_text()
    config = config.replace("\nmethod: pact\n", "\nmethod: sft\n").replace("  steps: 1\n", "  steps: 0\n", 1)
    (folder / "config.yaml").write_text(config)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["stage"] == "warmup"))
    (folder / "eval" / "after.jsonl").write_text((folder / "eval" / "before.jsonl").read_text())
    return folder


def test_sft_is_compared_with_the_model_as_published(sft: Path) -> None:
    run = load_run(sft)
    assert run.setting("method") == "sft" and not run.has_rl and run.start() == "base"
    assert [(stage.name, stage.label) for stage in run.stages()] == [
        ("base", "as published"),
        ("before", "after warm-up"),
        ("after", "at the end"),
    ]
    page = " ".join(render(run).split())
    assert "+25.0 points on 24 held-out episodes, by the environment's own verdict, before and after SFT." in page
    assert "6 gained, 0 lost" in page and "after RL" not in page and "before RL" not in page
    assert compare([run]).methods[0].change == pytest.approx(0.25)


def test_sft_without_a_score_of_the_published_model_has_no_change(sft: Path) -> None:
    summary = json.loads((sft / "summary.json").read_text())
    del summary["eval"]["base"]
    (sft / "summary.json").write_text(json.dumps(summary))
    (sft / "eval" / "base.jsonl").unlink()
    run = load_run(sft)
    assert run.start() is None and compare([run]).methods[0].change is None
    assert "There is no score before SFT to compare with" in render(run)


def test_scores_of_validation_tasks_are_called_so(tmp_path: Path) -> None:
    folder = make_run(tmp_path, steps=2)
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(re.sub(r"(?m)^  validation: 0$", "  validation: 8", config))
    page = write_report(folder).read_text(encoding="utf-8")
    assert "points on 24 validation episodes" in page and "Validation score with its 95 %" in page
    assert "Validation tasks" in page and "held-out episode" not in page
