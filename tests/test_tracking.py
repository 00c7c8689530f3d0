"""The door for loggers: every tracker draws each step once across resumes, and none that fails ends a run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pact_nemo.config.load import load_config
from pact_nemo.errors import ConfigError, Interrupted
from pact_nemo.tracking.base import Record, flat_score, scalars
from pact_nemo.tracking.jsonl import read_metrics
from pact_nemo.tracking.registry import built_in, check_trackers, open_trackers
from tests.workers.tracker_files import Curve, mlflow_curves, tensorboard_curves, wandb_curves
from tests.workers.tracker_kit import LOCAL, SCORE, fill, no_account, record, rl, settings_in  # noqa: F401 - a fixture
from tests.workers.wandb_files import offline_runs

REPO = Path(__file__).resolve().parents[1]


def fill_and_be_killed(folder: Path, trackers: dict[str, Any], records: list[Record]) -> None:
    """The same in a process that is killed after the last record."""
    code = (
        "import json, os, sys\nfrom pathlib import Path\nfrom pact_nemo.tracking.registry import open_trackers\n"
        "folder, config, rows = json.loads(sys.argv[1])\n"
        "recorder = open_trackers(Path(folder), config, resume_from=None, scores={}, say=print).__enter__()\n"
        "for row in rows:\n    recorder.append(row)\nos.kill(os.getpid(), 9)\n"
    )
    words = json.dumps([str(folder), {"run": {"name": "x"}, "tracking": {"trackers": trackers}}, records])
    done = subprocess.run([sys.executable, "-c", code, words], cwd=REPO, capture_output=True, text=True, timeout=300)
    assert done.returncode == -9, done.stderr


CURVES: dict[str, Callable[[Path], dict[str, Curve]]] = {
    "tensorboard": tensorboard_curves,
    "wandb": wandb_curves,
    "mlflow": mlflow_curves,
}
WARMUP = [record("warmup", step) for step in (1, 2)]


def test_every_built_in_tracker_is_under_test() -> None:
    assert set(built_in()) == set(LOCAL) == set(CURVES)


@pytest.mark.parametrize("name", LOCAL)
@pytest.mark.parametrize("end", ["closed at the checkpoint", "closed beyond the checkpoint", "killed"])
def test_a_resume_draws_every_step_once(tmp_path: Path, name: str, end: str) -> None:
    """Two resumes, so that the second one goes by what the first one left."""
    trackers = {name: settings_in(tmp_path, name)}
    said: list[str] = []
    scores = {"base": SCORE}
    if end == "killed":
        fill_and_be_killed(tmp_path, trackers, [*WARMUP, *rl(1, 4)])
    else:
        fill(tmp_path, trackers, [*WARMUP, *rl(1, 2 if "at the" in end else 4)], said=said)
    fill(tmp_path, trackers, rl(3, 4, 9.0), resume_from=(2, 2), scores=scores, said=said)
    fill(tmp_path, trackers, rl(5, 5), resume_from=(2, 4), scores=scores, said=said)
    curves = CURVES[name](tmp_path)
    assert curves == {
        "warmup/loss/total": [(1, 0.125), (2, 0.25)],
        "loss/total": [(1, 0.125), (2, 0.25), (3, 9.0), (4, 9.0), (5, 0.625)],
    }
    assert [(row["stage"], row["step"]) for row in read_metrics(tmp_path)] == [
        ("warmup", 1),
        ("warmup", 2),
        *(("rl", step) for step in range(1, 6)),
    ]
    replaced = [line for line in said if "can't take points back" in line]
    assert len(replaced) == (0 if name == "tensorboard" or "at the" in end else 1), said
    assert not [line for line in said if "warning" in line], said


@pytest.mark.parametrize("name", LOCAL)
def test_steps_that_passed_while_a_tracker_was_off_are_drawn_later(tmp_path: Path, name: str) -> None:
    trackers = {name: settings_in(tmp_path, name)}
    fill(tmp_path, trackers, rl(1, 2))
    fill(tmp_path, {name: None}, rl(3, 3), resume_from=(0, 2))
    fill(tmp_path, trackers, rl(4, 4), resume_from=(0, 3))
    assert CURVES[name](tmp_path)["loss/total"] == [(step, step / 8) for step in (1, 2, 3, 4)]


@pytest.mark.parametrize("name", LOCAL)
def test_a_step_that_came_out_otherwise_while_a_tracker_was_off_replaces_the_drawn_one(
    tmp_path: Path, name: str
) -> None:
    trackers = {name: settings_in(tmp_path, name)}
    fill(tmp_path, trackers, rl(1, 3))
    fill(tmp_path, {name: None}, rl(3, 3, 7.0), resume_from=(0, 2))
    fill(tmp_path, trackers, [], resume_from=(0, 3))
    assert CURVES[name](tmp_path)["loss/total"] == [(1, 0.125), (2, 0.25), (3, 7.0)]


def test_the_same_run_of_mlflow_and_wandb_goes_on_where_nothing_is_taken_back(tmp_path: Path) -> None:
    trackers = {name: settings_in(tmp_path, name) for name in ("wandb", "mlflow")}
    ids = []
    for first in (1, 2):
        fill(tmp_path, trackers, rl(first, first), resume_from=(0, first - 1) if first > 1 else None)
        states = [json.loads((tmp_path / f"{name}_run.json").read_text()) for name in trackers]
        ids.append([states[0]["id"], states[1]["run_id"]])
    assert ids[0] == ids[1]
    assert list(offline_runs(tmp_path)) == [ids[0][0]] and len(list((tmp_path / "wandb").glob("offline-run-*"))) == 2


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("def open(self, run): ...", "has no log"),
        ("def log(self, record, step): ...", "can't be called like Tracker.log"),
        ("def opne(self, run): ...", "overrides nothing; is open meant"),
    ],
)
def test_a_class_that_lacks_what_a_tracker_must_have_is_refused(tmp_path: Path, body: str, said: str) -> None:
    (tmp_path / "odd.py").write_text(
        f"from pact_nemo.tracking.base import Tracker\n\n\nclass Odd(Tracker):\n    {body}\n"
    )
    with pytest.raises(ConfigError, match=said):
        check_trackers({f"{tmp_path}/odd.py:Odd": {}})


def test_what_wandb_is_told(tmp_path: Path) -> None:
    config = {"run": {"name": "x", "seed": 3}, "tracking": {"trackers": {"wandb": settings_in(tmp_path, "wandb")}}}
    with open_trackers(tmp_path, config, resume_from=None, scores={}, say=print) as recorder:
        recorder.append(WARMUP[0])
        recorder.append(record("rl", 1))
        recorder.evaluation("after", SCORE)
    (run,) = offline_runs(tmp_path).values()
    assert (run.project, run.name, run.tags) == ("tests", tmp_path.name, ["a"])
    assert run.config["run"] == {"name": "x", "seed": 3}
    assert run.axes["warmup/loss/total"] == "warmup/step" and run.axes["loss/total"] == "step"
    assert run.summary["eval/after/score"] == 0.5 and run.summary["eval/after/base/score"] == 0.25
    assert (run.summary["outcome"], run.exit_code) == ("finished", 0)


def test_what_mlflow_is_told(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    trackers = {"mlflow": settings_in(tmp_path, "mlflow")}
    client = MlflowClient(tracking_uri=trackers["mlflow"]["uri"])
    config = {"run": {"name": "x", "seed": 3}, "tracking": {"trackers": trackers}}
    with (
        pytest.raises(Interrupted),
        open_trackers(tmp_path, config, resume_from=None, scores={}, say=print) as recorder,
    ):
        recorder.evaluation("base", SCORE)
        raise Interrupted("SIGTERM")
    run_id = json.loads((tmp_path / "mlflow_run.json").read_text())["run_id"]
    run = client.get_run(run_id)
    assert run.data.params["run.seed"] == "3" and run.info.run_name == tmp_path.name
    assert run.data.metrics["eval/base/score"] == 0.5 and run.info.status == "KILLED"
    config["run"] = {"name": "x", "seed": 4}
    with open_trackers(tmp_path, config, resume_from=(0, 0), scores={"base": SCORE}, say=print):
        assert client.get_run(run_id).info.status == "RUNNING"
    run = client.get_run(run_id)
    assert run.data.tags["config/run.seed"] == "4" and run.info.status == "FINISHED"
    assert len(client.get_metric_history(run_id, "eval/base/score")) == 1


def test_the_default_is_tensorboard_and_null_takes_it_out() -> None:
    assert load_config(None, []).tracking.trackers == {"tensorboard": {}}
    assert load_config(None, ["tracking.trackers.tensorboard=null"]).tracking.trackers == {"tensorboard": None}
    both = load_config(None, ["tracking.trackers.wandb.tags=[a, b]"]).tracking.trackers
    assert both == {"tensorboard": {}, "wandb": {"tags": ["a", "b"]}}


def test_the_two_views_of_a_record_and_a_score() -> None:
    assert scalars({"step": 3, "stage": "warmup", "a": 1, "b": None}) == {"warmup/a": 1}
    assert flat_score("base", SCORE) == {
        "eval/base/score": 0.5,
        "eval/base/n": 4,
        "eval/base/failed": 0,
        "eval/base/metrics/calls": 3.0,
        "eval/base/base/score": 0.25,
    }
