#!/usr/bin/env python
"""PACT at scale: any recipe of ``pact_nemo/config/recipes.py`` on BFCL; without ``--recipe``, Llama-3.1-70B on 8 nodes
with 8 GPUs.

    sbatch slurm/pact_70b.sh model.path=/models/Llama-3.1-70B-Instruct
    python recipes/pact_70b.py --dry-run                     # settings, layout and memory per GPU; starts nothing
    python recipes/pact_70b.py --recipe qwen3_32b_16xh100_bf16 --dry-run
    python recipes/pact_70b.py --recipe qwen3_14b_8xh100_bf16 model.path=/models/Qwen3-14B    # its 8 ranks, here

Every setting is in docs/reference/settings.md.
"""

from __future__ import annotations

from pact_nemo import checkout

checkout.enter(__file__)

from pact_nemo.cli import main
from recipes.pact_bfcl import FULL, run

if __name__ == "__main__":
    main(run, None, FULL, description=__doc__, default_recipe="llama3p1_70b_64xh100_bf16")
