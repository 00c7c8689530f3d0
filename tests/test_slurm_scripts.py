"""The job scripts with stand-ins for Slurm: what is printed dry, exit codes, addresses, and nodes that are too few."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from pact_nemo.config.load import load_config
from pact_nemo.config.recipes import RECIPES, recipe
from pact_nemo.config.schema import Config
from pact_nemo.errors import ConfigError
from pact_nemo.nemo_run_task import NOTICE_S
from pact_nemo.planning.from_config import run_plan
from tools.serve import settings_of

REPO = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path.name for path in (REPO / "slurm").glob("pact_*.sh"))


def dry_run(name: str, folder: Path, **said: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")} | {
        "RUN_ROOT": str(folder / "runs"),
        "PYTHON": sys.executable,  # not make's, which made this environment
        **said,
    }
    command = ["bash", str(REPO / "slurm" / name), "--dry-run", "trainer.steps=5"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, cwd=folder)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_dry_run_prints_the_resources_and_the_command_and_starts_nothing(name: str, tmp_path: Path) -> None:
    done = dry_run(name, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (
        "#SBATCH --nodes=" in done.stdout
        and "#SBATCH --signal=TERM@" in done.stdout
        and "#SBATCH --requeue" in done.stdout
    )
    (launch,) = [line for line in done.stdout.splitlines() if line.startswith("srun ")]
    assert "trainer.steps=5" in launch and f"run.root={tmp_path}" in launch and "--recipe" in launch
    assert not list(tmp_path.iterdir())


@functools.cache
def seconds_after_a_notice(name: str) -> float:
    """At most, by the plan: scoring, update and refit of a step, and a checkpoint."""
    plan = run_plan(load_config([REPO / "conf" / "pact_bfcl.yaml", recipe(name)], []))
    after = [seconds for phase, seconds in plan.phases.items() if phase.endswith(("scoring", "update", "refit"))]
    assert len(after) == 4
    return sum(after) + plan.checkpoint


def found(pattern: str, text: str) -> str:
    (only,) = re.findall(pattern, text, re.MULTILINE)
    return str(only)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_notice_is_longer_than_what_the_plan_says_still_runs(name: str) -> None:
    script, page = (REPO / "slurm" / name).read_text(), (REPO / "docs" / "cluster" / "slurm.md").read_text()
    notice = int(found(r"^#SBATCH --signal=TERM@(\d+)$", script))
    default = found(r"^SETTINGS=.*--recipe (\w+)", script)
    recipes = [default, *(each for each in RECIPES if name == "pact_70b.sh" and recipe(each).nodes > 1)]
    for each in recipes:  # a plan's seconds are within 26 %
        assert 1.26 * seconds_after_a_notice(each) <= notice <= NOTICE_S, each
    needs = f"{seconds_after_a_notice(default):,.0f} s"
    assert needs in script and f"| {needs} | {notice:,} s |" in found(rf"^\| `slurm/{name}` .*$", page)


def test_every_recipe_has_a_notice_that_is_long_enough() -> None:
    assert all(1.26 * seconds_after_a_notice(name) <= NOTICE_S for name in RECIPES)
    alone = found(r"(--recipe qwen3_4b_1xh100_lora.*)$", (REPO / "slurm" / "pact_lora.sh").read_text())
    assert 1.26 * seconds_after_a_notice("qwen3_4b_1xh100_lora") <= int(found(r"--signal=TERM@(\d+)", alone))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_job_that_is_submitted_elsewhere_says_what_it_needs(name: str, tmp_path: Path) -> None:
    done = dry_run(name, tmp_path, SLURM_SUBMIT_DIR=str(tmp_path))
    assert done.returncode == 2 and not done.stdout
    assert f"no slurm/job.sh in {tmp_path}" in done.stderr and "PACT_REPOSITORY=FOLDER" in done.stderr


def test_every_variable_of_the_job_scripts_is_in_the_manual() -> None:
    scripts = "".join(path.read_text() for path in (REPO / "slurm").glob("*.sh"))
    read = {name for name in re.findall(r"\$\{([A-Z_]+):?[-+]", scripts) if not name.startswith("SLURM_")}
    page = (REPO / "docs" / "cluster" / "slurm.md").read_text().partition("### Variables")[2].partition("\n## ")[0]
    table = "".join(line.split(" | ")[0] for line in page.splitlines() if line.startswith("| `"))
    assert read <= {*re.findall(r"`(\w+)`", table)} and {"RESUME", "MAX_REQUEUES", "CONTAINER"} <= read


def test_an_image_has_an_interpreter_of_its_own(tmp_path: Path) -> None:
    for said, interpreter in (({"CONTAINER": "image"}, "python3"), ({}, ".venv/bin/python")):
        done = dry_run("pact_bfcl.sh", tmp_path, PYTHON="", **said)
        assert f" rank {interpreter} recipes/pact_bfcl.py " in done.stdout, done.stdout + done.stderr


def test_a_job_of_a_part_of_a_node_asks_for_the_memory_that_the_plan_has() -> None:
    host = run_plan(load_config([REPO / "conf" / "pact_bfcl.yaml", recipe("qwen3_4b_4xh100_bf16")], [])).host
    script = (REPO / "slurm" / "pact_bfcl.sh").read_text()
    assert host is not None and f"{host.needed / 2**30:.0f} GiB" in script
    assert host.needed < int(found(r"^#SBATCH --mem=(\d+)G$", script)) * 2**30
    small = script.partition("conf/pact_bfcl-smollm2_135m-cpu.yaml")[2].partition("two CPU cores")[0]
    assert "--ntasks-per-node=1 --cpus-per-task=2 " in small and "--mem=" in small


@pytest.mark.parametrize("name", [name for name in RECIPES if recipe(name).policy.lora.rank])
def test_every_recipe_of_adapters_has_a_job_of_one_node_with_all_of_its_gpus(name: str, tmp_path: Path) -> None:
    ranks = str(recipe(name).gpus_per_node)
    script = "pact_lora.sh" if ranks == "8" else "pact_bfcl.sh"
    header = (REPO / "slurm" / script).read_text()
    assert "#SBATCH --nodes=1\n" in header and (ranks == "1" or f"#SBATCH --gpus-per-node={ranks}\n" in header)
    assert name in (REPO / "slurm" / "pact_lora.sh").read_text()
    done = dry_run(script, tmp_path, SETTINGS=f"--recipe {name}", RANKS_PER_NODE=ranks)
    assert done.returncode == 0, done.stderr
    assert f"--nodes=1 --ntasks={ranks} " in done.stdout and f"--recipe {name} " in done.stdout
    assert f"{ranks} ranks on 1 node(s)" in done.stdout and f"a rollout engine over {ranks} GPU(s)" in done.stdout


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


def job_of_one_node(folder: Path, job: int, *words: str, **said: str) -> tuple[subprocess.CompletedProcess[str], str]:
    """Run a job script as the batch step of a job; its ``srun`` makes the run's folder and ends well.

    Returns:
        what came of it, and the words of the trainer; "" where none was started.
    """
    asked = folder / f"asked-{job}"
    run = folder / "runs" / "latest"
    started = f'echo "$*" > {asked}; mkdir -p {run}/checkpoints; touch {run}/config.yaml'
    scontrol = 'case "$*" in *hostnames*) echo node0;; *) echo NodeAddr=127.0.0.1;; esac'
    for name, body in {
        "srun": f'[[ " $* " == *" --check-nodes "* ]] || {{ {started}; }}',
        "scontrol": scontrol,
    }.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")} | {
        "SLURM_JOB_ID": str(job),
        "SLURM_JOB_NODELIST": "node0",
        "SLURM_JOB_NUM_NODES": "1",
        "RUN_ROOT": str(folder / "runs"),
        "PACT_REPOSITORY": str(REPO),
        "PATH": f"{folder}:{os.environ['PATH']}",
        **said,
    }
    command = ["bash", str(REPO / "slurm" / "pact_bfcl.sh"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    return done, asked.read_text() if asked.exists() else ""


def test_a_job_goes_on_with_its_own_run_and_never_silently_with_another_jobs(tmp_path: Path) -> None:
    root, run = tmp_path / "runs", tmp_path / "runs" / "latest"
    done, asked = job_of_one_node(tmp_path, 7, "model.path=/m")
    assert done.returncode == 0, done.stdout + done.stderr
    assert asked.endswith(f"--recipe qwen3_4b_4xh100_bf16 run.root={root} model.path=/m\n")
    done, asked = job_of_one_node(tmp_path, 7, "model.path=/m", SLURM_RESTART_COUNT="1")
    assert done.returncode == 0 and asked.endswith(f" --resume {run}\n"), done.stdout + done.stderr

    for dry in ([], ["--dry-run"]):
        done, asked = job_of_one_node(tmp_path, 8, *dry, "model.path=/other")
        assert done.returncode == 2 and not asked, done.stdout + done.stderr
        assert "has the run of job 7" in done.stderr and "another RUN_ROOT" in done.stderr, done.stderr
        assert f"RESUME={run}" in done.stderr
    done, asked = job_of_one_node(tmp_path, 8, "trainer.steps=9", RESUME=str(run), RUN_ROOT=str(tmp_path / "new"))
    assert done.returncode == 0 and asked.endswith(f" --resume {run} trainer.steps=9\n"), done.stdout + done.stderr
    done, asked = job_of_one_node(tmp_path, 9, RESUME=str(tmp_path))
    assert done.returncode == 2 and not asked and "no config.yaml there" in done.stderr

    (root / "job-id").unlink()
    done, asked = job_of_one_node(tmp_path, 10)
    assert done.returncode == 2 and not asked and "has the run of something else" in done.stderr


def test_attempts_without_progress_are_the_jobs_own(tmp_path: Path) -> None:
    failing = tmp_path / "failing"
    failing.mkdir()
    (failing / "srun").write_text('#!/bin/bash\n[[ " $* " == *" --check-nodes "* ]] || exit 137\n')
    (failing / "srun").chmod(0o755)
    path = f"{failing}:{tmp_path}:{os.environ['PATH']}"
    for job, attempt, lost in ((7, 0, 1), (7, 1, 2), (8, 0, 1)):
        done, _ = job_of_one_node(tmp_path, job, PATH=path, SLURM_RESTART_COUNT=str(attempt))
        assert f"{lost} attempts without a new checkpoint so far" in done.stdout, done.stdout + done.stderr


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
    said["CONTAINER_MOUNTS"] = "/models:/models"
    logs = tmp_path / "runs" / "logs" / "job-7"  # addresses of servers that are long gone, of this job and another
    for folder in (logs.parent, logs, logs.with_name("job-6")):
        folder.mkdir(parents=True)
        (folder / "attempt-0-server-0.url").write_text("http://10.0.0.9:1\n")
        (folder / "attempt-0-server-7.url").write_text("http://10.0.0.9:2\n")
    done = job_of_four_nodes(tmp_path, "pact_70b.sh", "model.path=/m", **said)
    assert done.returncode == 0, done.stdout + done.stderr
    check, *servers, trainers = (tmp_path / "srun.d" / "srun").read_text().splitlines()
    assert " --check-nodes 4 2 8 " in check and "--container-image=image" in check
    for line, node in zip(sorted(servers), ("node3", "node4"), strict=True):
        assert f"--nodelist={node} " in line and "--cpus-per-task=96" in line and "--container-image=image" in line
        assert "tools/serve.py --script recipes/pact_70b.py " in line
    assert f"--container-mounts={REPO}:{REPO},/models:/models " in trainers
    assert "--nodelist=node1,node2" in trainers and "--ntasks=16" in trainers and "--cpu-bind=none" in trainers
    hard = subprocess.run(["bash", "-c", "ulimit -Hn"], capture_output=True, text=True, check=True).stdout.strip()
    assert trainers.startswith(f"cpus=12 omp=12 files={hard} ")
    rank = (tmp_path / "srun.d" / "python").read_text().splitlines()[-1]
    assert rank.startswith("0/1/8 10.0.0.1 recipes/pact_70b.py --recipe qwen3_14b_8xh100_bf16")
    assert rank.endswith("rollout.server.url=http://10.0.0.3:8000,http://10.0.0.4:8000")


def test_a_server_takes_the_settings_of_the_trainers_recipe_script() -> None:
    def of(script: str, recipe: str | None, *words: str) -> Config:
        return settings_of(Namespace(script=Path(script), recipe=recipe, config=None, overrides=list(words)))

    own = ("agent.tools=shop.py:Shop", "traces.path=t.jsonl", "model.path=/m")
    assert of("recipes/pact_own.py", "qwen3_4b_4xh100_bf16", *own).environment == "own"
    with pytest.raises(ConfigError, match="are settings of environment=own"):
        of("recipes/pact_bfcl.py", "qwen3_4b_4xh100_bf16", *own)
    assert of("recipes/pact_bfcl.py", None).environment == "bfcl"
    with pytest.raises(ConfigError, match="no small preset"):
        of("recipes/pact_70b.py", None)
    with pytest.raises(ConfigError, match="no such file"):
        of("recipes/nothing.py", None)
    with pytest.raises(ConfigError, match="names no settings file"):
        of("tools/doctor.py", None)


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
