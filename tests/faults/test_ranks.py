"""kill -9 or SIGSTOP of one rank of two, under torchrun: the job ends and says which, and what is resumed ends as if
nothing had been.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults import tally
from tests.faults.kit import REPO, every_kind_of_weights
from tests.faults.runner import finished, nobody_left, open_stage

pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(3600)]
LIMIT_S = 30


@pytest.fixture(scope="module", params=every_kind_of_weights())
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    with open_stage(
        tmp_path_factory.mktemp("ranks"),
        *request.param,
        "trainer.steps=3",
        "trainer.mini_batch_size=2",
        f"policy.init_timeout_s={LIMIT_S}",
    ) as opened:
        yield opened


def rank_pid(launcher: int, rank: int) -> int | None:
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher and f"\0RANK={rank}\0".encode() in b"\0" + (process / "environ").read_bytes():
                return int(process.name)
        except OSError:
            continue
    return None


def play(stage: dict[str, Any], words: list[str], disturb: Any = None) -> tuple[int, str]:
    """Run the recipe on two ranks; exit code and output."""
    folder = stage["folder"]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "tests.faults.rank_worker",
        str(folder / "server"),
        *words,
    ]
    with open(folder / "run.log", "wb") as log:
        job = subprocess.Popen(
            command,
            cwd=REPO,
            stdout=log,
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)},
        )
    if disturb is not None:
        threading.Thread(target=disturb, args=(job.pid,), daemon=True).start()
    try:
        code = job.wait(300)
    finally:
        job.kill()
        job.wait()
    nobody_left(folder)
    return code, (folder / "run.log").read_text()


@pytest.fixture(scope="module")
def undisturbed(stage: dict[str, Any]) -> dict[str, Any]:
    root, started = stage["folder"] / "undisturbed", time.monotonic()
    code, output = play(stage, [*stage["words"], f"run.root={root}"])
    assert code == 0, output[-3000:]
    return {"left": finished((root / "latest").resolve()), "seconds": time.monotonic() - started}


def test_a_rank_that_is_killed_at_random_costs_nothing(stage: dict[str, Any], undisturbed: dict[str, Any]) -> None:
    kills, rng, done, starts, runs = int(os.environ.get("PACT_RANK_KILLS", "10")), random.Random(5), [0, 0], 0, 0
    while sum(done) < kills:
        root, resume = stage["folder"] / f"killed-{runs}", None
        while True:
            rank, after = rng.randrange(2), rng.uniform(0.3, 1.0) * undisturbed["seconds"]

            def kill(launcher: int, rank: int = rank, after: float = after) -> None:
                time.sleep(after)
                if (pid := rank_pid(launcher, rank)) is not None:
                    os.kill(pid, signal.SIGKILL)
                    done[rank] += 1

            words = ["--resume", str(resume)] if resume is not None else [*stage["words"], f"run.root={root}"]
            code, output = play(stage, words, kill)
            starts += 1
            if code == 0:
                break
            assert re.search(r"exitcode *: -9", output) and "Signal 9 (SIGKILL)" in output, output[
                -3000:
            ]  # torchrun names rank and process
            resume = (root / "latest").resolve() if (root / "latest" / "config.yaml").is_file() else None
        found = finished((root / "latest").resolve())
        for key, value in undisturbed["left"].items():
            assert found[key] == value, f"{key} differs after {done}"
        runs += 1
    print(f"{done[0]} kills of rank 0, {done[1]} of rank 1, in {runs} runs and {starts} starts")
    tally.record("kill -9 of one rank", injected=sum(done), survived=sum(done), lost=0)


def test_a_rank_that_is_stopped_is_named_and_the_run_goes_on_later(
    stage: dict[str, Any], undisturbed: dict[str, Any]
) -> None:
    root = stage["folder"] / "stopped"
    stopped: list[float] = []

    def stop(launcher: int) -> None:
        metrics = root / "latest" / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
            time.sleep(0.02)
        pid = rank_pid(launcher, 1)
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        stopped.append(time.monotonic())

    code, output = play(stage, [*stage["words"], f"run.root={root}"], stop)
    print(
        f"ended {time.monotonic() - stopped[0]:.0f} s after rank 1 was stopped (limit {LIMIT_S} s; torchrun waits 30 s"
        " for it to leave)"
    )
    assert (
        code != 0
        and f"rank 0: no rank got on for {LIMIT_S} s (policy.init_timeout_s): rank 1 gives no sign of life" in output
    ), output[-3000:]
    code, output = play(stage, ["--resume", str((root / "latest").resolve())])
    assert code == 0, output[-3000:]
    found = finished((root / "latest").resolve())
    for key, value in undisturbed["left"].items():
        assert found[key] == value, key
    tally.record("a rank stopped", injected=1, survived=1, lost=0)
