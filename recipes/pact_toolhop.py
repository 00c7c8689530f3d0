#!/usr/bin/env python
"""PACT on ToolHop: the same algorithm as ``pact_bfcl.py``, with tools that run in the sandbox and traces from recorded
sub-answers or a file.

    python recipes/pact_toolhop.py tasks.path=/data/ToolHop.json          # the embedded small model: runs anywhere
    python recipes/pact_toolhop.py tasks.path=/data/ToolHop.json traces.path=traces.jsonl trainer.steps=50
    python recipes/pact_toolhop.py tasks.path=/data/ToolHop.json --dry-run
    python recipes/pact_toolhop.py --recipe qwen3_4b_4xh100_bf16 model.path=/models/Qwen3-4B tasks.path=...
    python recipes/pact_toolhop.py --resume runs/latest

Every setting is in docs/reference/settings.md.
"""

from __future__ import annotations

from pact_nemo import checkout

checkout.enter(__file__)

from pact_nemo.cli import main
from recipes.pact_bfcl import run

PRESET = "conf/pact_toolhop-smollm2_135m-cpu.yaml"
FULL = "conf/pact_toolhop.yaml"  # the paper's settings; --recipe lays model and layout over them

if __name__ == "__main__":
    main(run, PRESET, FULL, description=__doc__)
