"""A whole run whose standard output is full, gone or closed goes on; one whose terminal hangs up checkpoints, leaves
with 75 and is resumed.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.runner import open_stage
from tests.faults.test_kills import Signaller

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    with open_stage(tmp_path_factory.mktemp("output"), "trainer.steps=1") as opened:
        yield opened


@pytest.mark.slow
@pytest.mark.parametrize("output", ["full", "broken", "closed"])
def test_a_run_goes_on_without_its_output(stage: dict[str, Any], output: str, tmp_path: Path) -> None:
    code, _ = stage["runner"].play([*stage["words"], f"run.root={tmp_path}"], None, output=output)
    run = (tmp_path / "latest").resolve()
    log = (run / "run.log").read_text()
    assert code == 0, log
    assert json.loads((run / "summary.json").read_text())["steps"] == 1 and (run / "report.html").is_file()
    assert "rl step 1/1" in log and "report:" in log
    if output != "closed":
        assert log.count("standard output can't be written") == 1


@pytest.mark.slow  # the way out is SIGTERM's, which tests/test_training_runs.py goes
def test_a_terminal_that_hangs_up_costs_nothing(stage: dict[str, Any], tmp_path: Path) -> None:
    words = [*stage["words"], f"run.root={tmp_path}", "trainer.steps=2"]
    killer = Signaller(signal.SIGHUP, "update", 1, 0.0)
    code, _ = stage["runner"].play(words, None, killer, output="broken")
    run = (tmp_path / "latest").resolve()
    assert code == 75 and "SIGHUP: stopped after" in (run / "run.log").read_text()
    code, _ = stage["runner"].play([], run)
    assert code == 0 and json.loads((run / "summary.json").read_text())["steps"] == 2
