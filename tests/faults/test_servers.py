"""A rollout server may die, hang, answer late, answer garbage or come back with old weights: what is sampled is what an
undisturbed run samples.

Here with a server process that has faults on order (fake_server.py); with vLLM in test_servers_real.py.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pact_nemo.environments.base import Task
from pact_nemo.errors import CheckpointError, ServerError, ServerLost
from pact_nemo.rollouts.batch import run_batch
from pact_nemo.rollouts.episode import EpisodeSetup, SeedPath
from pact_nemo.serving.config import Sampling
from pact_nemo.serving.health import State
from pact_nemo.serving.server import group_members
from pact_nemo.serving.supervisor import SupervisedServer
from tests.faults import tally
from tests.faults.server_bench import EPISODES, LIMITS, TURNS, Bench, Chat, Turns, content, play

RESTARTS = ("exit", "stop", "stuck", "engine dead", "wrong version", "two versions", "old weights")
REPEATS = (
    "lost",
    "late",
    "nan",
    "other tokens",
    "no tokens",
    "too many",
    "aborted",
    "500",
    "503",
    "garbage",
    "empty",
    "half",
    "drop",
)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.close()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Any]]:
    """By weight version; the versions' rollouts differ."""
    bench = Bench(tmp_path_factory.mktemp("undisturbed"))
    try:
        served = bench.launch()
        found = {0: content(play(served))}
        for version in (1, 2):
            bench.refit(version)
            found[version] = content(play(served, version))
        assert served.health.restarts == served.reissued == 0
        assert all(status == "ok" for _, _, status, *_ in found[2]) and found[1] != found[2]
        return found
    finally:
        bench.close()


def disturbed(bench: Bench, undisturbed: dict[int, list[Any]], what: str, at: int) -> SupervisedServer:
    served = bench.launch({"at": at, "do": what})
    bench.refit(1)
    group = served.server.pid
    assert content(play(served, 1)) == undisturbed[1], (what, at)
    assert served.reissued >= 1 or what in ("half", "drop"), "connection errors are repeated by the client itself"
    if what in RESTARTS:
        assert served.health.restarts == 1 and len(bench.notes) == 2 and "version 1" in bench.notes[1]
        assert group is not None and group_members(group) == []
    bench.refit(2)
    assert content(play(served, 2)) == undisturbed[2], "and afterwards"
    return served


@pytest.mark.parametrize("what", ["exit", "engine dead", "stuck", "old weights", "garbage"])
def test_a_fault_in_the_middle_of_a_batch_changes_nothing(
    bench: Bench, undisturbed: dict[int, list[Any]], what: str
) -> None:
    disturbed(bench, undisturbed, what, 7)


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("what", [*RESTARTS, *REPEATS])
def test_every_fault_at_any_request_changes_nothing(
    tmp_path: Path, undisturbed: dict[int, list[Any]], what: str
) -> None:
    places = random.Random(what).sample(range(1, EPISODES * TURNS + 1), 6)
    for number, at in enumerate(places):
        bench = Bench(tmp_path / str(number))
        bench.folder.mkdir()
        try:
            disturbed(bench, undisturbed, what, at)
        finally:
            bench.close()
    tally.record(f"server: {what} in mid-generation", injected=len(places), survived=len(places), lost=0)


def test_restarts_are_bounded_and_then_the_run_ends(bench: Bench) -> None:
    served = bench.launch(*({"at": at, "do": "exit"} for at in range(1, 100)), max_restarts=1)
    started = time.monotonic()
    with pytest.raises(ServerLost, match="(?s)given up after 1 restarts.*max_restarts"):
        play(served)
    assert time.monotonic() - started < 40
    with pytest.raises(ServerLost):
        play(served)


def test_a_server_that_doesnt_come_back_ends_the_run(bench: Bench) -> None:
    served = bench.launch({"at": 3, "do": "exit"}, max_restarts=2)
    (bench.folder / "no-start").touch()
    with pytest.raises(ServerLost, match="(?s)given up after 2 restarts.*exit code 3"):
        play(served)


def test_a_server_that_only_answers_garbage_fails_episodes_not_the_run(bench: Bench) -> None:
    served = bench.launch(*({"at": at, "do": "garbage"} for at in range(1, 100)), reissue_limit=1)
    items = [Task("t0", "t0", "c", (({"role": "user", "content": "x"},),), (), ((),))]
    (rollout,) = asyncio.run(
        run_batch(
            items,
            1,
            clients=[served],
            setup=EpisodeSetup(Turns(), Chat(), LIMITS, Sampling(), SeedPath(3, 0)),
            concurrency=1,
        )  # type: ignore[arg-type]
    )
    assert (
        rollout.status == "failed"
        and "no completion" in str(rollout.error)
        and served.reissued == 1
        and served.health.restarts == 0
    )


@pytest.mark.parametrize("what", ["exit", "stop", "fail", "keep"])
def test_a_server_that_fails_in_a_refit_is_restarted_and_loaded(
    bench: Bench, undisturbed: dict[int, list[Any]], what: str
) -> None:
    """``keep``: it says that it loaded the weights, and computes with the old ones."""
    served = bench.launch({"at": 2, "do": what, "of": "load"}, refit_timeout_s=1.0)
    bench.refit(1)
    bench.refit(2)
    assert served.health.restarts == 1 and served.health.serves(2)
    assert content(play(served, 2)) == undisturbed[2]


def test_a_prefix_cache_that_cant_be_reset_is_not_sampled_from(bench: Bench, undisturbed: dict[int, list[Any]]) -> None:
    served = bench.launch({"at": 1, "do": "fail", "of": "reset"})
    play(served)  # fills the cache
    bench.refit(1)
    assert served.health.restarts == 1 and "prefix cache" in bench.notes[0]
    assert content(play(served, 1)) == undisturbed[1]


def test_a_server_that_died_between_two_batches(bench: Bench, undisturbed: dict[int, list[Any]]) -> None:
    served = bench.launch()
    bench.refit(1)
    assert served.server.pid is not None
    os.killpg(served.server.pid, signal.SIGKILL)
    assert content(play(served, 1)) == undisturbed[1] and served.health.restarts == 1


@pytest.mark.parametrize("answers", ["at the first look", "later"])
def test_a_batch_that_ends_during_a_restart_holds_up_no_later_one(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, answers: str
) -> None:
    """The restart is broken off with the batch: it was left half started, nobody started it again, or both counted."""
    served = bench.launch()
    expected = content(play(served))
    restart = served.server.restart

    def restarted() -> None:
        restart()
        while answers == "at the first look" and not served.server.admin().healthy():
            time.sleep(0.05)

    monkeypatch.setattr(served.server, "restart", restarted)
    served._leaving = True
    with pytest.raises(ServerError, match="being stopped"):
        served.recover("it died as the last episode ended")
    served._leaving = False
    assert served.health.state is State.DEAD
    assert content(play(served)) == expected and served.health.restarts == 1


def test_weights_swapped_behind_our_back_are_noticed_by_the_heartbeat(bench: Bench) -> None:
    """With the right label on them: no completion says so. What was sampled in between can't be told; from the
    heartbeat on it is.
    """
    served = bench.launch({"at": 1, "do": "other weights"})
    bench.refit(1)
    play(served, 1)
    play(served, 1)
    assert served.health.restarts == 1 and "holds weight version None, not 1" in bench.notes[0], bench.notes


def test_older_and_damaged_exports_are_refused_and_the_server_goes_on(
    bench: Bench, undisturbed: dict[int, list[Any]]
) -> None:
    served = bench.launch()
    bench.refit(1)
    bench.refit(2)
    with pytest.raises(CheckpointError, match="versions only grow"):
        bench.refit(1)
    folder = bench.export(3)
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="corrupt"):
        bench.refit(3)
    assert served.weight_version == 2 and content(play(served, 2)) == undisturbed[2] and served.health.restarts == 0


def test_a_stop_does_not_wait_for_a_restart(bench: Bench) -> None:
    """The run is asked to stop while a server is being started anew, which would take long."""
    from pact_nemo.errors import Interrupted

    served = bench.launch({"at": 1, "do": "exit"}, start_timeout_s=60.0)
    program = served.server.program
    served.server.program = (sys.executable, "-c", "import time; time.sleep(60)")
    asked = threading.Event()
    threading.Timer(1.5, asked.set).start()

    def check() -> None:
        if asked.is_set():
            raise Interrupted("SIGTERM")

    items = [Task("t0", "t0", "c", (({"role": "user", "content": "x"},),), (), ((),))]
    started = time.monotonic()
    with pytest.raises(Interrupted):
        asyncio.run(
            run_batch(
                items,
                1,
                clients=[served],
                setup=EpisodeSetup(Turns(), Chat(), LIMITS, Sampling(), SeedPath(3, 0)),
                concurrency=1,
                check=check,
            )  # type: ignore[arg-type]
        )
    assert time.monotonic() - started < 40
    served.server.program = program
