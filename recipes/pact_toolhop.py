#!/usr/bin/env python
"""PACT on ToolHop: the same algorithm as ``pact_bfcl.py``, with tools that run in the sandbox and traces from recorded sub-answers or a file.

    python recipes/pact_toolhop.py tasks.path=/data/ToolHop.json                        # the preset for this machine: CPU or CUDA
    python recipes/pact_toolhop.py tasks.path=/data/ToolHop.json traces.path=traces.jsonl trainer.steps=50
    python recipes/pact_toolhop.py tasks.path=/data/ToolHop.json --dry-run
    python recipes/pact_toolhop.py --resume runs/latest
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pact_nemo.training.cli import main  # noqa: E402
from recipes.pact_bfcl import run  # noqa: E402

PRESET = "conf/pact_toolhop-smollm2_135m-cpu.yaml"

if __name__ == "__main__":
    main(run, PRESET, description=__doc__)
