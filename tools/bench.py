#!/usr/bin/env python
"""Measured figures of single parts. Each subcommand runs its rounds interleaved with what it is compared to and ends
with medians and a ratio.

    python tools/bench.py step --run runs/latest --naive     # a PACT step against a GRPO step on the same rollouts
    python tools/bench.py trl --run runs/latest              # our steps against TRL's GRPO on the same rollouts
    python tools/bench.py logprobs                           # vocabulary head: memory at 32k tokens, time
    python tools/bench.py packing --run runs/latest          # real tokens in packed rows; ragged against equal lengths
    python tools/bench.py offload                            # a trainer's memory to the host and back
    python tools/bench.py rollouts                           # how busy the rollout server is
    python tools/bench.py phases --run runs/latest           # a step's wall time by phase
    python tools/bench.py peak --run runs/latest             # share of the machine's matrix peak, in fp32 and bf16
    # time and memory against K, lengths, vocabulary, processes
    python tools/bench.py growth --out docs/growth.json --picture docs/growth.svg
    python tools/bench.py refit                              # embedded model, one process, real vLLM server
    torchrun --standalone --nproc-per-node 2 tools/bench.py refit --pipeline-parallel 2
    python tools/bench.py refit --synthetic 2.0 --no-server --json   # a random Llama of about 2 GB in bfloat16

Every subcommand has --help.
"""

from __future__ import annotations

import argparse
import sys

from pact_nemo import checkout

checkout.enter(__file__)

from pact_nemo.errors import PactError
from pact_nemo.runtime.terminal import command
from tools.benches import growth, logprobs, offload, packing, peak, phases, refit, rollouts, step, trl_peer

BENCHES = {
    "step": step,
    "trl": trl_peer,
    "logprobs": logprobs,
    "packing": packing,
    "offload": offload,
    "rollouts": rollouts,
    "refit": refit,
    "phases": phases,
    "peak": peak,
    "growth": growth,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, bench in BENCHES.items():
        command = commands.add_parser(
            name, description=bench.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.add_argument("--json", action="store_true", help="print one object instead of a table")
        bench.add_arguments(command)
    options = parser.parse_args()
    try:
        return BENCHES[options.command].run(options)
    except PactError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    command(main)
