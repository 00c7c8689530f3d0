"""A comparison as one SVG picture for a README: the score of every run by method, and the learning curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pact_nemo.report.charts import HEIGHT, LEFT, RIGHT, WIDTH
from pact_nemo.report.comparison import compare
from pact_nemo.report.data import Run
from pact_nemo.report.templates import templates

TONES = (
    "#2467a6",
    "#c2571a",
    "#1f8077",
    "#7a4fb5",
    "#93740a",
    "#7d8792",
    "#b0305c",
    "#4f7d2a",
    "#8a5a44",
)  # as in style.css


def comparison_svg(runs: Sequence[Run]) -> str:
    """The picture as text. A line of the curves has the colour of its method's dots."""
    found = compare(list(runs))
    environment = templates(Path(__file__).parent)
    curve = found.curves[0] if found.curves else None
    dots = found.chart.height if found.chart else 0
    return environment.get_template("comparison.svg").render(
        dots=found.chart,
        curve=curve,
        tones=TONES,
        width=WIDTH * (1 + (curve is not None)) + 40,
        height=max(dots, HEIGHT if curve is not None else 0) + 60,
        box={"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT},
    )
