"""Launching through NeMo-Run: what it runs where it is installed, what is said where it isn't."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
INSTALLED = importlib.util.find_spec("nemo_run") is not None
ABSENT = pytest.mark.skipif(not INSTALLED, reason="NeMo-Run is not installed")


def launch(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "nemo_run_launch.py"), *words]
    environment = {**os.environ, "COLUMNS": "300"}
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)


@pytest.mark.skipif(INSTALLED, reason="NeMo-Run is installed")
def test_without_nemo_run_the_other_ways_are_named() -> None:
    done = launch("--config", "conf/pact_bfcl-smollm2_135m-cpu.yaml")
    assert done.returncode == 1 and "requirements-nemo-run.txt" in done.stderr and "torchrun or sbatch" in done.stderr


@ABSENT
def test_slurm_and_local_launch_the_recipe(tmp_path: Path) -> None:
    words = ["--executor", "slurm", "--partition", "p", "--account", "a", "--job-dir", str(tmp_path), "--print"]
    slurm = launch("--recipe", "llama3p1_70b_64xh100_bf16", *words, "a.b=1")
    assert slurm.returncode == 0, slurm.stderr
    given = [line.strip() for line in slurm.stdout.splitlines()]
    for line in (
        "--nodes=8",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--partition=p",
        "--account=a",
        "--exclusive",
        "--mem=0",
        "--signal=TERM@4500",
    ):
        assert f"#SBATCH {line}" in given, line
    assert re.search(r" srun --output .* --kill-on-bad-exit=1 bash .*pact\.sh", " ".join(slurm.stdout.split()))
    refused = launch("--recipe", "llama3p1_70b_64xh100_bf16", "--print")
    assert refused.returncode == 1 and "needs 8 nodes" in refused.stderr


@ABSENT
def test_the_local_executor_runs_a_recipe_s_dry_run() -> None:
    done = launch("--python", sys.executable, "--config", "conf/pact_bfcl-smollm2_135m-cpu.yaml", "--dry-run")
    assert done.returncode == 0 and "SUCCEEDED" in done.stdout + done.stderr, done.stderr
    assert "training tasks" in done.stdout + done.stderr


@ABSENT
def test_a_recipe_that_was_changed_in_python_is_a_task(tmp_path: Path) -> None:
    from pact_nemo.config.load import load_config
    from pact_nemo.config.recipes import qwen3_4b_4xh100_bf16
    from pact_nemo.nemo_run_task import slurm_executor, task

    recipe = qwen3_4b_4xh100_bf16()
    recipe = replace(recipe, policy=replace(recipe.policy, micro_batch_tokens=16384))
    config = load_config([ROOT / "conf" / "pact_bfcl.yaml", recipe], ["model.path=/m", "trainer.steps=10"])
    settings = tmp_path / "settings.yaml"
    local, slurm = (task(config, settings, slurm=on, python="/py").inline.splitlines() for on in (False, True))
    assert load_config(settings) == config
    assert local[-1] == f"exec /py {ROOT}/recipes/pact_bfcl.py --config {settings}" == slurm[-1]
    [ranks] = set(slurm) - set(local)
    assert "RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS" in ranks
    executor = slurm_executor(1, 4, job_dir=tmp_path, account="a", partition="p", container_mounts=["/data:/data"])
    assert (executor.nodes, executor.ntasks_per_node, executor.gpus_per_node) == (1, 4, 4)
    assert executor.container_mounts == [f"{ROOT}:{ROOT}", "/data:/data"]
