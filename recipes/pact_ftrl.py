#!/usr/bin/env python
"""PACT on FTRL: the same algorithm as ``pact_bfcl.py``, with tools that run in the sandbox and traces from recorded
sub-answers or a file.

    python recipes/pact_ftrl.py tasks.path=/data/ftrl_train.parquet          # the embedded small model: runs anywhere
    python recipes/pact_ftrl.py tasks.path=/data/ftrl_train.parquet traces.path=traces.jsonl trainer.steps=50
    python recipes/pact_ftrl.py tasks.path=/data/ftrl_train.parquet --dry-run
    python recipes/pact_ftrl.py --recipe qwen3_4b_4xh100_bf16 model.path=/models/Qwen3-4B tasks.path=...
    python recipes/pact_ftrl.py --resume runs/latest

Every setting is in docs/reference/settings.md.
"""

from __future__ import annotations

from pact_nemo import checkout

checkout.enter(__file__)

from pact_nemo.cli import main
from recipes.pact_bfcl import run

PRESET = "conf/pact_ftrl-smollm2_135m-cpu.yaml"
FULL = "conf/pact_ftrl.yaml"  # the paper's settings; --recipe lays model and layout over them

if __name__ == "__main__":
    main(run, PRESET, FULL, description=__doc__)
