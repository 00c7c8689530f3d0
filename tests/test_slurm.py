"""The job scripts on a real Slurm: two slurmd on this host, a job over both, requeued in mid-step, a node that dies,
and what is printed dry.
"""

from __future__ import annotations

import json
import os
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
SCRIPTS = sorted(path.name for path in (REPO / "slurm").glob("pact_*.sh"))
LACKS = missing()


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_dry_run_prints_the_resources_and_the_command_and_starts_nothing(name: str, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")} | {
        "RUN_ROOT": str(tmp_path / "runs")
    }
    command = ["bash", str(REPO / "slurm" / name), "--dry-run", "trainer.steps=5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (
        "#SBATCH --nodes=" in done.stdout
        and "#SBATCH --signal=TERM@" in done.stdout
        and "#SBATCH --requeue" in done.stdout
    )
    (launch,) = [line for line in done.stdout.splitlines() if line.startswith("srun ")]
    assert "trainer.steps=5" in launch and f"run.root={tmp_path}" in launch and "--recipe" in launch
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("code", "requeues"), [(75, 5), (76, 2), (137, 2), (1, 0), (2, 0), (0, 0)])
def test_what_a_job_makes_of_the_ranks_exit_code(code: int, requeues: int, tmp_path: Path) -> None:
    """``srun`` ends at once with ``code`` and no checkpoint; how many of five attempts put the job back into the
    queue.
    """
    asked = tmp_path / "asked"
    scontrol = (
        f'case "$*" in requeue*) echo "$2" >> {asked};; *hostnames*) echo node0;; *) echo NodeAddr=127.0.0.1;; esac'
    )
    srun = f'[[ " $* " == *" --check-nodes "* ]] || exit {code}'
    for name, body in {"srun": srun, "scontrol": scontrol}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    job = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node0",
        "SLURM_JOB_NUM_NODES": "1",
        "RUN_ROOT": str(tmp_path / "runs"),
    }
    environment = (
        {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
        | job
        | {"PACT_REPOSITORY": str(REPO)}
    )
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    for attempt in range(5):
        command = ["bash", str(REPO / "slurm" / "pact_bfcl.sh")]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, env=environment | {"SLURM_RESTART_COUNT": str(attempt)}
        )
        requeued = asked.read_text().splitlines() if asked.exists() else []
        assert requeued == ["7"] * min(attempt + 1, requeues), done.stdout + done.stderr
        assert done.returncode == (0 if attempt < requeues else code)


#: ``srun`` that runs a command once, as its first task; in a "container" no Slurm program is found
SRUN = """#!/bin/bash
echo "cpus=$SRUN_CPUS_PER_TASK omp=$OMP_NUM_THREADS files=$(ulimit -n) $*" >> "$STAND_IN/srun"
export SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=1
while [[ "$1" == --* ]]; do [[ "$1" != --container-image=* ]] || export PATH="$STAND_IN/container:$PATH"; shift; done
exec "$@"
"""
#: ``scontrol`` of a job of four nodes
SCONTROL = """#!/bin/bash
case "$*" in
  "show hostnames"*) printf 'node%s\\n' 1 2 3 4;;
  "show node "*) echo "NodeName=$3 NodeAddr=10.0.0.${3#node} Port=1";;
esac
"""
#: an interpreter that answers for the recipe and for tools/serve.py
INTERPRETER = """#!/bin/bash
echo "$RANK/$WORLD_SIZE/$LOCAL_WORLD_SIZE $MASTER_ADDR $*" >> "$STAND_IN/python"
[[ " $* " != *" --check-nodes "* ]] || exec "$REAL_PYTHON" "$@"
if [ "$1" = tools/serve.py ]; then
    while [ $# -gt 0 ]; do case "$1" in --address) address="$2";; --ready) ready="$2";; esac; shift; done
    command -v scontrol | grep -q container && ! scontrol show node node3 || exit 9
    echo "http://$address:8000" > "$ready"; exec sleep 60
fi
"""


def job_of_four_nodes(folder: Path, script: str, *words: str, **said: str) -> subprocess.CompletedProcess[str]:
    """Run a job script as the batch step of such a job, with stand-ins for Slurm, container and recipe."""
    (folder / "container").mkdir()
    missing = "#!/bin/bash\nexit 127\n"
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("interpreter", INTERPRETER)):
        (folder / name).write_text(text)
    (folder / "container" / "scontrol").write_text(missing)
    for path in (*folder.glob("s*"), folder / "interpreter", folder / "container" / "scontrol"):
        path.chmod(0o755)
    (folder / "srun.d").mkdir()
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "OMP_"))}
    environment |= {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[1-4]",
        "SLURM_JOB_NUM_NODES": "4",
        "SLURM_CPUS_PER_TASK": "12",
        "RUN_ROOT": str(folder / "runs"),
        "PACT_REPOSITORY": str(REPO),
        "STAND_IN": str(folder / "srun.d"),
        "PYTHON": str(folder / "interpreter"),
        "REAL_PYTHON": sys.executable,
        "PATH": f"{folder}:{os.environ['PATH']}",
        **said,
    }
    (folder / "srun.d" / "container").symlink_to(folder / "container")
    command = ["bash", str(REPO / "slurm" / script), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def test_servers_in_containers_are_reached_by_addresses_that_slurm_says_outside(tmp_path: Path) -> None:
    """Four nodes, two of them for servers; a container has no ``scontrol``."""
    said = {"SERVER_NODES": "2", "CONTAINER": "image", "SETTINGS": "--recipe qwen3_14b_8xh100_bf16"}
    done = job_of_four_nodes(tmp_path, "pact_70b.sh", "model.path=/m", **said)
    assert done.returncode == 0, done.stdout + done.stderr
    check, *servers, trainers = (tmp_path / "srun.d" / "srun").read_text().splitlines()
    assert " --check-nodes 4 2 8 " in check and "--container-image=image" in check
    for line, node in zip(sorted(servers), ("node3", "node4"), strict=True):
        assert f"--nodelist={node} " in line and "--cpus-per-task=96" in line and "--container-image=image" in line
    assert "--nodelist=node1,node2" in trainers and "--ntasks=16" in trainers and "--cpu-bind=none" in trainers
    hard = subprocess.run(["bash", "-c", "ulimit -Hn"], capture_output=True, text=True, check=True).stdout.strip()
    assert trainers.startswith(f"cpus=12 omp=12 files={hard} ")
    rank = (tmp_path / "srun.d" / "python").read_text().splitlines()[-1]
    assert rank.startswith("0/1/8 10.0.0.1 recipes/pact_70b.py --recipe qwen3_14b_8xh100_bf16")
    assert rank.endswith("rollout.server.url=http://10.0.0.3:8000,http://10.0.0.4:8000")


def test_nodes_that_do_not_hold_the_layout_are_refused_before_anything_starts(tmp_path: Path) -> None:
    wide = "policy.tensor_parallel=8"  # TP x PP = 32
    done = job_of_four_nodes(tmp_path, "pact_70b.sh", "model.path=/m", wide, SERVER_NODES="2")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "--nodes=4 and SERVER_NODES=2 leaves 16 trainer ranks" in done.stderr and "--nodes=6" in done.stderr
    assert len((tmp_path / "srun.d" / "srun").read_text().splitlines()) == 1  # the check alone
    (tmp_path / "again").mkdir()
    dry = job_of_four_nodes(tmp_path / "again", "pact_70b.sh", "--dry-run", wide, SERVER_NODES="2")
    assert dry.returncode == 2 and "submit with --nodes=6" in dry.stderr and "--nodelist=node4" in dry.stdout
    assert not (tmp_path / "again" / "srun.d" / "srun").exists()


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
    resources = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0", f"--output={root}.log"]
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
        len(list((root / "logs").glob("attempt-0-rank-*.log")))
        == 2
        == len(list((root / "logs").glob("attempt-1-rank-*.log")))
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
    cluster.ask("scancel", "--signal=TERM", job)  # what --signal=TERM@300 sends
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


@pytest.mark.slow
def test_a_layout_that_the_nodes_do_not_hold_ends_the_job_before_its_ranks(
    cluster: Cluster, stage: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cluster.env, "SERVER_NODES", "1")
    monkeypatch.setitem(cluster.env, "SBATCH_PARTITION", "main")
    root = tmp_path / "refused"
    job = submit(cluster, stage, root, "policy.pipeline_parallel=2")
    cluster.wait_state(job, ("COMPLETED", "FAILED", "CANCELLED"), 200)
    said = Path(f"{root}.log").read_text()
    assert cluster.state(job) == "FAILED" and "leaves 1 trainer ranks" in said and "--nodes=3" in said, said
    assert not list((root / "logs").iterdir())
    monkeypatch.setitem(cluster.env, "SBATCH_PARTITION", "another")
    with pytest.raises(AssertionError, match="invalid partition"):
        submit(cluster, stage, root)


@pytest.mark.slow
@pytest.mark.parametrize("container", ["", "image"])
def test_a_rollout_server_on_a_node_of_its_own(
    cluster: Cluster,
    stage: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    container: str,
) -> None:
    root = tmp_path / "apart"
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    for place, name, text in ((hidden, "scontrol", "exit 127"), (tmp_path, "srun", PYXIS)):
        real = shutil.which("srun", path=cluster.env["PATH"]) or ""
        (place / name).write_text(text.replace("HIDDEN", str(hidden)).replace("REAL", real))
        (place / name).chmod(0o755)
    monkeypatch.setitem(cluster.env, "PATH", f"{tmp_path}:{cluster.env['PATH']}")
    monkeypatch.setitem(cluster.env, "CONTAINER", container)
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
        path.read_text()[-1500:] for path in (root / "logs").glob("*")
    )
    assert (root / "logs" / "attempt-0-server-0.url").read_text().startswith("http://127.0.0.1:")
    summary = json.loads((root / "latest" / "summary.json").read_text())
    assert [summary["eval"][name]["weight_version"] for name in ("base", "before", "after")] == [0, 1, 2]
    assert summary["peak_memory_bytes"]["server"] == 0  # the trainer started none


@pytest.mark.slow
def test_a_rollout_engine_on_every_node(cluster: Cluster, stage: dict[str, Any], tmp_path: Path) -> None:
    root = tmp_path / "everywhere"
    words = ["trainer.replay=null", "trainer.steps=1", "trainer.batch_size=2", "trainer.mini_batch_size=2"]
    words += ["rollout.sampling.max_turn_tokens=24", "rollout.server.engines=all"]
    job = submit(cluster, stage, root, *words)
    cluster.wait_state(job, ("COMPLETED", "FAILED", "CANCELLED"), 500)
    said = Path(f"{root}.log").read_text()
    logs = "".join(path.read_text() for path in (root / "logs").glob("*"))
    assert cluster.state(job) == "COMPLETED", said[-3000:] + logs
    assert "2 rollout servers ready" in logs
    run = (root / "latest").resolve()
    assert {path.name for path in run.glob("server*.log")} == {"server-0.log", "server-1.log"}
    summary = json.loads((run / "summary.json").read_text())
    assert [summary["eval"][name]["weight_version"] for name in ("base", "before", "after")] == [0, 1, 2]
    assert summary["peak_memory_bytes"]["server"] > 0
