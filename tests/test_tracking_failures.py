"""Trackers that fail in the middle of a run, and those that are refused before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pact_nemo.config.load import load_config
from pact_nemo.errors import ConfigError, NumericsError
from pact_nemo.tracking.base import Outcome, Record, RunFacts, Tracker
from pact_nemo.tracking.jsonl import read_metrics
from pact_nemo.tracking.registry import check_settings, check_trackers, open_trackers
from tests.workers.tracker_files import tensorboard_curves
from tests.workers.tracker_kit import LOCAL, fill, no_account, record, rl, settings_in  # noqa: F401 - a fixture

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
        ("tracking.trackers.wandb.projekt=x", "tracking.trackers.wandb.projekt: .*settings of wandb: .*project"),
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
        ({f"{__name__}:Listener": {"colour": 1}}, "colour.*settings of .*: none"),
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
