"""Trainer and engine that take turns (``rollout.server.time_sharing``) leave what those leave that don't; also after
kill -9 and SIGTERM in every move of memory, and after an engine that died or would not move.

The engine is a process that forgets its weights as vLLM does on a GPU (fake_server.py), the trainer's storages are
really given back: whoever computed with what was gone would leave other numbers.
"""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.runner import durations, finished, nobody_left, open_stage
from tests.faults.test_kills import Signaller

MOVES = ("sleep", "restore", "release", "wake")
SHARED = "rollout.server.time_sharing=true"
pytestmark = [pytest.mark.slow, pytest.mark.faults]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    with open_stage(tmp_path_factory.mktemp("sharing"), "trainer.steps=3", "objective.schedule.horizon=3") as opened:
        yield opened


def play(stage: dict[str, Any], name: str, *words: str) -> tuple[dict[str, Any], Path, Path]:
    """What a run leaves; its folder; its phases."""
    root = stage["folder"] / name
    code, phases = stage["runner"].play([*stage["words"], *words, f"run.root={root}"], None)
    assert code == 0, stage["runner"].said()
    run = (root / "latest").resolve()
    return finished(run), run, phases


@pytest.fixture(scope="module")
def plain(stage: dict[str, Any]) -> dict[str, Any]:
    """Of a run in which nothing is moved."""
    left, _, phases = play(stage, "plain", "rollout.server.time_sharing=false")
    assert not set(MOVES) & set(durations(phases))
    return left


@pytest.fixture(scope="module")
def shared(stage: dict[str, Any]) -> dict[str, Any]:
    """Of one in which all is: ``left``, ``rows`` of its metrics, ``lengths`` of its phases."""
    left, run, phases = play(stage, "shared", SHARED)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {"left": left, "rows": rows, "lengths": durations(phases)}


def test_taking_turns_changes_no_bit(plain: dict[str, Any], shared: dict[str, Any]) -> None:
    for key, value in plain.items():
        assert shared["left"][key] == value, key
    steps = [row for row in shared["rows"] if row["stage"] == "rl"]
    for row in steps:
        assert all(row[f"time/{move}"] > 0 for move in MOVES)
        assert row["moved/copied"] > 0 and row["moved/dropped"] > 0
        assert sum(row[f"time/{move}"] for move in MOVES) + row["time/refit"] < row["time/total"]
    # a step's checkpoint is begun in the trainer's turn: there and back once a step, and thrice for the first rollouts,
    # the warm-up and the last export
    lengths = shared["lengths"]
    assert len(lengths["checkpoint"]) == len(steps) + 1
    assert len(lengths["release"]) == len(lengths["restore"]) == len(steps) + 3


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("move", MOVES)
def test_a_signal_in_a_move_changes_no_bit(
    stage: dict[str, Any], plain: dict[str, Any], shared: dict[str, Any], move: str, number: signal.Signals
) -> None:
    """The signal comes in the middle of the last but two of these moves; then once more, in what is resumed."""
    root, resume = stage["folder"] / f"cut-{move}-{number}", None
    lengths = shared["lengths"][move]
    sent = 0
    for occurrence in (len(lengths) - 2, 2, None):
        signaller = Signaller(number, move, occurrence, lengths[-2] / 2) if occurrence else None
        code, _ = stage["runner"].play([*stage["words"], SHARED, f"run.root={root}"], resume, signaller)
        sent += signaller is not None and signaller.at is not None
        if code == 0:
            break
        assert code == (75 if number == signal.SIGTERM else -number), stage["runner"].said()
        nobody_left(stage["folder"])
        resume = (root / "latest").resolve()
    assert code == 0 and sent
    left = finished((root / "latest").resolve())
    for key, value in plain.items():
        assert left[key] == value, key
    shutil.rmtree(root)


@pytest.mark.parametrize(
    "fault",
    [
        {"at": 3, "of": "sleep", "do": "exit"},
        {"at": 3, "of": "sleep", "do": "fail"},
        {"at": 3, "of": "wake_up", "do": "exit"},
        {"at": 4, "of": "wake_up", "do": "fail"},
        {"at": 5, "of": "wake_up", "do": "exit"},
        {"at": 2, "of": "load", "do": "exit"},
    ],
    ids=lambda fault: "-".join(map(str, fault.values())),
)
def test_an_engine_that_is_lost_in_a_move_changes_no_bit(
    stage: dict[str, Any], plain: dict[str, Any], fault: dict[str, Any]
) -> None:
    server = stage["folder"] / "server"
    for count in server.glob("*.count"):
        count.unlink()
    (server / "faults.json").write_text(json.dumps([fault]))
    try:
        left, run, _ = play(stage, f"lost-{fault['of']}-{fault['at']}-{fault['do']}", SHARED)
    finally:
        (server / "faults.json").write_text("[]")
    for key, value in plain.items():
        assert left[key] == value, key
    assert json.loads((run / "summary.json").read_text())["server"]["restarts"] == 1
