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
from pact_nemo.errors import ConfigError, Interrupted, NumericsError
from pact_nemo.tracking.base import Outcome, Record, RunFacts, Tracker, flat_score, scalars
from pact_nemo.tracking.jsonl import read_metrics
from pact_nemo.tracking.registry import built_in, check_settings, check_trackers, open_trackers
from tests.workers.tracker_files import Curve, mlflow_curves, tensorboard_curves, wandb_curves
from tests.workers.wandb_files import offline_runs

REPO = Path(__file__).resolve().parents[1]
SCORE = {
    "score": 0.5,
    "n": 4,
    "call_reward": None,
    "failed": 0,
    "categories": {"base": {"score": 0.25, "n": 2}},
    "metrics": {"calls": 3.0},
}
#: settings of each built-in tracker with which it needs no network; ``{folder}`` is the run folder
LOCAL: dict[str, dict[str, Any]] = {
    "tensorboard": {},
    "wandb": {"mode": "offline", "project": "tests", "tags": ["a"]},
    "mlflow": {"uri": "sqlite:///{folder}/mlflow.db", "experiment": "tests"},
}


def settings_in(folder: Path, name: str) -> dict[str, Any]:
    return {k: v.format(folder=folder) if isinstance(v, str) else v for k, v in LOCAL[name].items()}


def record(kind: str, step: int, loss: float | None = None) -> Record:
    return {"step": step, "stage": kind, "loss/total": step / 8 if loss is None else loss, "latent/gap": None}


def fill(
    folder: Path,
    trackers: dict[str, Any],
    records: list[Record],
    *,
    resume_from: tuple[int, int] | None = None,
    scores: dict[str, Any] | None = None,
    said: list[str] | None = None,
) -> None:
    """One process of a run."""
    config = {"run": {"name": "x"}, "tracking": {"trackers": trackers}}
    lines = said if said is not None else []
    with open_trackers(folder, config, resume_from=resume_from, scores=scores or {}, say=lines.append) as recorder:
        for row in records:
            recorder.append(row)


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


def rl(first: int, last: int, loss: float | None = None) -> list[Record]:
    return [record("rl", step, loss) for step in range(first, last + 1)]


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


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


# -- trackers that fail


class Broken(Tracker):
    """Fails in the methods that it is told."""

    def __init__(self, settings: Any, *where: str):
        super().__init__(settings)
        self.where, self.calls = where, []

    def _call(self, what: str) -> None:
        self.calls.append(what)
        if what in self.where:
            raise SystemExit(f"{what} broke") if what == "close" else RuntimeError(f"{what} broke\nsecond line")

    def open(self, run: RunFacts) -> None:
        self._call("open")

    def log(self, record: Record) -> None:
        record.clear()  # what it does to its copy is its own business
        self._call("log")

    def evaluation(self, name: str, scores: dict[str, float]) -> None:
        self._call("evaluation")

    def close(self, outcome: Outcome) -> None:
        self._call("close")


class Everywhere(Broken):
    def __init__(self, settings: Any):
        super().__init__(settings, "open", "log", "evaluation", "close")


class AfterOpening(Broken):
    made: list[Broken] = []

    def __init__(self, settings: Any):
        super().__init__(settings, "log", "evaluation", "close")
        self.made.append(self)


class Sometimes(Broken):
    def log(self, record: Record) -> None:
        if record["step"] % 2:
            raise OSError(f"step {record['step']}")


class Listener(Broken):
    seen: list[Any] = []

    def log(self, record: Record) -> None:
        self.seen.append((record["stage"], record["step"]))

    def close(self, outcome: Outcome) -> None:
        self.seen.append(outcome)


def name_of(tracker: type[Tracker]) -> str:
    return f"{__name__}:{tracker.__name__}"


def test_a_tracker_that_fails_everywhere_is_named_once_and_the_others_go_on(tmp_path: Path) -> None:
    said: list[str] = []
    Listener.seen.clear()
    names = {name_of(Everywhere): {}, "tensorboard": {}, name_of(Listener): {}}
    fill(tmp_path, names, rl(1, 5), said=said)
    (line,) = said
    assert name_of(Everywhere) in line and "RuntimeError: open broke);" in line and "off until a resume" in line
    assert tensorboard_curves(tmp_path)["loss/total"] == [(step, step / 8) for step in range(1, 6)]
    assert Listener.seen == [*(("rl", step) for step in range(1, 6)), Outcome("finished")]
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]


def test_three_failures_in_a_row_switch_a_tracker_off_and_it_is_still_closed(tmp_path: Path) -> None:
    said: list[str] = []
    AfterOpening.made.clear()
    fill(tmp_path, {name_of(AfterOpening): {}}, rl(1, 6), said=said)
    assert AfterOpening.made[0].calls == ["open", "log", "log", "log", "close"]
    assert (
        "it is tried again" in said[0] and "off until a resume" in said[1] and "4 calls" in said[2] and len(said) == 3
    )


def test_a_tracker_that_fails_now_and_then_stays_on_and_is_counted(tmp_path: Path) -> None:
    said: list[str] = []
    config = {"tracking": {"trackers": {name_of(Sometimes): {}}}}
    with open_trackers(tmp_path, config, resume_from=None, scores={}, say=said.append) as recorder:
        for row in rl(1, 8):
            recorder.append(row)
        assert recorder.failures == {name_of(Sometimes): 4}
    assert len(said) == 2 and "OSError: step 1" in said[0]


def test_what_is_said_of_a_failure_holds_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "log bro")
    said: list[str] = []
    fill(tmp_path, {name_of(AfterOpening): {}}, rl(1, 1), said=said)
    assert "log bro" not in said[0] and "$SOME_API_KEYke" in said[0]


def test_a_failure_of_the_runs_own_record_is_an_error_of_the_run(tmp_path: Path) -> None:
    Listener.seen.clear()
    config = {"tracking": {"trackers": {name_of(Listener): {}}}}
    with pytest.raises(NumericsError, match="loss/total"):
        with open_trackers(tmp_path, config, resume_from=None, scores={}, say=print) as recorder:
            recorder.append(record("rl", 1, float("nan")))
    assert Listener.seen == [Outcome("failed", "NumericsError")]


def test_a_tracker_that_draws_random_numbers_changes_none_of_the_run(tmp_path: Path) -> None:
    import random

    import numpy as np
    import torch

    def numbers() -> tuple[float, ...]:
        return random.random(), float(np.random.rand()), torch.rand(1).item()

    class Gambler(Broken):
        def log(self, record: Record) -> None:
            numbers()
            random.seed(1)

    globals()["Gambler"] = Gambler
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = numbers()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    fill(tmp_path, {name_of(Gambler): {}}, rl(1, 3))
    assert numbers() == expected


# -- what is refused, before anything starts


@pytest.mark.parametrize(
    ("word", "match"),
    [
        ("tracking.trackers.wandb.projekt=x", "tracking.trackers.wandb: .*projekt.*its settings are: project"),
        ("tracking.trackers.wandb.api_key=x", "api_key"),
        ("tracking.trackers.mlflow.retries=many", "tracking.trackers.mlflow"),
        ("tracking.trackers.jsonl={}", "always written and needs no entry"),
        ("tracking.trackers.nope={}", "no such tracker; there are mlflow, tensorboard, wandb"),
        ("tracking.trackers.run_folder={}", "no such tracker"),
        ("tracking.trackers.wandb=yes", "or null to leave it out"),
    ],
)
def test_a_wrong_entry_is_refused_by_name(word: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        load_config(None, [word])


@pytest.mark.parametrize(
    ("trackers", "match"),
    [
        ({"wandb": {}}, "WANDB_API_KEY.*mode=offline"),
        ({"wandb": {"mode": "disabled"}}, "mode=disabled.*online, offline"),
        ({"mlflow": {}}, "MLFLOW_TRACKING_URI"),
        ({"mlflow": {"uri": "https://me:secret@host"}}, "MLFLOW_TRACKING_PASSWORD"),
        ({"mlflow": {"uri": "mlruns"}}, "MLFLOW_ALLOW_FILE_STORE"),
        ({"no_such_module_here:Mine": {}}, "no_such_module_here.*PYTHONPATH"),
        ({"json:JSONDecoder": {}}, "no subclass of pact_nemo.tracking.base.Tracker"),
        ({f"{__name__}:Listener": {"colour": 1}}, "colour.*its settings are: none"),
    ],
)
def test_a_tracker_that_cannot_work_here_is_refused_with_the_remedy(trackers: dict[str, Any], match: str) -> None:
    check_settings(trackers)
    with pytest.raises(ConfigError, match=match):
        check_trackers(trackers)


@pytest.mark.parametrize("name", LOCAL)
def test_a_package_that_is_not_installed_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trackers = {name: settings_in(tmp_path, name)}
    check_trackers(trackers)
    import importlib.util as util

    real = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda module, *rest: None if module == name else real(module, *rest))
    with pytest.raises(ConfigError, match=f"package {name} is not installed; pip install {name}"):
        check_trackers(trackers)


def test_a_key_for_wandb_is_found_where_wandb_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password nothing\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    check_trackers({"wandb": {}})
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    with pytest.raises(ConfigError):
        check_trackers({"wandb": {}})
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    check_trackers({"wandb": {}})


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
