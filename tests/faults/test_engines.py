"""Two ranks that take turns with two engines, or with four, leave what they leave beside one engine without turns; also
where one of the four is killed in the middle of a batch for good, and the run goes on with three.

The ranks and their storages are real; engines are processes that forget their weights as vLLM does on a GPU
(fake_server.py). vLLM's own engines: test_training_runs_served.py, test_serving_nodes.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.runner import finished, open_stage
from tests.faults.test_ranks import play

pytestmark = [pytest.mark.slow, pytest.mark.faults]
TURNS = "rollout.server.time_sharing=true"
#: four tasks a step: one for each of four engines
STEPS = ("trainer.steps=2", "objective.schedule.horizon=2", "trainer.batch_size=4", "trainer.mini_batch_size=2")


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    words = (*STEPS, "evaluation.before=false", "rollout.server.max_restarts=0")
    with open_stage(tmp_path_factory.mktemp("engines"), *words) as opened:
        yield opened


def run(stage: dict[str, Any], name: str, *words: str, fault: dict[str, Any] | None = None) -> dict[str, Any]:
    """A run of two ranks: what it leaves, its RL steps' metrics, its servers' logs, the requests they saw, and what it
    said.
    """
    root, server = stage["folder"] / name, stage["folder"] / "server"
    for count in server.glob("*.count"):
        count.unlink()
    (server / "faults.json").write_text(json.dumps([fault] if fault is not None else []))
    code, output = play(stage, [*stage["words"], *words, f"run.root={root}"])
    assert code == 0, output[-3000:]
    folder: Path = (root / "latest").resolve()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "left": finished(folder),
        "steps": [row for row in rows if row["stage"] == "rl"],
        "logs": {path.name for path in folder.glob("server*.log")},
        "asked": int((server / "generate.count").read_text()),
        "said": output,
    }


@pytest.fixture(scope="module")
def alone(stage: dict[str, Any]) -> dict[str, Any]:
    """One engine, and nothing is moved."""
    found = run(stage, "alone", "rollout.server.time_sharing=false")
    assert found["logs"] == {"server.log"} and not any("moved/copied" in row for row in found["steps"])
    return found


def test_engines_that_take_turns_with_two_ranks_change_no_bit(stage: dict[str, Any], alone: dict[str, Any]) -> None:
    found = run(stage, "turns", TURNS, "rollout.server.engines=2")
    for key, value in alone["left"].items():
        assert found["left"][key] == value, key
    assert found["logs"] == {"server-0.log", "server-1.log"}
    assert all(row["moved/copied"] > 0 and row["engines/share"] == 1 for row in found["steps"])


def test_one_of_four_engines_that_is_lost_in_mid_batch_changes_no_number_and_the_run_goes_on(
    stage: dict[str, Any], alone: dict[str, Any]
) -> None:
    fault = {"at": alone["asked"] // 4, "do": "exit"}  # of the first step's requests
    found = run(stage, "lost", TURNS, "rollout.server.engines=4", fault=fault)
    for key, value in alone["left"].items():
        assert found["left"][key] == value, key
    assert found["logs"] == {f"server-{number}.log" for number in range(4)}
    assert all(row["moved/copied"] > 0 and row["engines/share"] == 0.75 for row in found["steps"])
    assert found["steps"][0]["rollout/reissued"] > 0 and "3 of 4 are left" in found["said"]
