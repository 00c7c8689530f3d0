#!/usr/bin/env python
"""PACT in any environment: one of this repository by its name, or one of your own by its module or file.

    python recipes/pact.py environment=shop.py:Shop                    # the embedded small model: runs anywhere
    python recipes/pact.py environment=my_package.shop:Shop environment_config.currency=EUR
    python recipes/pact.py environment=ftrl tasks.path=/data/ftrl_train.parquet --dry-run
    python recipes/pact.py --recipe qwen3_4b_4xh100_bf16 model.path=/models/Qwen3-4B environment=shop.py:Shop

docs/extend/environment.md has an environment of sixty lines.
"""

from __future__ import annotations

from pact_nemo import checkout

checkout.enter(__file__)

from pact_nemo.cli import main
from recipes.pact_bfcl import run

PRESET = "conf/pact-smollm2_135m-cpu.yaml"
FULL = "conf/pact.yaml"  # the paper's settings; --recipe lays model and layout over them

if __name__ == "__main__":
    main(run, PRESET, FULL, description=__doc__)
