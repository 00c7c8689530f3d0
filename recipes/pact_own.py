#!/usr/bin/env python
"""PACT on your own agent: your tools, your tasks, your conversations; the same algorithm as ``pact_bfcl.py``.

    python recipes/pact_own.py agent.tools=shop.py:Shop tasks.path=tasks.jsonl traces.path=traces.jsonl
    python recipes/pact_own.py agent.tools=shop.py:Shop traces.path=talks.jsonl  # their requests are the tasks
    python recipes/pact_own.py "agent.mcp.command=[mcp-server-time,--local-timezone,UTC]" traces.path=talks.jsonl
    python recipes/pact_own.py --recipe qwen3_4b_4xh100_bf16 model.path=/models/Qwen3-4B agent.tools=shop.py:Shop ...
    python recipes/pact_own.py --resume runs/latest

Without model.path the embedded small model learns, on any machine. docs/start/your-own-agent.md is the page to read.
"""

from __future__ import annotations

from pact_nemo import checkout

checkout.enter(__file__)

from pact_nemo.cli import main
from recipes.pact_bfcl import run

PRESET = "conf/pact_own-smollm2_135m-cpu.yaml"
FULL = "conf/pact_own.yaml"  # the paper's settings; --recipe lays model and layout over them

if __name__ == "__main__":
    main(run, PRESET, FULL, description=__doc__)
