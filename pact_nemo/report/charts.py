"""Geometry of the report's charts. Everything is computed here; the template only writes it down as SVG.

A chart is drawn in user units of ``WIDTH`` x ``HEIGHT``, close to the pixels it gets on a phone and in a desktop's
three columns, so that text keeps its size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 8, 26
DOTS_UP_TO = 40  #: points are marked while there are at most this many

Values = Sequence[float | None]
Kind = Literal["line", "stack"]


@dataclass(frozen=True)
class Series:
    """One line or one layer of a stack.

    Attributes:
        values: one per x; None is a gap.
        tone: index of a colour of the page.
        faint: drawn thin and light, e.g. raw values behind their running mean.
        steps: drawn as a staircase.
    """

    label: str
    values: Values
    tone: int
    faint: bool = False
    steps: bool = False


@dataclass(frozen=True)
class Tick:
    position: float
    text: str


@dataclass(frozen=True)
class Drawn:
    """A series as the template needs it: path data, or boxes (x, y, width, height) of a stack, and the readings for the
    hover line.
    """

    label: str
    tone: int
    faint: bool
    path: str
    dots: list[tuple[float, float]]
    boxes: list[tuple[float, float, float, float]]
    readings: list[str]
    latest: str


@dataclass
class Chart:
    """A finished chart.

    Attributes:
        note: what is measured and what it is divided by.
        summary: what a screen reader says.
        data: what the page's script needs: x labels, x positions, y positions and readings per series.
    """

    title: str
    note: str
    summary: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    series: list[Drawn]
    data: dict[str, Any] = field(default_factory=dict)
    zero: float | None = None


def reading(value: float | None, least: int = 0) -> str:
    """Three or four significant digits, but at least ``least`` decimals; no needless exponents; a dash for a gap."""
    if value is None:
        return "–"
    size = abs(value)
    if size != 0 and (size < 1e-3 or size >= 1e6):
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    digits = 0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 10 else 3 if size >= 0.1 or size == 0 else 4
    text = f"{value:.{max(digits, least)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


@dataclass(frozen=True)
class Axis:
    """How values are shown.

    Attributes:
        bounds: values that the y axis must include.
        percent: values are shares in [0, 1]; shown as percentages.
        levels: names of the whole values 0, 1, …, which then are the y ticks.
    """

    bounds: tuple[float | None, float | None] = (None, None)
    percent: bool = False
    levels: Sequence[str] | None = None

    def show(self, value: float | None, least: int) -> str:
        """A value as text, with at least ``least`` decimals."""
        if value is None:
            return "–"
        if self.percent:
            return f"{reading(value * 100, least)} %"
        if self.levels is not None and 0 <= round(value) < len(self.levels):
            return self.levels[round(value)]
        return reading(value, least)


PLAIN = Axis()


@dataclass(frozen=True)
class _Frame:
    """Where values are on the page.

    Attributes:
        low_x: at the left edge.
        span: user units of one step; 0 for a single step.
        marks: the y ticks, ascending.
    """

    low_x: float
    span: float
    marks: list[float]

    @classmethod
    def of(cls, steps: Sequence[int], marks: list[float], kind: Kind) -> _Frame:
        half = 0.5 if kind == "stack" else 0.0
        low_x, high_x = steps[0] - half, steps[-1] + half
        return cls(low_x, (WIDTH - LEFT - RIGHT) / (high_x - low_x) if high_x > low_x else 0.0, marks)

    def x(self, value: float) -> float:
        return LEFT + (value - self.low_x) * self.span if self.span else (LEFT + WIDTH - RIGHT) / 2

    def y(self, value: float) -> float:
        return TOP + (self.marks[-1] - value) / (self.marks[-1] - self.marks[0]) * (HEIGHT - TOP - BOTTOM)


def ticks_between(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that enclose ``low`` and ``high``."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def whole_ticks(low: int, high: int, count: int = 6) -> list[int]:
    """Step numbers to write under an axis: the first, then round ones."""
    if high - low < count:
        return list(range(low, high + 1))
    step = next(
        s for s in (1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500, 1000, 2000, 5000, 10**6) if (high - low) / s <= count
    )
    round_ones = [value for value in range(step, high + 1, step) if value - low >= step / 2]
    return [low, *round_ones]


def _limits(values: list[float], bounds: tuple[float | None, float | None]) -> list[float]:
    low, high = min(values), max(values)
    low = low if bounds[0] is None else min(low, bounds[0])
    high = high if bounds[1] is None else max(high, bounds[1])
    if high - low < 1e-12 * max(abs(high), abs(low), 1e-30):
        pad = abs(high) * 0.1 or 1.0
        low, high = (low, high + pad) if low == 0 else (low - pad, high + pad)
    return ticks_between(low, high)


def _line(xs: list[float], ys: list[float | None], steps: bool) -> str:
    """SVG path data; a gap lifts the pen."""
    words: list[str] = []
    previous: float | None = None
    for x, y in zip(xs, ys, strict=True):
        if y is None:
            previous = None
            continue
        if previous is None:
            words.append(f"M{x:.1f} {y:.1f}")
        elif steps:
            words.append(f"H{x:.1f}V{y:.1f}")
        else:
            words.append(f"L{x:.1f} {y:.1f}")
        previous = y
    return "".join(words)


def _alone(values: Values, index: int) -> bool:
    before = values[index - 1] if index > 0 else None
    after = values[index + 1] if index + 1 < len(values) else None
    return before is None and after is None


def make_chart(
    title: str,
    note: str,
    steps: Sequence[int],
    series: Sequence[Series],
    *,
    kind: Kind = "line",
    axis: Axis = PLAIN,
) -> Chart | None:
    """Lay a chart out; None when no series has a value (a run without that part).

    Args:
        title, note: what is written above it.
        steps: x, ascending.
        series: lines, or layers of a stack from the bottom up; one value per step.
        kind: lines, or boxes that stand on each other.
        axis: how values are shown.
    """
    shown = [s for s in series if any(value is not None for value in s.values)]
    if not shown:
        return None
    marks = _marks(shown, len(steps), kind, axis)
    # decimals that tell two neighbouring ticks apart: the axis of values between 0.9998 and 1.0002 must not read 1, 1,
    # 1
    decimals = max(-math.floor(math.log10(abs(marks[1] - marks[0]) * (100 if axis.percent else 1)) + 1e-9), 0)
    frame = _Frame.of(steps, marks, kind)
    xs = [frame.x(step) for step in steps]
    floor = [0.0] * len(steps)
    drawn: list[Drawn] = []
    heights: list[list[float | None]] = []
    for s in shown:
        path, dots, boxes = "", [], []
        ys: list[float | None] = [None] * len(steps)
        if kind == "stack":
            boxes = _boxes(s, xs, floor, frame)
        else:
            ys = [None if value is None else frame.y(value) for value in s.values]
            path = _line(xs, ys, s.steps)
            dots = _dots(s, xs, ys)
        readings = [axis.show(value, decimals + 1) for value in s.values]
        last = next(
            (text for text, value in zip(reversed(readings), reversed(s.values), strict=True) if value is not None), "–"
        )
        heights.append([None if y is None else round(y, 1) for y in ys])
        drawn.append(Drawn(s.label, s.tone, s.faint, path, dots, boxes, readings, last))
    return Chart(
        title=title,
        note=note,
        summary=_summary(steps, shown, drawn, axis, decimals + 1),
        x_ticks=[Tick(frame.x(value), str(value)) for value in whole_ticks(steps[0], steps[-1])],
        y_ticks=[Tick(frame.y(mark), axis.show(0.0 if abs(mark) < 1e-15 else mark, decimals)) for mark in marks],
        series=drawn,
        data={"x": [round(x, 1) for x in xs], "step": list(steps), "y": heights, "text": [d.readings for d in drawn]},
        zero=frame.y(0.0) if marks[0] < 0 < marks[-1] else None,
    )


def _marks(shown: list[Series], count: int, kind: Kind, axis: Axis) -> list[float]:
    """Where the y axis has ticks, ascending."""
    if kind == "stack":
        tops = [sum(s.values[i] or 0.0 for s in shown) for i in range(count)]
        return _limits([0.0, *tops], axis.bounds)
    if axis.levels is not None:
        return [float(level) for level in range(len(axis.levels))]
    return _limits([value for s in shown for value in s.values if value is not None], axis.bounds)


def _boxes(
    series: Series, xs: list[float], floor: list[float], frame: _Frame
) -> list[tuple[float, float, float, float]]:
    """One layer of a stack: boxes (x, y, width, height) on ``floor``, which is raised by them."""
    width = max((frame.span or 60.0) * 0.72, 0.6)
    boxes = []
    for index, value in enumerate(series.values):
        bottom = frame.y(floor[index])
        floor[index] += value or 0.0
        top = frame.y(floor[index])
        if value:
            boxes.append((round(xs[index] - width / 2, 2), round(top, 2), round(width, 2), round(bottom - top, 2)))
    return boxes


def _dots(series: Series, xs: list[float], ys: list[float | None]) -> list[tuple[float, float]]:
    """Marked points: all of them while they are few, else those without a neighbour."""
    few = len(xs) <= DOTS_UP_TO and not series.steps
    return [
        (round(x, 1), round(y, 1))
        for i, (x, y) in enumerate(zip(xs, ys, strict=True))
        if y is not None and (few or _alone(series.values, i))
    ]


def _summary(steps: Sequence[int], shown: list[Series], drawn: list[Drawn], axis: Axis, least: int) -> str:
    """What a screen reader says; readings have at least ``least`` decimals."""
    tellings = []
    for s, d in zip(shown, drawn, strict=True):
        known = [value for value in s.values if value is not None]
        low, high = axis.show(min(known), least), axis.show(max(known), least)
        tellings.append(f"{s.label}: first {axis.show(known[0], least)}, last {d.latest}, lowest {low}, highest {high}")
    steps_said = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
    return f"{steps_said}. {'; '.join(tellings)}."
