"""Two runs on one machine, in one run root and one cache: each ends as it would alone, and a folder is open in one
process only.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.faults.runner import Runner, finished, nobody_left, open_stage, server_of

pytestmark = [pytest.mark.slow, pytest.mark.faults]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    with open_stage(tmp_path_factory.mktemp("neighbours"), "trainer.steps=3") as opened:
        yield opened


@pytest.fixture(scope="module")
def other(stage: dict[str, Any]) -> Iterator[Runner]:
    """A second runner beside the stage's: its server has the same answers."""
    folder: Path = stage["folder"] / "other"
    (folder / "server").mkdir(parents=True)
    for name in ("faults.json", "answers.json"):
        (folder / "server" / name).write_bytes((stage["folder"] / "server" / name).read_bytes())
    runner = Runner(folder)
    yield runner
    runner.close()


def test_two_runs_side_by_side_end_as_each_alone(stage: dict[str, Any], other: Runner) -> None:
    alone, root, exports = stage["folder"] / "alone", stage["folder"] / "both", stage["folder"] / "exports"
    assert stage["runner"].play([*stage["words"], f"run.root={alone}"], None)[0] == 0, stage["runner"].said()
    expected = finished((alone / "latest").resolve())
    ports: list[set[str]] = []

    def look(runner: Runner, pid: int, phases: Path) -> None:
        """The port that this run's server listens on."""
        while (server := server_of(pid, runner.folder)) is None:
            time.sleep(0.01)
        words = (Path("/proc") / str(server) / "cmdline").read_bytes().decode().split("\0")
        ports.append({word for word in words if word.startswith("--port")})

    codes: dict[str, int] = {}

    def play(name: str, runner: Runner) -> None:
        codes[name] = runner.play(
            [*stage["words"], f"run.root={root}", f"rollout.exports_dir={exports}"], None, partial(look, runner)
        )[0]

    threads = [threading.Thread(target=play, args=item) for item in (("first", stage["runner"]), ("second", other))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == {"first": 0, "second": 0}, stage["runner"].said() + other.said()
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.is_symlink())
    assert [folder.name[-2:] for folder in folders] == ["-1", "-2"]
    for folder in folders:
        assert finished(folder) == expected
    assert len(ports) == 2 and ports[0] and ports[1] and not ports[0] & ports[1]
    nobody_left(stage["folder"])
    nobody_left(other.folder)


def test_a_folder_that_is_open_is_refused(stage: dict[str, Any], other: Runner) -> None:
    root = stage["folder"] / "once"
    refused: list[int] = []

    def second(pid: int, phases: Path) -> None:
        while "start|generation|" not in phases.read_text():
            time.sleep(0.01)
        refused.append(other.play([], (root / "latest").resolve())[0])

    code, _ = stage["runner"].play([*stage["words"], f"run.root={root}"], None, second)
    assert code == 0, stage["runner"].said()
    while not refused:
        time.sleep(0.1)
    assert refused == [1] and "is in use by another process; wait for it or start a new run" in other.said()
    assert json.loads((root / "latest" / "summary.json").read_text())["steps"] == 3
