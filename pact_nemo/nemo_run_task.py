"""A recipe as NeMo-Run starts it: the task, and the Slurm executor for it. NeMo-Run is optional.

    import nemo_run as run
    from pact_nemo.nemo_run_task import slurm_executor, task

    run.run(task(config, Path("runs/nemo_run/4b.yaml")), executor=run.LocalExecutor())

The task is a script with one command in it, the same that ``torchrun`` and ``sbatch`` start: NeMo-Run's own
serialisation of a function would need its package in the trainer's environment.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pact_nemo.checkout import ROOT
from pact_nemo.errors import MissingDependency
from pact_nemo.runtime.files import write_text_atomic

if TYPE_CHECKING:
    from pact_nemo.config.schema import Config

RECIPE_SCRIPT = "recipes/pact_bfcl.py"
PYTHON = str(ROOT / ".venv" / "bin" / "python")  #: of the trainer's environment
JOBS = ROOT / "runs" / "nemo_run"
NOTICE_S = 4500  #: before a Slurm job's time is up: the rest of a step and a checkpoint, of any recipe
#: a Slurm task is a rank, as in slurm/job.sh
_SLURM_RANK = (
    "export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS "
    "MASTER_ADDR=$SLURM_LAUNCH_NODE_IPADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))"
)


def nemo_run() -> Any:
    """The package.

    Raises:
        MissingDependency: it is not installed.
    """
    try:
        import nemo_run as found
    except ImportError as error:
        remedy = "pip install -r requirements-nemo-run.txt, or use torchrun or sbatch"
        raise MissingDependency(f"NeMo-Run can't be imported ({error}); {remedy}") from error
    return found


def task(
    config: Config, settings: Path, *, slurm: bool = False, script: str = RECIPE_SCRIPT, python: str = PYTHON
) -> Any:
    """A run of these settings, as a ``nemo_run.Script``. On one machine it starts its ranks itself.

    Args:
        config: every setting, as ``load_config`` returns them.
        settings: a file to write them to, on a disk that the run sees.
        slurm: each task of a Slurm job is a rank.
        script: recipe script of the benchmark, relative to the checkout.
        python: interpreter of the trainer's environment.

    Raises:
        MissingDependency: NeMo-Run is not installed.
    """
    nemo_run()
    from pact_nemo.config.schema import to_yaml  # what launches may have NeMo-Run alone in its environment

    write_text_atomic(settings, to_yaml(config))
    return command_task([python, str(ROOT / script), "--config", str(settings.resolve())], slurm=slurm)


def command_task(command: Sequence[str], *, slurm: bool) -> Any:
    """A command of the checkout, run in it and with its code, as a ``nemo_run.Script``."""
    lines = [
        f"cd {shlex.quote(str(ROOT))}",
        f"export PYTHONPATH={shlex.quote(str(ROOT))}",  # in a container nothing of the checkout is installed
        *([_SLURM_RANK] if slurm else []),
        f"exec {shlex.join(command)}",
    ]
    return nemo_run().Script(inline="\n".join(lines))


def slurm_executor(
    nodes: int, ranks: int, *, gpus: bool = True, notice_s: int = NOTICE_S, job_dir: Path = JOBS, **settings: Any
) -> Any:
    """Whole nodes with a task for each rank, told some time before theirs is up.

    Args:
        nodes: how many.
        ranks: of each node.
        gpus: each rank has one.
        notice_s: of the signal before their time is up, seconds.
        job_dir: where NeMo-Run keeps scripts and logs.
        settings: of ``nemo_run.SlurmExecutor``: account, partition, time, container_image, …; mounts come on top of the
            checkout's.

    Raises:
        MissingDependency: NeMo-Run is not installed.
    """
    run = nemo_run()
    mounts = [f"{ROOT}:{ROOT}", *settings.pop("container_mounts", [])]
    return run.SlurmExecutor(
        nodes=nodes,
        ntasks_per_node=ranks,
        gpus_per_node=ranks if gpus else None,
        exclusive=True,
        mem="0",
        signal=f"TERM@{notice_s}",
        container_mounts=mounts,
        tunnel=run.LocalTunnel(job_dir=str(job_dir)),
        packager=run.Packager(),
        **settings,
    )
