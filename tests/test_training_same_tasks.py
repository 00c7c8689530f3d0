"""A run that goes on has the tasks that it began with, and scores that can be compared."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from pact_nemo import cli
from pact_nemo.config.load import load_config
from pact_nemo.config.schema import to_yaml
from pact_nemo.errors import ConfigError

PRESET = Path(__file__).resolve().parents[1] / "conf" / "pact_bfcl-smollm2_135m-cpu.yaml"


def resumed(folder: Path, *words: str) -> argparse.Namespace:
    return argparse.Namespace(resume=str(folder), recipe=None, config=None, dry_run=False, overrides=list(words))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(to_yaml(load_config(PRESET, ["tasks.validation=40"])))
    return tmp_path


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("tasks.validation=0", r"tasks\.validation is 40 in this run and can't become 0"),
        ("tasks.held_out=20", r"tasks\.held_out is 60"),
        ("tasks.split_seed=9", r"tasks\.split_seed is 7"),
        ("tasks.max_train=10", r"tasks\.max_train is None"),
        ("evaluation.temperature=1.0", r"evaluation\.temperature is 0\.0"),
        ("evaluation.samples=4", r"evaluation\.samples is 1"),
    ],
)
def test_other_tasks_and_other_scores_are_refused_by_key(run: Path, word: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says + ".*start a new run"):
        cli.resolve(resumed(run, word), None, "")


def test_what_changes_no_task_may_change(run: Path) -> None:
    words = ("trainer.steps=30", "optimizer.lr=1e-5", "evaluation.every=5", "tasks.validation=40")
    config = cli.resolve(resumed(run, *words), None, "")
    assert (config.trainer.steps, config.tasks.validation) == (30, 40)


def test_a_run_of_before_a_setting_existed_had_its_default(run: Path) -> None:
    saved = run / "config.yaml"
    saved.write_text("".join(line for line in saved.read_text().splitlines(True) if "  validation:" not in line))
    assert cli.resolve(resumed(run), None, "").tasks.validation == 0
    with pytest.raises(ConfigError, match=r"tasks\.validation is 0 in this run"):
        cli.resolve(resumed(run, "tasks.validation=4"), None, "")
