"""Processes of the user's class: nothing of them is left after a rollout, a run, or a trainer that was killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pact_nemo.environments.own.workers import ClassHost
from pact_nemo.errors import EnvironmentFailure
from tests.test_own_workers import FILE, TASK, host


def gone(pids: list[int], seconds: float = 60.0) -> bool:
    """Whether the processes end; a zombie is no process any more."""
    until = time.monotonic() + seconds

    def lives(pid: int) -> bool:
        try:
            return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    while any(map(lives, pids)):
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def below(pid: int) -> list[int]:
    return [process.pid for process in psutil.Process(pid).children(recursive=True)]


def test_nothing_is_left_of_a_rollout() -> None:
    hostile = host()
    zygote = hostile._importer._process.pid  # type: ignore[union-attr]
    tools, other = hostile.open(TASK), hostile.open(TASK)
    left = [int(tools.call("starts", {"how": how})) for how in ("plain", "own session", "twice")]
    spared = int(other.call("starts", {"how": "twice"}))
    assert all(map(psutil.pid_exists, [*left, spared]))
    tools.close()
    assert gone(left) and not gone([spared], 0.2)  # another rollout's child is no affair of this one
    other.close()
    assert gone([spared]) and len(below(zygote)) <= 2  # that wait for the next rollouts
    hostile.close()


def test_close_ends_everything() -> None:
    found = host()
    zygote = found._importer._process.pid  # type: ignore[union-attr]
    tools = found.open(TASK)
    pids = [zygote, *below(zygote), int(tools.call("starts", {"how": "own session"}))]
    found.close()
    found.close()
    assert len(pids) == 3 and gone(pids)
    with pytest.raises(EnvironmentFailure, match="tool 'count': its process"):
        tools.call("count", {})
    with pytest.raises(EnvironmentFailure, match="the tools are closed"):
        found.open(TASK)


@pytest.mark.parametrize("what", ["rollout", "import"])
def test_nothing_outlives_a_killed_trainer(tmp_path: Path, what: str) -> None:
    marker = tmp_path / "pids"
    sleeper = tmp_path / "sleeper.py"
    sleeper.write_text(f"import os, time\nopen({str(marker)!r}, 'w').write(str(os.getpid()))\ntime.sleep(100)")
    reference = f"{FILE}:Hostile" if what == "rollout" else str(sleeper)
    program = (
        "import time, psutil; from tests.test_own_worker_life import *\n"
        f"found = host({reference!r}); tools, other = found.open(TASK), found.open(TASK)\n"
        "pid = tools.call('starts', {'how': 'own session'}); ended = below(os.getpid()); other.close()\n"
        "while not set(below(os.getpid())) - set(ended): time.sleep(0.05)  # one for the next rollout\n"
        f"open({str(marker)!r}, 'w').write(' '.join(map(str, [pid, *below(os.getpid())]))); time.sleep(100)"
    )
    trainer = subprocess.Popen([sys.executable, "-c", program], cwd=FILE.parents[2])
    until = time.monotonic() + 60
    while not (marker.exists() and marker.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    pids = [int(word) for word in marker.read_text().split()]
    assert all(map(psutil.pid_exists, pids)) and len(pids) >= (4 if what == "rollout" else 1)
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    assert gone(pids)


def kill_importer(found: ClassHost) -> None:
    zygote = found._importer._process.pid  # type: ignore[union-attr]
    children = below(zygote)
    os.kill(zygote, signal.SIGKILL)
    assert gone(children)  # they don't outlive it


def test_a_lost_importer_is_started_again(tmp_path: Path) -> None:
    file = tmp_path / "shop.py"
    file.write_text("class Shop:\n    def lookup(self, sku: str): 'Price.'\n")
    found = host(f"{file}:Shop")
    tools = found.open(TASK)
    for _ in range(2):
        kill_importer(found)
        with pytest.raises(EnvironmentFailure, match=r"tool 'lookup': its process ended"):
            tools.call("lookup", {"sku": "a"})
        tools = found.open(TASK)
        assert tools.call("lookup", {"sku": "a"}) == "null"
    for text, words in (
        ("def lookup(self, number: int): 'Price.'", "its tools changed"),
        ("boom", "started again: .*boom"),
    ):
        file.write_text(f"class Shop:\n    {text}\n")
        kill_importer(found)
        with pytest.raises(EnvironmentFailure, match=words):
            found.open(TASK)
    found.close()


def test_processes_for_the_next_rollouts_are_started_ahead_and_know_nothing_of_the_last_ones() -> None:
    shop = host(f"{FILE}:Shop")
    zygote = shop._importer._process.pid  # type: ignore[union-attr]
    first = [shop.open(TASK) for _ in range(4)]
    taken = set(below(zygote))
    for tools in first:
        tools.call("take", {"sku": "cup"})
        tools.close()
    until = time.monotonic() + 60
    while len(set(below(zygote)) - taken) < 4 and time.monotonic() < until:
        time.sleep(0.05)
    spares = set(below(zygote)) - taken
    assert len(spares) == 4  # as many as were open at once
    os.kill(min(spares), signal.SIGKILL)  # one that is lost is no rollout's fault
    assert gone([min(spares)])
    again = [shop.open(TASK) for _ in range(4)]
    assert [tools.call("lookup", {"sku": "cup"}) for tools in again] == ["2"] * 4
    assert len(spares & set(below(zygote))) >= 3
    for tools in again:
        tools.close()
    shop.close()
    assert gone(list(spares))


@pytest.mark.parametrize("isolation", ["process", "sandbox"])
@pytest.mark.parametrize("seeding", ["", "random.seed(3)"])
def test_every_rollout_of_every_run_draws_the_same(tmp_path: Path, isolation: str, seeding: str) -> None:
    tmp_path.chmod(0o755)
    file = tmp_path / "dice.py"
    file.write_text(
        f"import random\n{seeding}\nclass Dice:\n"
        "    def __init__(self, task): self.first = random.random()\n"
        "    def roll(self) -> list:\n        'Roll.'\n        return [self.first, random.random()]\n"
    )
    rolls = []
    for _ in range(2):
        found = host(f"{file}:Dice", isolation=isolation)
        for _ in range(3):  # the first is forked as it is asked for
            tools = found.open(TASK)
            rolls.append(tools.call("roll", {}))
            tools.close()
            time.sleep(0.1)
        found.close()
    dice = random.Random(3 if seeding else 0)
    assert rolls == [f"[{dice.random()}, {dice.random()}]"] * 6
