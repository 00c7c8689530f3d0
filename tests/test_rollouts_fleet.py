"""Several engines share a batch, and one that is given up in the middle of it changes no number.

Server processes with faults on order (faults/fake_server.py): what they sample is a function of weights, prompt and
seed, so an answer of other weights, or a request that lost its seed on the way, is seen. (vLLM's own:
test_training_runs_served.py.)
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pact_nemo.errors import ServerLost
from pact_nemo.monitoring import alarms
from pact_nemo.rollouts.batch import _Gate
from pact_nemo.serving.fleet import Fleet
from pact_nemo.serving.health import State
from tests.faults.server_bench import Bench, content, play

TASKS = 6
Faults = dict[int, list[dict[str, Any]]]


class Engines:
    """A fleet of processes; ``faults`` by number of the engine."""

    def __init__(self, folder: Path, count: int, faults: Faults | None = None, min_share: float = 0.5):
        self.notes: list[str] = []
        self.benches = [Bench(folder / str(number)) for number in range(count)]
        for bench in self.benches:
            bench.folder.mkdir(parents=True)
        served = [
            bench.launch(*(faults or {}).get(number, []), max_restarts=1) for number, bench in enumerate(self.benches)
        ]
        self.fleet = Fleet(served, min_share=min_share, note=self.notes.append)

    def refit(self, version: int) -> int:
        """Number of engines that loaded it."""
        folder = self.benches[0].export(version)
        return len(self.fleet.refit(folder, version, like=self.benches[0].folder / "model"))

    def asked(self) -> list[int]:
        """Requests that each engine saw so far."""
        files = [bench.folder / "generate.count" for bench in self.benches]
        return [int(file.read_text()) if file.exists() else 0 for file in files]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Any]:
    made: list[Engines] = []

    def start(count: int, faults: Faults | None = None, **settings: Any) -> Engines:
        made.append(Engines(tmp_path / str(len(made)), count, faults, **settings))
        return made[-1]

    yield start
    for one in made:
        one.fleet.close()


def dies_at(*numbers: int) -> list[dict[str, Any]]:
    return [{"at": number, "do": "exit"} for number in numbers]


def test_an_engine_that_is_given_up_changes_no_number_and_the_others_go_on(make: Any) -> None:
    alone = make(1)
    expected = {0: content(play(alone.fleet, tasks=TASKS))}
    for version in (1, 2):
        alone.refit(version)
        expected[version] = content(play(alone.fleet, version, TASKS))
    assert expected[0] != expected[1] != expected[2]

    three = make(3, {1: dies_at(3, 8)})  # killed in mid-batch, restarted once, and killed again
    assert content(play(three.fleet, tasks=TASKS)) == expected[0]
    assert [engine.health.state for engine in three.fleet.engines] == [State.HEALTHY, State.LOST, State.HEALTHY]
    assert three.fleet.share == pytest.approx(2 / 3)
    (told,) = three.notes
    assert "server 2 of 3 is given up; 2 of 3 are left" in told
    counts = three.fleet.counts()
    assert counts["engines/share"] == pytest.approx(2 / 3)
    assert counts["server/restarts"] == 1 and counts["rollout/reissued"] >= 2
    assert "67 %" in str(alarms.engines_left(counts)) and alarms.engines_left({}) is None

    before = three.asked()
    for version in (1, 2):
        assert three.refit(version) == 2, "the one that is given up is not loaded"
        assert content(play(three.fleet, version, TASKS)) == expected[version]
    after = three.asked()
    assert after[1] == before[1] and min(after[0] - before[0], after[2] - before[2]) > 0, "both of the others work"


def test_too_few_engines_end_the_run(make: Any) -> None:
    two = make(2, {0: dies_at(*range(1, 50))}, min_share=0.6)
    with pytest.raises(ServerLost, match=r"(?s)1 of 2 rollout servers .* 0\.6 .*min_engines_share.*given up after 1"):
        play(two.fleet, tasks=TASKS)
    half = make(2, {number: dies_at(*range(1, 50)) for number in (0, 1)})
    with pytest.raises(ServerLost, match="2 of 2 rollout servers"):
        play(half.fleet, tasks=TASKS)


def test_an_engine_that_is_lost_in_a_refit_is_left_out(make: Any) -> None:
    failing = [{"at": number, "do": "fail", "of": "load"} for number in (1, 2)]
    two = make(2, {1: failing})
    assert two.refit(1) == 1 and two.fleet.share == 0.5
    rollouts = play(two.fleet, 1, TASKS)
    assert {rollout.weight_version for rollout in rollouts} == {1} and two.asked()[1] == 0


def test_all_rollouts_of_a_task_find_their_prompt_in_one_engine(make: Any) -> None:
    two = make(2)
    routes = two.fleet.routes(5)
    assert [route._engine is two.fleet.engines[number % 2] for number, route in enumerate(routes)] == [True] * 5


def test_fewer_episodes_are_let_in_once_the_limit_has_fallen() -> None:
    limit, inside, seen = 4, 0, []

    async def episode(gate: _Gate, number: int) -> None:
        nonlocal inside, limit
        async with gate:
            inside += 1
            seen.append(inside)
            await asyncio.sleep(0.001)
            if number == 3:
                limit = 2
            inside -= 1

    async def batch() -> None:
        gate = _Gate(lambda: limit)
        async with asyncio.timeout(10):
            await asyncio.gather(*(episode(gate, number) for number in range(20)))

    asyncio.run(batch())
    assert len(seen) == 20 and max(seen[:4]) == 4 and max(seen[4:]) <= 2 + 1  # those that were inside leave first


def test_engines_that_fail_in_a_refit_come_back_side_by_side(make: Any) -> None:
    failing = [{"at": 1, "do": "fail", "of": "load"}]
    three = make(3, {0: failing, 2: failing})
    together = threading.Barrier(2, timeout=20)
    for number in (0, 2):
        server = three.fleet.engines[number].server

        def restart(again: Callable[[], None] = server.restart) -> None:
            together.wait()  # breaks where one waits for the other's end
            again()

        server.restart = restart
    assert three.refit(1) == 3 and three.fleet.share == 1.0
    assert [engine.health.restarts for engine in three.fleet.engines] == [1, 0, 1]
    assert {rollout.weight_version for rollout in play(three.fleet, 1, TASKS)} == {1}
