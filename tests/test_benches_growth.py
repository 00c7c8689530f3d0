"""The ``growth`` bench: exponents of known curves, what is planned for a point, the picture of a saved result, and a
point measured for real.
"""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from pact_nemo.planning.hardware import Hardware
from tools.benches.growth import AXES, exponents, summarise
from tools.benches.growth_picture import growth_svg, short, ticks
from tools.benches.growth_point import Point, predict

ROOT = Path(__file__).parents[1]
CPU = Hardware("test", 16e9, 1e11, 0.0, 1e10, 1e10, 1e10, 1e9, cuda=False, reached_bf16=0.5)


def test_exponents_of_powers_are_found_zeros_left_out() -> None:
    found = exponents([0, 1, 2, 4, 8], [7.0, 3.0, 12.0, 48.0, 192.0])
    assert found["all"] == pytest.approx(2.0) and found["end"] == pytest.approx(2.0)
    bent = exponents([1, 2, 4], [1.0, 1.0, 4.0])  # flat, then quadratic
    assert bent["all"] == pytest.approx(1.0) and bent["end"] == pytest.approx(2.0)
    assert exponents([0, 5], [1.0, 1.0]) == {"all": None, "end": None}


def test_the_plan_grows_with_every_length_and_a_trace_costs_pact_alone() -> None:
    for axis in (AXES[name] for name in ("K", "trace", "prompt", "vocabulary")):
        plans = [predict(Point(**{axis.field: value}), "pact", CPU) for value in axis.values]  # type: ignore[arg-type]
        for before, after in zip(plans, plans[1:], strict=False):
            assert after["seconds"] > before["seconds"]
            assert after["bytes"] >= before["bytes"]
    assert predict(Point(trace=0), "grpo", CPU) == predict(Point(trace=4096), "grpo", CPU)
    one, four = (predict(Point(prompts=8, processes=count), "pact", CPU) for count in (1, 4))
    assert four["seconds"] < one["seconds"] / 3 and four["bytes"] < one["bytes"]


def saved() -> dict[str, Any]:
    """A result as a sweep leaves it, of measurements that follow a law: PACT twice GRPO, time linear in K, memory
    constant.
    """

    def entry(name: str, value: int) -> dict[str, Any]:
        point = Point(**{AXES[name].field: value})  # type: ignore[arg-type]
        size = float(max(value, 1))
        methods = {
            method: {"seconds": times * size, "bytes": 2e8 * times, "tokens": 1.0}
            for method, times in (("grpo", 1.0), ("pact", 2.0))
        }
        return {"value": value, "point": vars(point), **methods}

    axes = {
        name: {"label": AXES[name].label, "points": [entry(name, value) for value in AXES[name].values[:3]]}
        for name in ("K", "trace")
    }
    return {"cores": 1, "hardware": {"1": vars(CPU)}, "axes": axes}


def test_a_saved_result_is_summarised_and_drawn_for_light_and_dark() -> None:
    data = summarise(json.loads(json.dumps(saved())))
    assert data["axes"]["K"]["exponents"]["pact seconds"]["all"] == pytest.approx(1.0)
    assert data["axes"]["K"]["exponents"]["pact bytes"]["end"] == pytest.approx(0.0, abs=1e-9)
    assert data["axes"]["K"]["points"][0]["ratio"] == pytest.approx(2.0)
    picture = growth_svg(data)
    tree = ET.fromstring(picture)
    space = "{http://www.w3.org/2000/svg}"
    assert len(tree.findall(f".//{space}polyline")) == 2 * 2 * 2  # axes x rows x methods
    assert len(tree.findall(f".//{space}circle")) == 2 * 2 * 2 * 3 + 2  # points of each, and the legend
    assert "prefers-color-scheme: dark" in picture and "2.00 → 2.00 x GRPO · slope 1.00" in picture
    again = growth_svg(summarise(json.loads(json.dumps(data))))  # what --from does to a file of --out
    assert again == picture


def test_ticks_are_few_and_lie_within() -> None:
    assert ticks(0.8, 30) == [1, 2, 5, 10, 20]
    assert ticks(3, 40000) == [10, 100, 1000, 10000]
    assert [short(value) for value in (0, 2, 512, 8192, 151936)] == ["0", "2", "512", "8k", "152k"]


@pytest.mark.slow
def test_a_tiny_point_is_measured_through_the_command_line(tmp_path: Path) -> None:
    sizes = ["vocabulary=256", "hidden=64", "layers=1", "prompt=32", "response=16", "trace=16"]
    command = [
        sys.executable,
        str(ROOT / "tools" / "bench.py"),
        "growth",
        "--json",
        "--axes",
        "K",
        "--points",
        "1",
        "--rounds",
        "1",
    ]
    command += ["--base", *sizes, "--out", str(tmp_path / "growth.json"), "--picture", str(tmp_path / "growth.svg")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    [row] = result["rows"]
    assert (
        row["axis"] == "K" and row["value"] == 2 and row["PACT s"] > 0 and row["planned s"] > 0 and row["PACT MiB"] > 0
    )
    kept = json.loads((tmp_path / "growth.json").read_text())["axes"]["K"]["points"][0]
    assert kept["pact"]["tokens"] > kept["grpo"]["tokens"] and kept["point"]["hidden"] == 64
    ET.parse(tmp_path / "growth.svg")
