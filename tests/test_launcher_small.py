"""A plain ``python recipes/...`` on a GPU that no recipe at scale fits."""

from __future__ import annotations

from pathlib import Path

import pytest

from pact_nemo import launcher
from pact_nemo.config.load import load_config
from pact_nemo.config.recipes import recipe
from pact_nemo.errors import ConfigError
from pact_nemo.runtime.gpus import Gpu

CONF = Path(__file__).resolve().parents[1] / "conf"
CARD = Gpu("NVIDIA GeForce RTX 3060", 12_000_000_000, 11_500_000_000)


def test_the_small_preset_runs_where_the_weights_leave_an_engine_no_cache() -> None:
    assert launcher.fitting([CARD]) == []
    small = load_config(CONF / "pact_bfcl-smollm2_135m-cpu.yaml")
    assert launcher.ranks_here(small, [CARD], []) == 1
    assert "no recipe at scale fits here" in launcher.report(small, [CARD], 1)[1]


def test_a_recipe_whose_weights_leave_an_engine_no_cache_is_refused_by_name() -> None:
    name = "qwen3_4b_1xh100_lora"
    with pytest.raises(ConfigError, match="leaves an engine of a NVIDIA GeForce RTX 3060") as caught:
        launcher.ranks_here(load_config([CONF / "pact_bfcl.yaml", recipe(name)]), [CARD], [])
    said = str(caught.value)
    assert said.startswith(f"recipe {name}: ") and said.endswith("leave no cache; no recipe fits here")
