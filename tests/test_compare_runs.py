"""One run of a comparison: which finished or cut run is taken for it, and what becomes of it when the comparison
ends.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pact_nemo.config.load import load_config
from pact_nemo.config.schema import to_yaml
from pact_nemo.errors import ConfigError, PactError
from pact_nemo.report.data import load_run
from pact_nemo.tracking.run_folder import Workspace
from tests.fixtures.run_folders import make_run
from tools.comparisons import runner
from tools.comparisons.runner import config_of

ROOT = Path(__file__).resolve().parents[1]


def test_a_cut_run_of_other_settings_is_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("pact", "bfcl", "smollm2_135m-cpu")
    run = make_run(tmp_path / "cell", seed=1)
    text = to_yaml(load_config([config], ["run.seed=1", "optimizer.lr=1e-4"]))
    lines = [line for line in text.split("\n") if not line.strip().startswith("dual_clip")]  # older than the setting
    (run / "config.yaml").write_text("\n".join(lines))
    (run / "summary.json").rename(run / "summary.kept")
    (run / "checkpoints" / "latest").mkdir(parents=True)
    told: list[list[str]] = []

    def call(words: list[str], out: Any) -> int:
        told.append(words)
        (run / "summary.kept").rename(run / "summary.json")
        return 0

    monkeypatch.setattr(runner, "call", call)
    for words, key in (
        (["optimizer.lr=3e-5"], "optimizer.lr"),
        (["optimizer.lr=1e-4", "objective.dual_clip=3"], "objective.dual_clip"),
    ):
        with pytest.raises(ConfigError, match=f"with other settings \\({key}\\)"):
            runner.run_one(config, 1, tmp_path / "cell", words)
    assert runner.run_one(config, 1, tmp_path / "cell", ["optimizer.lr=1e-4"]) == run
    assert told[0][-2:] == ["--resume", str(run)]


def test_a_run_of_another_model_or_of_more_epochs_is_told_apart(tmp_path: Path) -> None:
    config = config_of("pact", "bfcl", "smollm2_135m-cpu")
    run = make_run(tmp_path / "cell", seed=1)
    told = ["run.seed=1", "trainer.epochs=2", "trainer.steps=null", "model.path=/models/a"]
    settled = to_yaml(load_config([config], told)).replace(
        "  steps: null\n  epochs: 2\n", "  steps: 104\n  epochs: null\n"
    )
    assert "steps: 104" in settled  # 312 tasks, 6 a batch
    (run / "config.yaml").write_text(settled)
    words = ["trainer.epochs=2", "trainer.steps=null"]
    assert runner.run_one(config, 1, tmp_path / "cell", [*words, "model.path=/models/a"]) == run
    for other, key in (
        (["model.path=/models/b"], "model.path"),
        (["model.path=/models/a", "model.template_kwargs.enable_thinking=false"], "model.template_kwargs"),
    ):
        with pytest.raises(ConfigError, match=f"other settings .*{key}"):
            runner.run_one(config, 1, tmp_path / "cell", [*words, *other])
    with pytest.raises(ConfigError, match="other settings .*run.seed"):
        runner.run_one(config, 2, tmp_path / "cell", [*words, "model.path=/models/a"])
    with pytest.raises(ConfigError, match="other settings .*trainer.epochs"):
        runner.run_one(config, 1, tmp_path / "cell", ["trainer.epochs=3", words[1], "model.path=/models/a"])


def test_a_run_that_was_lengthened_and_cut_is_not_finished(tmp_path: Path) -> None:
    """The summary of its first end stays under a name of its own."""
    run = make_run(tmp_path, seed=1, steps=10)
    config = load_config(run / "config.yaml")
    space = Workspace(run)
    space.set_summary_aside(config)
    assert runner.finished(tmp_path) == run  # the same length: nothing is left to do
    space.set_summary_aside(load_config(run / "config.yaml", ["trainer.steps=20"]))
    assert runner.finished(tmp_path) is None and (run / "summary-step_000010.json").is_file()
    assert "after" not in load_run(run).scores
    space.set_summary_aside(config)  # none is there


def test_a_run_of_a_comparison_reads_paths_as_the_comparison_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The words of an own agent are paths, and the comparison may be started anywhere."""
    seen: list[str | None] = []

    class Fails:
        def __init__(self, *_: Any, cwd: str | None = None, **__: Any) -> None:
            seen.append(cwd)

        def wait(self) -> int:
            return 1

    monkeypatch.setattr(runner.subprocess, "Popen", Fails)
    words = ["agent.tools=shop.py:Shop", "tasks.path=tasks.jsonl"]
    with pytest.raises(PactError, match="exit code 1"):
        runner.run_one(config_of("sft", "own", "smollm2_135m-cpu"), 1, tmp_path / "run", words)
    assert seen == [None]


SCRIPT = """
import sys
from tools.comparisons.runner import call, passing_signals_on
run = ("import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(3)));"
       "print('begun', flush=True); time.sleep(60)")
with passing_signals_on(), open(sys.argv[1], "w") as out:
    sys.exit(call([sys.executable, "-c", run], out))
"""


def test_a_signal_to_the_comparison_reaches_its_run(tmp_path: Path) -> None:
    """Else the run goes on beside the next ones, for hours, and takes their memory."""
    log = tmp_path / "log"
    comparison = subprocess.Popen([sys.executable, "-c", SCRIPT, str(log)], cwd=ROOT)
    try:
        deadline = time.monotonic() + 60
        while not (log.is_file() and "begun" in log.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        comparison.send_signal(signal.SIGTERM)
        assert comparison.wait(30) == 3, "it waits until its run has ended"
    finally:
        comparison.kill()
    assert log.read_text() == "begun\nsaved\n"
