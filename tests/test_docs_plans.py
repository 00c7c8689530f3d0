"""The plans that the documentation prints are those that the planner makes."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest

from pact_nemo.config.load import load_config
from pact_nemo.config.recipes import RECIPES, recipe
from pact_nemo.planning.from_config import run_plan
from pact_nemo.planning.host import COPY
from pact_nemo.planning.memory import GIB
from pact_nemo.planning.plan import Plan
from pact_nemo.planning.sharing import kept_asleep

REPO = Path(__file__).resolve().parents[1]
FULL = REPO / "conf" / "pact_bfcl.yaml"


def tables(page: str) -> list[list[list[str]]]:
    """Cells of each table of a page, its head first."""
    found: list[list[list[str]]] = []
    last = ""
    for line in (REPO / "docs" / "cluster" / page).read_text().splitlines():
        if line.startswith("|"):
            if not last.startswith("|"):
                found.append([])
            found[-1].append([cell.strip() for cell in line.strip().strip("|").split("|")])
        last = line
    return found


def rows(page: str, *head: str) -> dict[str, list[str]]:
    """First cell -> the others, of the one table of a page with this head."""
    (table,) = [table for table in tables(page) if table[0][: len(head)] == list(head)]
    return {row[0]: row[1:] for row in table[2:]}


def number(cell: str) -> float:
    found = re.match(r"[\d,]+(\.\d+)?", cell)
    assert found, cell
    return float(found[0].replace(",", ""))


@functools.cache
def plan(name: str, *words: str) -> Plan:
    return run_plan(load_config([FULL, recipe(name)], list(words)))


@pytest.mark.parametrize("name", RECIPES)
def test_seconds_of_every_recipe(name: str) -> None:
    made = plan(name)
    phases = made.phases
    _, *printed = rows("scaling.md", "`tools/plan.py --recipe ...`")[f"`{name}`"]
    scoring = sum(seconds for phase, seconds in phases.items() if phase.endswith("scoring"))
    expected = [phases["rollout"], scoring, phases["update"], phases["refit"], made.step]
    assert [number(cell) for cell in printed] == pytest.approx(expected, abs=0.51)
    alone, everywhere, best = rows("scaling.md", "recipe", "one engine, in turn")[f"`{name}`"]
    assert number(alone) == pytest.approx(plan(name, "rollout.server.engines=1").step, abs=0.51)
    assert number(everywhere) == pytest.approx(made.step, abs=0.51)
    assert best == "none is faster" or number(best) < made.step


@pytest.mark.parametrize("name", RECIPES)
def test_memory_of_every_recipe(name: str) -> None:
    made = plan(name)
    table = rows("recipes.md", "recipe", "layout")
    (printed,) = [cells for key, cells in table.items() if key.startswith(f"`{name}`")]
    layout, trainer, engine, copy = printed
    assert number(trainer) == pytest.approx(made.memory.trainer / GIB, abs=0.051)
    share = made.server.share * made.hardware.memory / GIB
    assert number(engine) == pytest.approx(share, abs=0.051) and engine.endswith(f" on {made.server.gpus}")
    base = kept_asleep(made.shape, made.server) / GIB
    host = [made.memory.host[COPY] / GIB, *([base] if base else [])]
    assert [float(found) for found in re.findall(r"\d+\.\d", copy)] == pytest.approx(host, abs=0.051)
    cut = {"TP": made.layout.tensor, "PP": made.layout.pipeline, "CP": made.layout.context, "DP": made.layout.data}
    cut |= {"VP": made.layout.virtual, "EP": made.layout.expert}
    said = {kind: int(size) for kind, size in re.findall(r"([TPCDVE]P) (\d+)", layout)}
    assert said == {kind: size for kind, size in cut.items() if size > 1}


def test_what_engines_on_all_gpus_bring() -> None:
    updates = {"qwen3_32b_16xh100_bf16", "qwen3_32b_8xh100_lora", "llama3p1_70b_8xh100_lora_bf16"}
    for name in RECIPES:  # as the pages say
        assert 1.3 < plan(name).phases["taking turns"] < 2.5
        assert 0.78 < plan(name).server.share < 0.915
        assert plan(name, "rollout.server.engines=1").bottleneck == ("update" if name in updates else "rollout")
    assert plan("llama3p1_70b_64xh100_bf16").step < 800
    small = "qwen3_4b_4xh100_bf16"
    assert plan(small).step < 0.5 * plan(small, "rollout.server.engines=1").step
