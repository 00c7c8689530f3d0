"""Intervals and tests of the report hold what they promise: over seeds that scatter, and over tasks that were played
several times.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.run_folders import make_run
from scipy.stats import t

from pact_nemo.errors import DataError
from pact_nemo.report.data import load_run
from pact_nemo.report.page import render, score_of
from pact_nemo.report.stats import Paired, difference, pair, paired_bootstrap, seeds_interval, wilson

TASKS = 300


def scores_of(rng: np.random.Generator, seeds: int) -> dict[int, dict[str, float]]:
    """One method's verdicts: tasks of an even chance, and seeds that scatter by 0.1."""
    chance = np.clip(0.5 + rng.normal(0.0, 0.1, size=(seeds, 1)), 0.0, 1.0)
    passed = rng.random((seeds, TASKS)) < chance
    return {seed: {str(task): float(ok) for task, ok in enumerate(row)} for seed, row in enumerate(passed)}


@pytest.mark.parametrize(("seeds", "alone"), [(3, 0.9), (5, 0.95)])
def test_the_interval_of_a_difference_covers_it_where_seeds_scatter(seeds: int, alone: float) -> None:
    """Two methods of the same chance: their difference is 0, whatever the seeds do. ``alone``: more than what the
    bootstrap covers by itself."""
    rng = np.random.default_rng(0)
    draws, covered, by_bootstrap = 300, 0, 0
    for _ in range(draws):
        ours, theirs = scores_of(rng, seeds), scores_of(rng, seeds)
        found = difference(ours, theirs, draws=400)
        assert found is not None and found.interval is not None
        covered += found.interval[0] <= 0.0 <= found.interval[1]
        sides = ({task: [side[seed][task] for seed in side] for task in side[0]} for side in (ours, theirs))
        low, high = paired_bootstrap(*sides, draws=400)
        by_bootstrap += low <= 0.0 <= high
        assert found.interval[0] <= low and high <= found.interval[1]
    assert covered / draws >= 0.95 and by_bootstrap / draws < alone


def test_below_three_seeds_a_difference_has_no_interval() -> None:
    rng = np.random.default_rng(0)
    for seeds, has in ((1, False), (2, False), (3, True)):
        found = difference(scores_of(rng, seeds), scores_of(rng, seeds), draws=50)
        assert found is not None and (found.interval is not None) == has and ("[" in str(found)) == has


def test_the_interval_of_seeds_is_the_t_interval() -> None:
    values = [0.1, 0.3, 0.35]
    low, high = t.interval(0.95, 2, loc=np.mean(values), scale=np.std(values, ddof=1) / np.sqrt(3))
    assert seeds_interval(values) == pytest.approx((low, high))
    with pytest.raises(ValueError, match="at least 2"):
        seeds_interval([0.1])


def rows(passes: list[int], samples: int) -> list[dict[str, Any]]:
    """Episodes of tasks that pass so many of their samples."""
    return [
        {"task_id": f"t{task}", "sample": sample, "outcome": {"success": sample < count}}
        for task, count in enumerate(passes)
        for sample in range(samples)
    ]


def test_samples_of_a_task_are_no_tasks_in_the_sign_test() -> None:
    """10 tasks, two of which gain all of 16 episodes: chance does that in every second case."""
    found = pair(rows([0] * 10, 16), rows([16, 16, *[0] * 8], 16))
    assert found == Paired(gained=2, lost=0, kept=0, neither=8) and found.p_value == pytest.approx(0.5)
    assert pair(rows([4, 4, 4, 0], 16), rows([5, 3, 4, 0], 16)) == Paired(gained=1, lost=1, kept=1, neither=1)
    lost = rows([16, 0], 16)
    for row in lost[1:17]:
        row["outcome"] = None
    assert pair(rows([16, 0], 16), lost) == Paired(gained=0, lost=0, kept=1, neither=1), "one pair each says it"


def test_the_interval_of_a_score_counts_tasks(tmp_path: Path) -> None:
    run = load_run(make_run(tmp_path, steps=2, warmup=2, tasks=24))
    row = {"score": 0.25, "n": 24}
    plain = score_of(run, row)
    assert (plain.n, plain.low, plain.high) == (24, *wilson(6, 24))
    run.config["evaluation"]["samples"] = 4
    several = score_of(run, row)
    assert (several.n, several.low, several.high) == (24, *wilson(1.5, 6))
    page = " ".join(render(run).split())
    assert "By task: 7 passed more often, 1 less often, 2 as often, 14 never." in page and "over tasks" in page


def test_a_score_of_null_is_refused_by_name_and_a_missing_one_is_the_verdict(tmp_path: Path) -> None:
    folder = make_run(tmp_path, steps=1, warmup=0, tasks=2, passed=(0, 1, 1), finished=False)
    file = folder / "eval" / "after.jsonl"
    episodes = [json.loads(line) for line in file.read_text().splitlines()]

    def write() -> None:
        file.write_text("".join(json.dumps(row) + "\n" for row in episodes))

    for row in episodes:
        del row["outcome"]["score"]
    write()
    assert load_run(folder).scores["after"]["score"] == 0.5
    episodes[1]["outcome"]["score"] = None
    write()
    with pytest.raises(DataError, match=r"after\.jsonl:2: expected a number.*outcome\.score"):
        load_run(folder)
