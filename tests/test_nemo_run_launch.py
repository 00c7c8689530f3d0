"""Launching through NeMo-Run: what it runs where it is installed, what is said where it isn't."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
INSTALLED = importlib.util.find_spec("nemo_run") is not None


def launch(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "nemo_run_launch.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


@pytest.mark.skipif(INSTALLED, reason="NeMo-Run is installed")
def test_without_nemo_run_the_other_ways_are_named() -> None:
    done = launch("--config", "conf/pact_bfcl-smollm2_135m-cpu.yaml")
    assert done.returncode == 1 and "requirements-nemo-run.txt" in done.stderr and "torchrun or sbatch" in done.stderr


@pytest.mark.skipif(not INSTALLED, reason="NeMo-Run is not installed")
def test_slurm_and_local_launch_the_recipe(tmp_path: Path) -> None:
    slurm = launch(
        "--recipe",
        "qwen3_4b_4xh100_bf16",
        "--executor",
        "slurm",
        "--partition",
        "p",
        "--job-dir",
        str(tmp_path),
        "--print",
        "a.b=1",
    )
    assert slurm.returncode == 0, slurm.stderr
    assert "--gpus-per-node=4" in slurm.stdout and "--ntasks-per-node=4" in slurm.stdout
    refused = launch("--recipe", "llama3p1_70b_64xh100_bf16", "--print")
    assert refused.returncode == 1 and "needs 8 nodes" in refused.stderr
