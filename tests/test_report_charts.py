"""Chart geometry and the statistics of the report, against values worked out elsewhere."""

from __future__ import annotations

import re
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from pact_nemo.report.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    Series,
    make_chart,
    reading,
    ticks_between,
    whole_ticks,
)
from pact_nemo.report.stats import Paired, deviation, pair, running_mean, wilson


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (None, "–"),
        (0.5, "0.5"),
        (-0.12345, "-0.123"),
        (0.01234, "0.0123"),
        (12.345, "12.35"),
        (151.26, "151.3"),
        (31200, "31200"),
        (2e-5, "2e-5"),
        (1.53e-6, "1.53e-6"),
        (1e6, "1e6"),
        (100.0, "100"),
    ],
)
def test_readings(value: float | None, text: str) -> None:
    assert reading(value) == text


@given(low=st.floats(-1e3, 1e3), span=st.floats(1e-4, 1e6))
def test_ticks_are_round_evenly_spaced_and_enclose_the_values(low: float, span: float) -> None:
    marks = ticks_between(low, low + span)
    step = marks[1] - marks[0]
    assert marks[0] <= low + 1e-6 * step and marks[-1] >= low + span - 1e-6 * step
    assert 2 <= len(marks) <= 8
    assert re.fullmatch(r"[125]\.000e[-+]\d+", f"{step:.3e}")


@given(low=st.integers(0, 5000), span=st.integers(0, 5000))
def test_step_ticks_are_few_and_within(low: int, span: int) -> None:
    marks = whole_ticks(low, low + span)
    assert marks[0] == low and marks == sorted(set(marks)) and marks[-1] <= low + span and len(marks) <= 8


def test_points_land_where_the_axes_say() -> None:
    chart = make_chart("t", "n", [0, 5, 10], [Series("a", [0.0, 1.0, 2.0], 0)])
    assert chart is not None
    assert [tick.text for tick in chart.y_ticks] == ["0", "0.5", "1", "1.5", "2"]
    middle_x, middle_y = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    assert chart.series[0].dots == [(LEFT, HEIGHT - BOTTOM), (middle_x, middle_y), (WIDTH - RIGHT, TOP)]
    assert chart.data["x"] == [LEFT, middle_x, WIDTH - RIGHT]
    assert chart.data["text"] == [["0", "1", "2"]]


def test_ticks_and_readings_of_nearly_equal_values_differ() -> None:
    values = [0.99995, 1.00001, 1.00004]
    chart = make_chart("t", "n", [1, 2, 3], [Series("a", values, 0)])
    assert chart is not None
    assert len({tick.text for tick in chart.y_ticks}) == len(chart.y_ticks)
    assert [float(text) for text in chart.series[0].readings] == pytest.approx(values, abs=1e-6)


def test_a_gap_lifts_the_pen_and_a_lone_point_is_a_dot() -> None:
    steps = list(range(100))
    values: list[float | None] = [1.0, None, *([2.0] * 97), None]
    chart = make_chart("t", "n", steps, [Series("a", values, 0)])
    assert chart is not None
    drawn = chart.series[0]
    assert drawn.path.count("M") == 2
    assert len(drawn.dots) == 1 and drawn.dots[0][0] == LEFT
    assert drawn.readings[1] == "–" and drawn.latest == "2"
    assert chart.data["y"][0][1] is None


def test_a_chart_without_any_value_is_left_out() -> None:
    assert make_chart("t", "n", [1, 2], [Series("a", [None, None], 0)]) is None


@pytest.mark.parametrize("value", [0.0, 3.0, -2.0, 1e-9])
def test_constant_values_and_a_single_step_have_axes(value: float) -> None:
    for steps in ([1], [1, 2, 3]):
        chart = make_chart("t", "n", steps, [Series("a", [value] * len(steps), 0)])
        assert chart is not None and len(chart.y_ticks) >= 2
        assert all(TOP <= y <= HEIGHT - BOTTOM for _, y in chart.series[0].dots)


def test_stacked_boxes_stand_on_each_other_and_add_up() -> None:
    chart = make_chart("t", "n", [1, 2], [Series("a", [10.0, 20.0], 0), Series("b", [30.0, None], 1)], kind="stack")
    assert chart is not None
    per_unit = (HEIGHT - TOP - BOTTOM) / 40
    (a1, a2), (b1,) = (s.boxes for s in chart.series)
    assert a1[1] + a1[3] == pytest.approx(HEIGHT - BOTTOM) and a1[3] == pytest.approx(10 * per_unit, abs=0.02)
    assert b1[1] + b1[3] == pytest.approx(a1[1], abs=0.02) and b1[1] == pytest.approx(TOP)
    assert a2[3] == pytest.approx(20 * per_unit, abs=0.02)
    assert LEFT <= a1[0] and a2[0] + a2[2] <= WIDTH - RIGHT


def test_levels_and_percentages_are_named_so() -> None:
    chart = make_chart(
        "t", "n", [1, 2], [Series("a", [4, 0], 0, steps=True)], axis=Axis(levels=("L0", "L1", "L2", "L3", "L4"))
    )
    assert chart is not None
    assert [tick.text for tick in chart.y_ticks] == ["L0", "L1", "L2", "L3", "L4"]
    assert chart.series[0].readings == ["L4", "L0"] and "H" in chart.series[0].path
    chart = make_chart("t", "n", [1, 2], [Series("a", [0.125, 0.3], 0)], axis=Axis(percent=True))
    assert chart is not None and chart.series[0].readings == ["12.5 %", "30 %"]
    assert "first 12.5 %, last 30 %" in chart.summary


@given(n=st.integers(1, 400), data=st.data())
def test_wilson_interval_is_scipys(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    expected = binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert wilson(k, n) == pytest.approx((expected.low, expected.high), abs=1e-4)


@given(gained=st.integers(0, 60), lost=st.integers(0, 60))
def test_sign_test_is_scipys(gained: int, lost: int) -> None:
    expected = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert Paired(gained, lost, 3, 4).p_value == pytest.approx(expected)


def test_pairs_are_of_tasks_and_leave_failed_episodes_out() -> None:
    """Task a passes one of its two episodes both times."""

    def row(task: str, success: bool | None, sample: int = 0) -> dict:
        return {"task_id": task, "sample": sample, "outcome": None if success is None else {"success": success}}

    before = [row("a", True), row("b", False), row("c", None), row("d", True), row("e", True), row("a", False, 1)]
    after = [
        row("e", None),
        row("d", True),
        row("c", True),
        row("b", False),
        row("a", False),
        row("a", True, 1),
        row("f", True),
    ]
    assert pair(before, after) == Paired(gained=0, lost=0, kept=2, neither=1, no_verdict=2)


def test_spread_is_the_sample_deviation() -> None:
    values = [0.25, 0.3125, 0.2083]
    assert deviation(values) == pytest.approx(statistics.stdev(values))
    assert deviation([0.5]) is None


def test_running_mean_leaves_gaps_out() -> None:
    assert running_mean([None, 2.0, None, 4.0, 6.0, None, None, None], 3) == [None, 2.0, 2.0, 3.0, 5.0, 5.0, 6.0, None]
