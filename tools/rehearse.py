#!/usr/bin/env python
"""Rehearse a rank of a recipe without a GPU: the code that runs on GPUs, over tensors without numbers.

    python tools/rehearse.py --recipe llama3p1_70b_64xh100_bf16             # a rank of each pipeline stage
    python tools/rehearse.py --recipe llama3p1_70b_64xh100_bf16 --stage 3 --layers 8 policy.recompute=none
    python tools/rehearse.py --recipe llama3p1_70b_64xh100_fp8 --transformer-engine

A wrong device, shape or name raises as it would on a GPU. Of each part of a step it says the peak of the GPU's memory
beside the plan's, and which lines read numbers back to the host. What it can't show: docs/cluster/rehearsal.md. Exit
codes: 0, 1 when a rank failed, 2 when the recipe or a setting can't be had.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from pact_nemo import checkout

checkout.enter(__file__)

from pact_nemo.config.recipes import RECIPES
from pact_nemo.errors import ConfigError, MissingDependency
from pact_nemo.rehearsal.case import Case, check
from pact_nemo.rehearsal.run import describe, rehearse
from pact_nemo.runtime.terminal import command


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, metavar="NAME", help=f"one of {', '.join(RECIPES)}")
    parser.add_argument("--stage", type=int, help="pipeline stage; default: one rank of each")
    parser.add_argument("--layers", type=int, help="of the model, for a quick look; default: the recipe's")
    parser.add_argument("--tokens", type=int, help="of a row; default: policy.micro_batch_tokens")
    parser.add_argument(
        "--transformer-engine",
        action="store_true",
        help="Transformer Engine's layers, by a stand-in that has no kernels",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object last")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any setting of pact_nemo/config/schema.py")
    return parser.parse_intermixed_args()


def main() -> int:
    asked = parse()
    try:
        case = Case(
            asked.recipe, asked.stage or 0, asked.layers, asked.tokens, asked.transformer_engine, tuple(asked.overrides)
        )
        stages = range(check(case).pipeline)
        if asked.stage is not None:
            stages = range(asked.stage, asked.stage + 1)
        outcomes = rehearse([dataclasses.replace(case, stage=stage) for stage in stages])
    except (ConfigError, MissingDependency) as error:
        print(f"configuration error: {error}", file=sys.stderr)
        return 2
    for outcome in outcomes:
        print("\n".join(describe(outcome)))
    if asked.json:
        print(json.dumps({"ranks": [dataclasses.asdict(outcome) for outcome in outcomes]}))
    return 1 if any(outcome.fault for outcome in outcomes) else 0


if __name__ == "__main__":
    command(main)
