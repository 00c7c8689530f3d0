"""The ``growth`` bench as one SVG: a column per axis, time above memory, dots measured and lines planned. Light and
dark.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pact_nemo.report.templates import templates

PANEL, TALL = 264, 190  #: of one panel, in user units, margins included
LEFT, RIGHT, TOP, BOTTOM = 40, 14, 20, 24
HEAD = 84  #: above the first row
MIB = 1 << 20


@dataclass(frozen=True)
class Scale:
    """Logarithms onto pixels. A value of zero or less lies at ``zero``, where there is one."""

    low: float
    high: float
    start: float
    end: float
    zero: float | None = None

    def __call__(self, value: float) -> float:
        if value <= 0:
            return self.start if self.zero is None else self.zero
        span = math.log(self.high / self.low) or 1.0
        return self.start + (self.end - self.start) * math.log(value / self.low) / span


def short(value: int) -> str:
    """8192 -> 8k, 151936 -> 152k, 512 -> 512."""
    if value < 1000:
        return str(value)
    return f"{value / (1000 if value % 1024 else 1024):.3g}k"


def ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten within the range, or powers of ten alone where those are more than six."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    inside = [factor * 10.0**power for power in powers for factor in (1, 2, 5) if low <= factor * 10.0**power <= high]
    tens = [value for value in inside if f"{value:e}"[0] == "1"]
    return tens if len(inside) > 6 and len(tens) > 1 else inside


def growth_svg(data: dict[str, Any]) -> str:
    """The picture of what ``growth.summarise`` returned, as text."""
    columns = []
    for axis in data["axes"].values():
        values = [entry["value"] for entry in axis["points"]]
        positive = [value for value in values if value > 0] or [1]
        left = LEFT + (26 if min(values) <= 0 else 0)
        x = Scale(
            min(positive), max(positive), left + 6, PANEL - RIGHT - 6, zero=LEFT + 6 if min(values) <= 0 else None
        )
        columns.append(
            {
                "title": axis["label"],
                "ticks": [(x(value), short(value)) for value in values],
                "rows": [
                    _panel(axis, x, "seconds", "time, s", 1.0, "ratio"),
                    _panel(axis, x, "bytes", "memory, MiB", MIB, "memory_ratio"),
                ],
            }
        )
    environment = templates(Path(__file__).parent)
    return environment.get_template("growth.svg").render(
        columns=columns,
        panel=PANEL,
        tall=TALL,
        left=LEFT,
        right=RIGHT,
        top=TOP,
        bottom=BOTTOM,
        head=HEAD,
        width=max(600, 24 + PANEL * len(columns)),
        height=HEAD + 2 * TALL + 8,
    )


def _range(axis: dict[str, Any], name: str) -> str:
    first, last = axis["points"][0][name], axis["points"][-1][name]
    return f"{first:.2f} → {last:.2f}" if len(axis["points"]) > 1 else f"{first:.2f}"


def _slope(axis: dict[str, Any], name: str) -> str:
    end = axis["exponents"][name]["end"]
    return "–" if end is None else f"{end:.2f}"


def _panel(axis: dict[str, Any], x: Scale, name: str, title: str, unit: float, ratio: str) -> dict[str, Any]:
    """One panel's marks: of both methods dots (measured) and a line (planned), in pixels."""
    points = axis["points"]
    keys = (name, f"planned_{name}")
    values = [
        entry[method][key] / unit
        for entry in points
        for method in ("grpo", "pact")
        for key in keys
        if entry[method][key] > 0
    ] or [1.0]
    low, high = min(values) / 1.25, max(values) * 1.25
    y = Scale(low, high, TALL - BOTTOM, TOP)
    methods = []
    for method in ("grpo", "pact"):
        dots = [
            (x(entry["value"]), y(entry[method][name] / unit), f"{entry[method][name] / unit:.3g}") for entry in points
        ]
        line = [(x(entry["value"]), y(entry[method][keys[1]] / unit)) for entry in points]
        methods.append({"method": method, "dots": dots, "line": " ".join(f"{a:.1f},{b:.1f}" for a, b in line)})
    return {
        "title": f"{title} · {_range(axis, ratio)} x GRPO · slope {_slope(axis, f'pact {name}')}",
        "ticks": [(y(value), f"{value:g}") for value in ticks(low, high)],
        "methods": methods,
    }
