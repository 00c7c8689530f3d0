#!/usr/bin/env python
"""PACT on BFCL multi-turn: warm-up (optional), Algorithm 1, held-out evaluation before and after, HF export, report.

    python recipes/pact_bfcl.py                              # the embedded small model: runs anywhere
    python recipes/pact_bfcl.py trainer.steps=50 objective.anchor_prob=0.2 policy.micro_batch_tokens=2048
    python recipes/pact_bfcl.py --recipe qwen3_4b_4xh100_bf16 model.path=/models/Qwen3-4B    # its 4 ranks, here
    python recipes/pact_bfcl.py --dry-run                    # checks model, tasks and traces, prints config and plan
    python recipes/pact_bfcl.py --resume runs/latest
    python recipes/pact_bfcl.py policy.pipeline_parallel=2   # two ranks; under torchrun or srun theirs

Every setting is in docs/reference/settings.md.
"""

from __future__ import annotations

from pact_nemo import checkout

checkout.enter(__file__)

from pact_nemo.cli import main
from pact_nemo.config.schema import Config

PRESET = "conf/pact_bfcl-smollm2_135m-cpu.yaml"  # runs anywhere, on a GPU too
FULL = "conf/pact_bfcl.yaml"  # the paper's settings; --recipe lays model and layout over them


def run(config: Config, resume: str | None) -> None:
    """The whole job, in the order of the paper's Algorithm 1."""
    from pact_nemo.training.close_run import close_run
    from pact_nemo.training.evaluation import evaluate
    from pact_nemo.training.loop import train
    from pact_nemo.training.open_run import open_run
    from pact_nemo.training.warmup import warm_up

    with open_run(config, resume) as run:
        warm_up(run, evaluate)  # named stage, the same for every method; steps=0 leaves it out
        evaluate(run, "before")
        train(run)  # for each step: rollouts | x -> advantages -> gate -> update under x and [x; h*] -> refit
        evaluate(run, "after")
        close_run(run)  # HF export, summary.json, report.html


if __name__ == "__main__":
    main(run, PRESET, FULL, description=__doc__)
