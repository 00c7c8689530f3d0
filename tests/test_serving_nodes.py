"""Engines on every node of a job: two ranks that are two nodes, a real store between them, and real processes.

Most of them are servers with faults on order (faults/fake_server.py); the slow test has vLLM's own.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pact_nemo.checkpoints.embedded import materialise_embedded_model
from pact_nemo.errors import ConfigError
from pact_nemo.serving import launch, nodes
from pact_nemo.serving.board import Board
from pact_nemo.serving.config import RolloutServerConfig
from pact_nemo.serving.endpoint import ServerEndpoint
from pact_nemo.serving.nodes import JobEngines, Seat, address_towards, job_engines
from pact_nemo.serving.placement import EnginePlace, engines_per_node, places_on_node
from pact_nemo.serving.remote import Keeper, RemoteServer, Where
from pact_nemo.serving.server import RolloutServer
from pact_nemo.serving.supervisor import SupervisedServer
from tests.faults.server_bench import Bench, content, play
from tests.workers.engines_worker import TASKS, VLLM

REPO = Path(__file__).resolve().parents[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Job:
    """Two ranks, each a node of its own; ``faults`` of the second one's engines."""

    def __init__(self, folder: Path, engines: str, what: str, *faults: dict[str, Any], model: Path | None = None):
        self.folder, self.model = folder, model or folder / "model"
        for node, plan in enumerate(([], list(faults))):
            (folder / f"faults-{node}").mkdir()
            (folder / f"faults-{node}" / "faults.json").write_text(json.dumps(plan))
        shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        shared |= {"MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
        shared |= {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
        worker = REPO / "tests" / "workers" / "engines_worker.py"
        self.ranks = [
            subprocess.Popen(
                [sys.executable, str(worker), str(folder), str(self.model), engines, what],
                env={**os.environ, **shared, "RANK": str(number)},
                cwd=REPO,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for number in (0, 1)
        ]

    def ended(self, timeout_s: float = 120) -> list[tuple[int, str]]:
        """Exit code and output of each rank."""
        try:
            outputs = [one.communicate(timeout=timeout_s)[0] for one in self.ranks]
        finally:
            for one in self.ranks:
                one.kill()
        return [(one.returncode, text) for one, text in zip(self.ranks, outputs, strict=True)]

    def result(self, timeout_s: float = 120) -> dict[str, Any]:
        ends = self.ended(timeout_s)
        assert [code for code, _ in ends] == [0, 0], ends
        found: dict[str, Any] = json.loads((self.folder / "result.json").read_text())
        assert self.engines() == []
        return found

    def engines(self, parent: int | None = None) -> list[int]:
        """Server processes of this job; only those that a rank started."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if f"--model={self.model}" not in (entry / "cmdline").read_text().replace("\0", " "):
                    continue
                started_by = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if parent is None or started_by == parent:
                found.append(int(entry.name))
        return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What one engine samples: versions 0 and 1."""
    bench = Bench(tmp_path_factory.mktemp("alone"))
    try:
        served = bench.launch()
        made = [content(play(served, tasks=TASKS))]
        bench.refit(1)
        made.append(content(play(served, 1, TASKS)))
        found: list[Any] = json.loads(json.dumps(made))
        return found
    finally:
        bench.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    bench = Bench(tmp_path)
    bench._model(tmp_path / "model", 0)
    bench.export(1)
    return tmp_path


def test_engines_of_two_nodes_sample_what_one_samples(folder: Path, alone: list[Any]) -> None:
    found = Job(folder, "4", "nothing").result()
    assert found["made"] == alone
    assert len(set(found["urls"])) == 4 and found["notes"] == [] and min(found["peak"]) > 0
    assert found["counts"] == {"server/restarts": 0, "rollout/reissued": 0, "engines/share": 1.0}
    served = [int((folder / f"faults-{node}" / "generate.count").read_text()) for node in (0, 1)]
    assert served == [48, 24], "of six tasks, four go to the first two of four engines; two batches"
    assert {path.name for path in folder.glob("server-*.log")} == {f"server-{number}.log" for number in range(4)}


def test_another_nodes_engine_is_restarted_there_and_given_up_when_that_fails(folder: Path, alone: list[Any]) -> None:
    found = Job(folder, "all", "node", *({"at": at, "do": "exit"} for at in (2, 7))).result()
    assert found["made"] == alone, "a kill in mid-batch changes no number"
    assert found["counts"]["server/restarts"] == 1 and found["counts"]["engines/share"] == 0.5
    text = "\n".join(found["notes"])
    assert "restart 1 of 1" in text and "server 2 of 2 is given up; 1 of 2 are left" in text


@pytest.mark.parametrize("what", ["rank", "kill"])
def test_no_engine_outlives_its_rank(folder: Path, what: str) -> None:
    job = Job(folder, "2", what)
    if what == "rank":  # rank 0 fails: both leave, and say why
        ends = job.ended()
        assert [code for code, _ in ends] == [1, 1] and all("has had enough" in text for _, text in ends), ends
    else:
        deadline = time.monotonic() + 60
        while not (folder / "ready").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(job.engines(job.ranks[1].pid)) == len(job.engines(job.ranks[0].pid)) == 1
        for one in job.ranks:
            os.kill(one.pid, signal.SIGKILL)
        assert [code for code, _ in job.ended()] == [-signal.SIGKILL] * 2
    deadline = time.monotonic() + 10
    while job.engines() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert job.engines() == []


class Held:
    """An engine that takes a while to end, and holds memory until then."""

    pid = None

    def __init__(self) -> None:
        self.ended = False

    def exit_reason(self) -> None: ...

    def rotate_log(self) -> None: ...

    def peak_memory_bytes(self) -> int:
        return 0

    def close(self) -> None:
        time.sleep(0.5)
        self.ended = True


class Words(dict[str, str]):
    """A store of this process."""

    set = dict.__setitem__

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)


def test_an_engine_that_is_put_down_holds_nothing_any_more(tmp_path: Path) -> None:
    words, held = Words(), Held()
    keeper = Keeper(held, Board(words, 0))  # type: ignore[arg-type]
    keeper.start()
    server = RemoteServer(of("all"), Board(words, 0), Where("n1", 8, tmp_path / "log", "key"))  # type: ignore[arg-type]
    server.end()
    assert held.ended, "the trainer takes the memory next"
    keeper.stop()


@pytest.mark.slow
def test_two_vllm_engines_sample_the_bits_of_one_when_one_is_killed_in_mid_batch(tmp_path: Path) -> None:
    model = materialise_embedded_model(REPO / ".cache" / "pact_nemo")
    with RolloutServer(RolloutServerConfig(**VLLM), model, log_file=tmp_path / "alone.log") as server:
        supervised = SupervisedServer(server, like=model)
        supervised.wait_ready()
        expected = json.loads(json.dumps([content(play(supervised, tasks=TASKS, whole=False))]))
    assert all(row[2] != "failed" and len(row[3]) >= 12 for row in expected[0]), expected
    found = Job(tmp_path, "all", "vllm", model=model).result(600)
    assert found["made"] == expected
    assert found["counts"]["server/restarts"] == 1 and found["counts"]["engines/share"] == 1.0
    assert "restart 1 of 1" in found["notes"][0] and "back after" in found["notes"][1]


def test_each_engine_has_gpus_and_cores_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    places = places_on_node(2, 2, ["4", "5", "6", "7"], address="10.0.0.7", api_key="k")
    assert [place.devices for place in places] == [("4", "5"), ("6", "7")] and "k'" not in repr(places)
    assert [place.cores(range(5)) for place in places] == [[0, 1], [2, 3]]
    assert EnginePlace(2, 3).cores([0, 1]) == [0, 1], "fewer cores than engines: they share them"
    assert EnginePlace().cores([0, 1]) == [0, 1]

    endpoint = ServerEndpoint("http://10.0.0.7:1", "k")
    cpu = launch.engine_environment(RolloutServerConfig(device="cpu"), endpoint, EnginePlace(0, 10**6))
    assert cpu["CUDA_VISIBLE_DEVICES"] == ""
    monkeypatch.setattr(launch, "on_cuda", lambda config: True)
    gpu = launch.engine_environment(RolloutServerConfig(), endpoint, places[1])
    assert gpu["CUDA_VISIBLE_DEVICES"] == "6,7"


def of(engines: str, ranks: int = 1) -> RolloutServerConfig:
    return RolloutServerConfig(engines=engines, tensor_parallel_size=ranks)


def test_engines_of_a_node() -> None:
    assert engines_per_node(of("all", 2), 4, 8) == 4 and engines_per_node(of("all", 8), 8, 8) == 1
    assert engines_per_node(of("all", 2), 1, 1) == 1, "one rank, and an engine that is wider: as many GPUs as it takes"
    assert engines_per_node(of("all"), 3, None) == 1 and engines_per_node(of("6"), 3, None) == 2
    with pytest.raises(
        ConfigError, match="engines=4 can't be shared evenly by 3 nodes; take 1 .*multiple of 3, or all"
    ):
        engines_per_node(of("4"), 3, 8)
    for wrong in ("0", "-1", "some", ""):
        with pytest.raises(ConfigError, match="rollout.server.engines is"):
            of(wrong).validate()


def seat(
    number: int, devices: str | None = "0,1,2,3", ranks: int = 4, *, leader: bool = True, missing: tuple[str, ...] = ()
) -> Seat:
    gpus = tuple(devices.split(",")) if devices is not None else None
    return Seat(number, leader, f"n{number}", f"10.0.0.{number}", gpus, ranks, missing)


def job_of(monkeypatch: pytest.MonkeyPatch, folder: Path, engines: str, *seats: Seat, ranks: int = 1) -> JobEngines:
    """As rank 0 sees it."""
    monkeypatch.setattr(nodes, "gather", lambda value: list(seats) if isinstance(value, Seat) else [value])
    return job_engines(of(engines, ranks), folder / "model", folder / "server.log", lambda: None)


def test_rank_zero_knows_the_engines_of_every_node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seats = (seat(0), seat(1, leader=False), seat(2))
    servers = job_of(monkeypatch, tmp_path, "all", *seats, ranks=2).servers
    assert [server.elsewhere for server in servers] == [False, False, True, True]
    assert [server.log_file.name for server in servers] == [f"server-{number}.log" for number in range(4)]
    own = [server.place for server in servers if isinstance(server, RolloutServer)]
    assert [place.devices for place in own] == [("0", "1"), ("2", "3")] and {place.address for place in own} == {None}
    (only,) = job_of(monkeypatch, tmp_path, "all", seat(0), ranks=4).servers
    assert only.log_file.name == "server.log"


def test_a_job_that_can_not_have_such_engines_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="3 rollout engine.* need 6 GPUs, this process sees 4 "):
        job_of(monkeypatch, tmp_path, "3", seat(0), ranks=2)
    with pytest.raises(ConfigError, match="sees 1 .0.; .* let the first rank of a node see all of its GPUs"):
        job_of(monkeypatch, tmp_path, "2", seat(0, "0"))
    with pytest.raises(ConfigError, match="the trainer has 3 GPUs on n4 and 4 on n0"):
        job_of(monkeypatch, tmp_path, "all", seat(0), seat(4, ranks=3))
    with pytest.raises(ConfigError, match="n4 does not see /nvme/v: .*put model.path, .* of all nodes"):
        job_of(monkeypatch, tmp_path, "all", seat(0), seat(4, missing=("/nvme/v",)))
    with pytest.raises(ConfigError, match="rank 0 is no first rank of its node"):
        job_of(monkeypatch, tmp_path, "all", seat(0, leader=False), seat(4))


def test_the_way_to_rank_zero() -> None:
    assert address_towards(None) == address_towards("127.0.0.1") == "127.0.0.1"
    with pytest.raises(ConfigError, match="finds no way to rank 0 at MASTER_ADDR=no-such-host.invalid"):
        address_towards("no-such-host.invalid")
