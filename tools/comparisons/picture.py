"""Score after training against the score of the policy that training started from: a line an arm, a band over its
seeds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from pact_nemo.report.charts import ticks_between
from pact_nemo.report.picture import TONES
from pact_nemo.report.stats import mean
from pact_nemo.report.templates import templates
from tools.comparisons.results import Result, groups

WIDTH, HEIGHT = 560, 340
LEFT, RIGHT, TOP, BOTTOM = 44, 130, 14, 40


def starts_svg(results: Sequence[Result]) -> str:
    """The picture as text. Starts whose own score is not among the results, the published model among them, are left
    out, and arms from one start where others have several: trials of a setting.
    """
    found = groups(results)
    begins = {arm: runs[0].score() for (start, arm), runs in found.items() if start == "published"}
    lines: dict[str, list[tuple[float, list[float]]]] = defaultdict(list)
    for (start, arm), runs in found.items():
        begin, ends = begins.get(start), [score for run in runs if (score := run.score()) is not None]
        if begin is not None and ends:
            lines[arm].append((begin, ends))
    most = max(map(len, lines.values()), default=0)
    lines = {arm: points for arm, points in lines.items() if len(points) > 1 or most == 1}
    values = [value for points in lines.values() for begin, ends in points for value in (begin, *ends)]
    low = min(values, default=0.0)
    marks = ticks_between(low, max([*values, low + 0.1]))
    places = 1 if marks[1] - marks[0] > 0.099 else 2

    def share(value: float) -> float:
        return (value - marks[0]) / (marks[-1] - marks[0])

    def x(value: float) -> float:
        return LEFT + share(value) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - share(value) * (HEIGHT - TOP - BOTTOM)

    arms = []
    for index, (arm, points) in enumerate(
        sorted(lines.items(), key=lambda item: -max(mean(ends) for _, ends in item[1]))
    ):
        points = sorted(points)
        band = [(x(begin), y(max(ends))) for begin, ends in points] + [
            (x(begin), y(min(ends))) for begin, ends in reversed(points)
        ]
        arms.append(
            {
                "name": arm,
                "tone": TONES[index % len(TONES)],
                "line": " ".join(f"{x(begin):.1f},{y(mean(ends)):.1f}" for begin, ends in points),
                "band": " ".join(f"{a:.1f},{b:.1f}" for a, b in band),
                "dots": [
                    (f"{x(begin):.1f}", f"{y(value):.1f}", f"{arm}: {begin:.3f} to {value:.3f}")
                    for begin, ends in points
                    for value in ends
                ],
            }
        )
    environment = templates(Path(__file__).parent)
    return environment.get_template("starts.svg").render(
        arms=arms,
        ticks=[(mark, f"{mark:.{places}f}", x(mark), y(mark)) for mark in marks],
        width=WIDTH,
        height=HEIGHT,
        left=LEFT,
        right=WIDTH - RIGHT,
        top=TOP,
        bottom=HEIGHT - BOTTOM,
    )
