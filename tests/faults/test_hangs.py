"""A rank that hangs is named by the ranks that wait for it, and the run ends; one that only takes long is waited
for.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from pact_nemo.runtime.hangs import EXIT_CODE, Sign, verdict, whereabouts
from tests.faults.hang_worker import LIMIT_S
from tests.faults.kit import REPO


def sign(quiet_s: float, *, waiting: bool = True, number: int = 7) -> Sign:
    return Sign(number, quiet_s, "update", "pact_nemo/x.py:1 in f", waiting)


def test_nobody_is_named_while_a_rank_gets_on() -> None:
    assert verdict({0: sign(1.0), 1: sign(100.0)}, set(), 10.0) is None
    assert verdict({0: sign(1.0), 1: None, 2: sign(99.0)}, {2}, 10.0) is None


def test_who_is_missing_is_told_before_who_is_busy() -> None:
    said = verdict({0: sign(11.0), 1: sign(3.0), 2: None, 3: sign(12.0, waiting=False)}, {1}, 10.0)
    assert (
        said is not None
        and "rank 2 never came" in said
        and "rank 1 gives no sign of life" in said
        and "rank 3 is" not in said
    )
    assert "Waiting: rank 0: update, pact_nemo/x.py:1 in f, for 11 s" in said
    busy = verdict({0: sign(11.0), 1: sign(12.0, waiting=False)}, set(), 10.0)
    assert busy is not None and "rank 1 is not waiting for the others but at update" in busy
    all_wait = verdict({0: sign(11.0), 1: sign(12.0)}, set(), 10.0)
    assert all_wait is not None and "all ranks wait for each other, at different places: rank 0" in all_wait


def test_whereabouts_are_our_own_innermost_line() -> None:
    line, waiting = whereabouts(sys._getframe())
    assert "test_whereabouts" in line and not waiting
    assert whereabouts(None) == ("unknown", False)


def ranks(what: str, folder: Path, world: int) -> list[tuple[int, str]]:
    """Play hang_worker.py; exit code and output of each rank (of rank 1, which nothing ends: -9)."""
    store = dist.TCPStore(
        "127.0.0.1", 0, world, is_master=True, wait_for_workers=False
    )  # as torchrun's agent has it: it outlives the ranks
    processes = []
    for rank in range(world):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "PYTHONPATH": str(REPO),
            "OMP_NUM_THREADS": "1",
        }
        log = open(folder / f"{rank}.log", "wb")  # noqa: SIM115 - the child's
        command = [sys.executable, "-m", "tests.faults.hang_worker", what]
        processes.append(subprocess.Popen(command, env=environment, cwd=REPO, stdout=log, stderr=log))
        log.close()
    try:
        deadline = time.monotonic() + 90
        for rank, process in enumerate(processes):
            if rank != 1 or what in ("busy", "leaves"):
                process.wait(max(deadline - time.monotonic(), 0.1))
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()
    return [(process.returncode, (folder / f"{rank}.log").read_text()) for rank, process in enumerate(processes)]


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (
            "stopped",
            "rank 1 gives no sign of life (stopped, swapped out, or its machine is gone); it was last seen at update",
        ),
        ("stuck", "rank 1 is not waiting for the others but at update, "),
        pytest.param("never comes", "rank 1 never came", marks=pytest.mark.slow),
        pytest.param(
            "elsewhere", "all ranks wait for each other, at different places: rank 0: update", marks=pytest.mark.slow
        ),
    ],
)
def test_a_rank_that_hangs_is_named_by_all_others(what: str, said: str, tmp_path: Path) -> None:
    started = time.monotonic()
    found = ranks(what, tmp_path, 3)
    for rank in (0, 2):
        assert said in found[rank][1] and f"for {LIMIT_S:g} s (policy.init_timeout_s)" in found[rank][1], (rank, found)
    # a rank that leaves a little later than the others may be ended by their connections
    assert EXIT_CODE in {code for code, _ in found} and 0 not in {code for code, _ in found}
    assert time.monotonic() - started < 80


@pytest.mark.slow
def test_a_rank_that_gets_on_is_waited_for(tmp_path: Path) -> None:
    assert all(code == 0 and "done" in output for code, output in ranks("busy", tmp_path, 2))


def test_a_finished_rank_keeps_its_exit_code_while_threads_are_inside_the_store(tmp_path: Path) -> None:
    """The interpreter's own end aborts such a process: exit code -6 of work that was done."""
    found = ranks("leaves", tmp_path, 2)
    assert [code for code, _ in found] == [0, 3], found
    assert ["the end" in output for _, output in found] == [True, True], "what was not flushed yet"
