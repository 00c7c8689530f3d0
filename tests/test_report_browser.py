"""The page in a real browser: phone and desktop width, hover, keyboard, filters, and no request but for itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from fixtures.run_folders import make_run
from PIL import Image

from pact_nemo.report import write_report
from pact_nemo.report.browser import Browser, find_browser, write_png

pytestmark = pytest.mark.skipif(find_browser() is None, reason="no Chromium")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    return write_report(make_run(root), [make_run(root, method="grpo", seed=seed) for seed in (1, 2)])


@pytest.fixture(scope="module")
def phone(page: Path) -> Iterator[Browser]:
    with Browser(360) as browser:
        browser.open(page)
        yield browser


def test_nothing_is_wider_than_a_phone_even_with_all_episodes_open(phone: Browser) -> None:
    phone.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert phone.evaluate("document.documentElement.scrollWidth") == phone.evaluate("innerWidth") == 360
    phone.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = false; })")


def test_the_page_asks_for_nothing_but_itself(phone: Browser, page: Path) -> None:
    assert phone.requests == [page.resolve().as_uri()]


def test_pointing_at_a_chart_reads_its_values_and_leaving_it_ends_that(phone: Browser) -> None:
    point = """(() => {{
        const figure = document.querySelector('.chart'), svg = figure.querySelector('svg'), frame = svg.getBoundingClientRect();
        const x = JSON.parse(figure.dataset.chart).x[4] / 360 * frame.width + frame.left;
        svg.dispatchEvent(new PointerEvent('{event}', {{ clientX: x, clientY: frame.top + 20, bubbles: true }}));
        return [figure.querySelector('.at').textContent, figure.querySelector('output').textContent,
                JSON.parse(figure.dataset.chart).text[0][4], getComputedStyle(figure.querySelector('.cursor')).opacity > 0];
    }})()"""
    at, shown, expected, line = phone.evaluate(point.format(event="pointermove"))
    assert (at, shown, line) == ("step 5", expected, True)
    at, shown, expected, line = phone.evaluate(point.format(event="pointerleave"))
    assert (at, line) == ("last", False) and shown != expected


def test_arrow_keys_walk_through_a_chart(phone: Browser) -> None:
    keys = "['Home', 'ArrowRight', 'ArrowRight', 'ArrowLeft']"
    at = phone.evaluate(
        "(() => { const f = document.querySelector('.chart'); const s = f.querySelector('svg'); for (const key of"
        f" {keys}) s.dispatchEvent(new KeyboardEvent('keydown', {{ key }})); return f.querySelector('.at').textContent;"
        " })()"
    )
    assert at == "step 2"


def test_filters_show_what_they_say(phone: Browser) -> None:
    def click(group: str, value: str) -> int:
        phone.evaluate(f"document.querySelector('[data-filter={group}] [data-value=\"{value}\"]').click()")
        visible = "[...document.querySelectorAll('.episode')].filter((e) => !e.hidden)"
        stages, outcomes = (
            phone.evaluate(f"[...new Set({visible}.map((e) => e.dataset.{key}))]") for key in ("stage", "outcome")
        )
        if value:
            assert (stages if group == "stage" else outcomes) == [value]
        empty = (
            "[...document.querySelectorAll('.card')].filter((c) => !c.hidden &&"
            " !c.querySelector('.episode:not([hidden])')).length"
        )
        assert phone.evaluate(empty) == 0
        return phone.evaluate(f"{visible}.length")

    everything = phone.evaluate("document.querySelectorAll('.episode').length")
    after = click("stage", "after")
    passed = click("outcome", "pass")
    failed = click("outcome", "fail")
    assert 0 < passed < after and passed + failed == after
    click("outcome", "")
    assert click("stage", "") == everything
    assert f"{everything} of {everything} episodes" == phone.evaluate("document.getElementById('shown').textContent")


def test_picture_has_the_whole_page_in_the_colours_of_the_system(phone: Browser, page: Path, tmp_path: Path) -> None:
    light = phone.evaluate("getComputedStyle(document.body).backgroundColor")
    assert min(map(int, re.findall(r"\d+", light))) > 240
    height = phone.evaluate("document.documentElement.scrollHeight")
    dark = write_png(page, tmp_path / "out" / "dark.png", width=390, dark=True)
    with Image.open(dark) as image:
        assert image.width == 390 and 0.7 * height < image.height <= 12000 and image.height > 4000
        assert max(image.convert("RGB").getpixel((2, 2))) < 40
