#!/usr/bin/env python
"""Launch a recipe through NeMo-Run, on this machine or on a Slurm cluster; the same definition that ``torchrun`` and
``sbatch`` launch.

    python tools/nemo_run_launch.py --recipe qwen3_4b_4xh100_bf16 model.path=/models/Qwen3-4B
    python tools/nemo_run_launch.py --recipe llama3p1_70b_64xh100_bf16 --executor slurm --account A --partition \\
        P model.path=...
    # one process here
    python tools/nemo_run_launch.py --config conf/pact_bfcl-smollm2_135m-cpu.yaml trainer.steps=2
    # NeMo-Run's own dry run: what it would do
    ... --print
    # the recipe's own dry run, started by NeMo-Run
    ... --dry-run

NeMo-Run is optional: ``pip install -r requirements-nemo-run.txt``. The trainer's
environment is ``--python``'s, which need not be this one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from pact_nemo import checkout

checkout.enter(__file__)

from pact_nemo.errors import PactError
from pact_nemo.nemo_run_task import JOBS, PYTHON, RECIPE_SCRIPT, command_task, nemo_run, slurm_executor
from pact_nemo.runtime.terminal import command

REPOSITORY = checkout.ROOT


def layout(options: argparse.Namespace) -> tuple[int, int]:
    """(nodes, ranks a node): the recipe's; a settings file means one process."""
    if options.recipe is None:
        return 1, 1
    from pact_nemo.config.recipes import recipe

    chosen = recipe(options.recipe)
    return chosen.nodes, chosen.gpus_per_node


def task(options: argparse.Namespace) -> Any:
    """The recipe script with its words, as the command of one Slurm task, or of this machine."""
    source = ["--recipe", options.recipe] if options.recipe is not None else ["--config", options.config]
    _, ranks = layout(options)
    slurm, dry = options.executor == "slurm", ["--dry-run"] if options.dry_run else []
    command = [options.python]
    if not slurm and not dry and ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [str(REPOSITORY / options.script), *source, *dry, *options.words]
    return command_task(command, slurm=slurm and not dry)


def executor(options: argparse.Namespace) -> Any:
    """Where it runs. A recipe's own dry run is one process."""
    nodes, ranks = (1, 1) if options.dry_run else layout(options)
    if options.executor == "local":
        if nodes > 1:
            raise PactError(f"recipe {options.recipe} needs {nodes} nodes: --executor slurm")
        return nemo_run().LocalExecutor()
    return slurm_executor(
        nodes,
        ranks,
        gpus=options.recipe is not None and not options.dry_run,
        job_dir=options.job_dir,
        account=options.account,
        partition=options.partition,
        time=options.time,
        container_image=options.container,
        container_mounts=options.mount,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--recipe", metavar="NAME", help="a name of pact_nemo/config/recipes.py")
    source.add_argument("--config", metavar="YAML", help="a settings file, run as one process")
    parser.add_argument("--script", default=RECIPE_SCRIPT, help="which benchmark")
    parser.add_argument(
        "--python",
        default=PYTHON,
        help="interpreter of the trainer's environment",
    )
    parser.add_argument("--executor", choices=["local", "slurm"], default="local")
    parser.add_argument("--account", default="default")
    parser.add_argument("--partition")
    parser.add_argument("--time", default="24:00:00")
    parser.add_argument("--container", metavar="IMAGE")
    parser.add_argument("--mount", action="append", default=[], metavar="FROM:TO")
    parser.add_argument("--job-dir", type=Path, default=JOBS)
    parser.add_argument("--print", action="store_true", help="NeMo-Run's dry run")
    parser.add_argument(
        "--dry-run", action="store_true", help="the recipe's own: it checks everything and trains nothing"
    )
    parser.add_argument("words", nargs="*", metavar="key=value", help="any setting, as for the recipes")
    options = parser.parse_intermixed_args()
    try:
        run = nemo_run()
        with run.Experiment("pact") as experiment:
            experiment.add(task(options), executor=executor(options), name="pact")
            if options.print:
                experiment.dryrun()
            else:
                experiment.run(
                    sequential=True, detach=options.executor == "slurm", tail_logs=options.executor == "local"
                )
    except PactError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    command(main)
