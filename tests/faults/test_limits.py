"""What a run counts and shows of its faults, what it keeps on disk, and that an error of rank 0 is the same error on
every rank.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pact_nemo import errors
from pact_nemo.report.page import facts
from pact_nemo.runtime import collective
from pact_nemo.runtime.files import remove_unfinished, write_text_atomic
from pact_nemo.serving.config import RolloutServerConfig
from pact_nemo.serving.server import RolloutServer
from pact_nemo.tracking import episodes as records
from pact_nemo.tracking.run_folder import Workspace
from pact_nemo.training import close_run


def test_counters_of_all_steps_are_added_by_name() -> None:
    rows = [
        {"failed/ServerError": 2, "server/restarts": 1.0, "rollout/reissued": 3.0, "loss/total": 1.5},
        {"failed/ServerError": 1, "failed/X": 4},
    ]
    assert close_run.sum_counters(rows, "failed/") == {"ServerError": 3, "X": 4}
    assert close_run.sum_counters(rows, "server/") == {"restarts": 1} and close_run.sum_counters(
        rows, "rollout/reissued"
    ) == {"reissued": 3}
    assert close_run.sum_counters([{"server/restarts": 0.0}], "server/") == {}


def test_the_report_tells_failures_and_restarts() -> None:
    class Seen(SimpleNamespace):
        scored_tasks = "held-out"

        def setting(self, key: str) -> None:
            return None

    summary = {"failed_rollouts": {"SandboxFailure": 2, "ServerError": 7}, "server": {"restarts": 1}}
    run: Any = Seen(summary=summary, method="pact", seed=1, warmup=[], rl=[])
    told = dict(facts(run))
    assert told["Failed rollouts"] == "ServerError 7, SandboxFailure 2" and told["Rollout server"] == "restarts 1"
    run.summary = {"failed_rollouts": {}}
    assert not {"Failed rollouts", "Rollout server"} & set(dict(facts(run)))


@pytest.mark.parametrize(("keep", "left"), [(2, [3, 4]), (0, [0, 1, 2, 3, 4])])
def test_the_newest_steps_rollouts_stay(keep: int, left: list[int], tmp_path: Path) -> None:
    for step in range(5):
        records.dump_step(tmp_path / f"step_{step:06d}.jsonl", [], keep=keep)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step_{step:06d}.jsonl" for step in left]


def test_a_servers_log_that_outgrew_its_limit_starts_anew_and_goes_on(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    server = RolloutServer(RolloutServerConfig(log_mb=1), tmp_path, log_file=log)
    with open(log, "ab") as output:  # as the server has it
        os.write(output.fileno(), b"a" * 2**20)
        server.rotate_log()
        assert log.stat().st_size == 2**20, "at the limit, not beyond it"
        os.write(output.fileno(), b"b")
        server.rotate_log()
        os.write(output.fileno(), b"c")
    assert log.read_bytes() == b"c" and (tmp_path / "server.log.1").stat().st_size == 2**20 + 1


@pytest.mark.parametrize(
    "name", ["ServerLost", "Interrupted", "TooManyFailures", "CheckpointError", "NumericsError", "DataError"]
)
def test_an_error_of_rank_zero_has_its_type_on_every_rank(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who catches it to checkpoint together, does so on all ranks; else one would wait for the others."""

    def receive(message: list[Any], src: int) -> None:
        message[1] = (name, "what happened")

    monkeypatch.setattr(collective, "world_size", lambda: 2)
    monkeypatch.setattr(collective, "rank", lambda: 1)
    monkeypatch.setattr(collective.dist, "broadcast_object_list", receive)
    with pytest.raises(getattr(errors, name), match="what happened"):
        collective.on_rank_zero(lambda: None)


@pytest.mark.parametrize("name", ["KeyError", "Sequence"])  # not ours, and a name of the module that is no error
def test_another_error_of_rank_zero_is_ours_by_its_text(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collective, "world_size", lambda: 2)
    monkeypatch.setattr(collective, "rank", lambda: 1)
    monkeypatch.setattr(
        collective.dist, "broadcast_object_list", lambda message, src: message.__setitem__(1, (name, "x"))
    )
    with pytest.raises(errors.PactError, match=f"rank 0 stopped with {name}: x"):
        collective.on_rank_zero(lambda: None)


def test_runs_of_the_same_path_on_two_machines_share_no_exports_folder(tmp_path: Path) -> None:
    """The mark is the run's own; it stays when the run is resumed, wherever."""
    places = []
    for machine in ("a", "b"):
        folder = tmp_path / machine / "runs" / "x-seed1-1"
        folder.mkdir(parents=True)
        space = Workspace(folder)
        write_text_atomic(space.mark, f"mark-of-{machine}\n")
        for _ in range(2):
            again = Workspace(folder)
            again.place_exports("/shared")
            places.append(again.exports)
    assert places[0] == places[1] == Path("/shared/x-seed1-1-mark-of-a") and places[2] == places[3] != places[0]


def test_temporary_names_of_two_containers_differ(tmp_path: Path) -> None:
    """Their processes have the same ids."""
    code = (
        "import os; os.getpid = lambda: 7\nfrom pathlib import Path; "
        "from pact_nemo.runtime.files import temporary_beside as t; print(t(Path('a/b')))"
    )
    names = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert len(names) == 2 and all(name.startswith("a/.b.7") for name in names)
    unfinished = tmp_path / Path(names.pop().strip()).name
    unfinished.mkdir()
    assert remove_unfinished(tmp_path) == [unfinished] and not unfinished.exists()
