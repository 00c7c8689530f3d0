"""A whole run with every kind of tracker, replayed without a server, beside the same run without any."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.workers.recipe_runs import recipe, records, weights
from tests.workers.tracker_files import mlflow_curves, tensorboard_curves, wandb_curves

REPO = Path(__file__).resolve().parents[1]
BROKEN = """
from pact_nemo.tracking.base import Tracker

def broken(self, *_):
    raise RuntimeError("broken")

class AfterOpening(Tracker):
    open, log, evaluation, close = (lambda self, run: None), broken, broken, broken

class Everywhere(AfterOpening):
    open = broken
"""


def example(folder: Path) -> None:
    """The class of docs/extend/logger.md, as it stands there."""
    (code,) = re.findall(r"```python\n(.*?)```", (REPO / "docs" / "extend" / "logger.md").read_text(), flags=re.DOTALL)
    assert code.count("\n") <= 60
    (folder / "my_tracker.py").write_text(code)


@pytest.mark.slow
def test_trackers_change_no_number_of_a_run_and_the_pages_example_follows_a_resume(
    stage: dict[str, Any],
    tmp_path: Path,
) -> None:
    """One run with no tracker; one with the example, both services and one tracker that fails, stopped and resumed."""
    example(tmp_path)
    (tmp_path / "broken.py").write_text(BROKEN)
    alone = recipe(stage, "alone", "tracking.trackers.tensorboard=null")
    assert not (alone / "tensorboard").exists()
    mlflow = f"sqlite:///{tmp_path}/mlflow.db"
    everywhere, later = f"{tmp_path}/broken.py:Everywhere", f"{tmp_path}/broken.py:AfterOpening"
    broken = f"'{everywhere}': {{}}, '{later}': {{}}"
    words = [
        f"tracking.trackers={{'{tmp_path}/my_tracker.py:CsvTracker': {{only: loss/}}, {broken}}}",
        "tracking.trackers.wandb.mode=offline",
        f"tracking.trackers.mlflow.uri={mlflow}",
        "tracking.trackers.mlflow.experiment=tests",
        "trainer.async_checkpoint=true",  # forks beside the trackers' threads
    ]
    first = recipe(stage, "watched", *words, "trainer.steps=1")
    ids = [json.loads((first / f"{name}_run.json").read_text()) for name in ("wandb", "mlflow")]
    watched = recipe(stage, "watched", "trainer.steps=2", resume=first)
    assert records(watched) == records(alone)
    one, other = weights(alone), weights(watched)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

    expected = {
        key: [(row["step"], row[key]) for row in records(watched) if row["stage"] == "rl"] for key in ("loss/total",)
    }
    expected["warmup/loss/total"] = [(row["step"], row["loss/total"]) for row in records(watched)[:1]]
    with open(watched / "curves.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[-1] == {"key": "outcome", "step": "", "value": "finished"}
    assert all("loss/" in row["key"] for row in rows[:-1])
    for key, curve in expected.items():
        assert [(int(row["step"]), float(row["value"])) for row in rows if row["key"] == key] == curve
        assert wandb_curves(watched)[key] == curve
        assert mlflow_curves(tmp_path)[key] == curve
        assert tensorboard_curves(watched)[key] == [(step, pytest.approx(value)) for step, value in curve]
    assert json.loads((watched / "wandb_run.json").read_text())["id"] == ids[0]["id"]
    assert json.loads((watched / "mlflow_run.json").read_text()) == ids[1]
    said = (watched / "run.log").read_text()
    assert f"tracker {everywhere} failed in open" in said
    failures = json.loads((watched / "summary.json").read_text())["tracking_failures"]
    assert failures == {everywhere: 1, later: 1}
