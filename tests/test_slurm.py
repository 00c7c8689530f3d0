"""The job scripts on a real Slurm: two slurmd on this host, a job over both, requeued in mid-step, and a node that
dies.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.workers.recipe_runs import recipe, records
from tests.workers.slurm_cluster import Cluster, missing

REPO = Path(__file__).resolve().parents[1]
LACKS = missing()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if LACKS:
        pytest.skip(f"no Slurm can be run here, missing: {', '.join(LACKS)} (Debian: apt-get install slurm-wlm munge)")
    with Cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


def submit(cluster: Cluster, stage: dict[str, Any], root: Path, *words: str) -> str:
    """sbatch the real script, made small: two nodes with one rank each, replayed rollouts."""
    environment = {
        **cluster.env,
        "RECIPE": "recipes/pact_bfcl.py",
        "SETTINGS": f"--config {stage['preset']}",
        "RANKS_PER_NODE": "1",
        "RUN_ROOT": str(root),
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "PACT_REPOSITORY": str(REPO),
    }
    resources = [
        "--nodes=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=1",
        "--gpus-per-node=0",
        "--mem=0",
        f"--output={root}.log",
    ]
    command = [
        "sbatch",
        "--parsable",
        *resources,
        str(REPO / "slurm" / "pact_bfcl.sh"),
        *stage["words"],
        f"run.root={root}",
        *words,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, cwd=root.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def wait_for(condition: Callable[[], bool], seconds: float, log: Path) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, log.read_text()[-3000:] if log.is_file() else "no log"
        time.sleep(0.3)


def metrics(root: Path) -> list[dict[str, Any]]:
    path = root / "latest" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


@pytest.mark.slow
def test_a_job_over_two_nodes_is_requeued_in_mid_step_and_ends_as_if_it_never_was(
    cluster: Cluster,
    stage: dict[str, Any],
    tmp_path: Path,
) -> None:
    uncut = recipe(stage, "uncut", "policy.pipeline_parallel=2", ranks=2)
    root = tmp_path / "requeued"
    job = submit(cluster, stage, root, "policy.pipeline_parallel=2", "run.name=uncut")
    wait_for(
        lambda: len(metrics(root)) == 2, 240, Path(f"{root}.log")
    )  # the warm-up and the first RL step are done, the second is under way
    assert cluster.state(job) == "RUNNING"
    cluster.ask("scontrol", "requeue", job)
    cluster.wait_state(job, ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL"), 400)
    said = Path(f"{root}.log").read_text()
    assert cluster.state(job) == "COMPLETED", said[-3000:]
    assert f"job {job} attempt 0 on n[1-2]" in said and f"job {job} attempt 1 on n[1-2]" in said and "--resume" in said
    assert (
        len(list((root / "logs" / f"job-{job}").glob("attempt-0-rank-*.log")))
        == 2
        == len(list((root / "logs" / f"job-{job}").glob("attempt-1-rank-*.log")))
    )
    assert records((root / "latest").resolve()) == records(uncut)
    one, other = load_file(root / "latest" / "hf" / "model.safetensors"), load_file(uncut / "hf" / "model.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_the_schedulers_notice_is_a_checkpoint_and_the_job_requeues_itself(
    cluster: Cluster,
    stage: dict[str, Any],
    tmp_path: Path,
) -> None:
    root = tmp_path / "noticed"
    job = submit(cluster, stage, root, "trainer.checkpoint_every=0")
    wait_for(lambda: len(metrics(root)) >= 1, 240, Path(f"{root}.log"))
    cluster.ask("scancel", "--signal=TERM", job)  # what --signal=TERM@900 sends
    cluster.wait_state(job, ("COMPLETED", "FAILED", "CANCELLED"), 400)
    said = Path(f"{root}.log").read_text()
    assert cluster.state(job) == "COMPLETED", said[-3000:]
    assert "attempt 0 ended with 75" in said and "requeued" in said and "attempt 1 ended with 0" in said
    assert [(r["stage"], r["step"]) for r in metrics(root)] == [("warmup", 1), ("rl", 1), ("rl", 2)]


@pytest.mark.slow
def test_a_node_that_dies_takes_the_job_with_it_and_it_goes_on_when_the_node_is_back(
    cluster: Cluster,
    stage: dict[str, Any],
    tmp_path: Path,
) -> None:
    root = tmp_path / "died"
    job = submit(cluster, stage, root)
    wait_for(lambda: len(metrics(root)) >= 2, 240, Path(f"{root}.log"))
    cluster.kill_node("n2")
    cluster.wait_state(job, ("PENDING", "REQUEUED", "CONFIGURING", "COMPLETING"), 180)
    cluster.start_node("n2")
    cluster.wait_state(job, ("COMPLETED", "FAILED", "CANCELLED"), 400)
    said = Path(f"{root}.log").read_text()
    assert cluster.state(job) == "COMPLETED", said[-3000:]
    assert [(r["stage"], r["step"]) for r in metrics(root)] == [("warmup", 1), ("rl", 1), ("rl", 2)]


#: ``srun`` of a cluster with pyxis: takes its options, and hides Slurm's own programs from the command
PYXIS = """#!/bin/bash
options=()
while [[ "$1" == --* ]]; do
    case "$1" in --container-image=*) inside=1;; --container-*) ;; *) options+=("$1");; esac
    shift
done
[ -z "${inside:-}" ] || set -- env "PATH=HIDDEN:$PATH" "$@"
exec REAL "${options[@]}" "$@"
"""


def contain(cluster: Cluster, folder: Path, monkeypatch: pytest.MonkeyPatch, container: str) -> None:
    """Submit jobs with ``CONTAINER=container``; "" is none."""
    hidden = folder / "hidden"
    hidden.mkdir()
    for place, name, text in ((hidden, "scontrol", "exit 127"), (folder, "srun", PYXIS)):
        real = shutil.which("srun", path=cluster.env["PATH"]) or ""
        (place / name).write_text(text.replace("HIDDEN", str(hidden)).replace("REAL", real))
        (place / name).chmod(0o755)
    monkeypatch.setitem(cluster.env, "PATH", f"{folder}:{cluster.env['PATH']}")
    monkeypatch.setitem(cluster.env, "CONTAINER", container)


with_and_without_a_container = pytest.mark.parametrize("container", ["", "image"])


@pytest.mark.slow
@with_and_without_a_container
def test_a_layout_that_the_nodes_do_not_hold_ends_the_job_before_its_ranks(
    cluster: Cluster, stage: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, container: str
) -> None:
    contain(cluster, tmp_path, monkeypatch, container)
    monkeypatch.setitem(cluster.env, "SERVER_NODES", "1")
    monkeypatch.setitem(cluster.env, "SBATCH_PARTITION", "main")
    root = tmp_path / "refused"
    job = submit(cluster, stage, root, "policy.pipeline_parallel=2")
    cluster.wait_state(job, ("COMPLETED", "FAILED", "CANCELLED"), 200)
    said = Path(f"{root}.log").read_text()
    assert cluster.state(job) == "FAILED" and "leaves 1 trainer ranks" in said and "--nodes=3" in said, said
    assert not list((root / "logs" / f"job-{job}").iterdir())
    monkeypatch.setitem(cluster.env, "SBATCH_PARTITION", "another")
    with pytest.raises(AssertionError, match="invalid partition"):
        submit(cluster, stage, root)


@pytest.mark.slow
@with_and_without_a_container
def test_a_rollout_server_on_a_node_of_its_own(
    cluster: Cluster,
    stage: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    container: str,
) -> None:
    root = tmp_path / "apart"
    contain(cluster, tmp_path, monkeypatch, container)
    monkeypatch.setitem(cluster.env, "SERVER_NODES", "1")
    words = [
        "trainer.replay=null",
        "trainer.steps=1",
        "trainer.batch_size=2",
        "trainer.mini_batch_size=2",
        "rollout.sampling.max_turn_tokens=24",
    ]
    job = submit(cluster, stage, root, *words)
    cluster.wait_state(job, ("COMPLETED", "FAILED", "CANCELLED"), 500)
    said = Path(f"{root}.log").read_text()
    assert cluster.state(job) == "COMPLETED", said[-3000:] + "".join(
        path.read_text()[-1500:] for path in (root / "logs" / f"job-{job}").glob("*")
    )
    assert (root / "logs" / f"job-{job}" / "attempt-0-server-0.url").read_text().startswith("http://127.0.0.1:")
    summary = json.loads((root / "latest" / "summary.json").read_text())
    assert [summary["eval"][name]["weight_version"] for name in ("base", "before", "after")] == [0, 1, 2]
    assert summary["peak_memory_bytes"]["server"] == 0  # the trainer started none


@pytest.mark.slow
@with_and_without_a_container
def test_a_rollout_engine_on_every_node(
    cluster: Cluster, stage: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, container: str
) -> None:
    root = tmp_path / "everywhere"
    contain(cluster, tmp_path, monkeypatch, container)
    words = ["trainer.replay=null", "trainer.steps=1", "trainer.batch_size=2", "trainer.mini_batch_size=2"]
    words += ["rollout.sampling.max_turn_tokens=24", "rollout.server.engines=all"]
    job = submit(cluster, stage, root, *words)
    cluster.wait_state(job, ("COMPLETED", "FAILED", "CANCELLED"), 500)
    said = Path(f"{root}.log").read_text()
    logs = "".join(path.read_text() for path in (root / "logs" / f"job-{job}").glob("*"))
    assert cluster.state(job) == "COMPLETED", said[-3000:] + logs
    assert "2 rollout servers ready" in logs
    run = (root / "latest").resolve()
    assert {path.name for path in run.glob("server*.log")} == {"server-0.log", "server-1.log"}
    summary = json.loads((run / "summary.json").read_text())
    assert [summary["eval"][name]["weight_version"] for name in ("base", "before", "after")] == [0, 1, 2]
    assert summary["peak_memory_bytes"]["server"] > 0
