"""Whatever a run folder's texts are, they stay texts in its report: in elements, attributes, drawings and beside the
script.
"""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pact_nemo.errors import DataError
from pact_nemo.report import write_report
from tests.fixtures.run_folders import make_run

PAYLOADS = (
    "<script>evil()</script>",
    "</script><script>evil()</script>",
    "</pre></details></style></title><script>evil()</script>",
    '"><img src=x onerror=evil()>',
    "' onmouseover='evil()' x='",
    '" onfocus=evil() autofocus="',
    "</svg><svg onload=evil()>",
    "<svg><script>evil()</script></svg>",
    "<!--<script>evil()-->",
    "]]><script>evil()</script>",
    "javascript:evil()",
    "{{ 7*7 }}{% raw %}",
    "&lt;script&gt;evil()&lt;/script&gt;<b>",
    "<a href=javascript:evil()>x</a>",
    "\u2028<script>evil()</script>\x0b",
)
#: places whose text decides how the file is read; another text there is refused, which other tests show
FIXED = ("type", "stage", "status", "role", "finish_reason")


class Page(HTMLParser):
    """Tags, attributes and scripts of a page, as a browser's parser sees them."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags: set[tuple[str, ...]] = set()
        self.kinds: dict[str, int] = {}
        self.scripts: list[str] = []
        self.words = ""
        self._inside: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag if tag in ("script", "style") else None
        self.kinds[tag] = self.kinds.get(tag, 0) + 1
        self.tags.add((tag, *sorted(name for name, _ in attrs)))
        for name, value in attrs:
            assert not name.startswith("on"), f"<{tag} {name}={value!r}>"
            if name in ("href", "src", "xlink:href", "action"):
                assert value is None or value.startswith(("#", "data:,")), f"<{tag} {name}={value!r}>"

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts.append(data)
        else:
            self.words += data

    def handle_endtag(self, tag: str) -> None:
        self._inside = None


def poison(value: Any, payload: str) -> Any:
    """The payload behind every text and in every free key; texts that the readers take for names stay, and so do empty
    ones.
    """
    if isinstance(value, str):
        return value and value + payload
    if isinstance(value, list):
        return [poison(item, payload) for item in value]
    if isinstance(value, dict):
        return {key: item if key in FIXED else poison(item, payload) for key, item in value.items()}
    return value


@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_text_becomes_markup_wherever_it_stands(payload: str, tmp_path: Path) -> None:
    folder = make_run(tmp_path, steps=2, warmup=1, tasks=2, passed=(0, 1, 2))
    clean = Page(write_report(folder).read_text(encoding="utf-8"))
    for file in [*(folder / "eval").glob("*.jsonl"), *(folder / "rollouts").glob("*.jsonl"), folder / "traces.jsonl"]:
        rows = [poison(json.loads(line), payload) for line in file.read_text(encoding="utf-8").split("\n") if line]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    summary = json.loads((folder / "summary.json").read_text())
    summary |= {key: f"x{payload}" for key in ("label", "method", "seed", "hf_export")}
    summary["versions"] = {payload: payload}
    summary["eval"] |= {f"extra{payload}": summary["eval"]["after"]}
    summary["eval"]["after"]["categories"] = {f"c{payload}": {"score": 0.5, "n": 2}}
    summary["eval"]["after"]["metrics"] = {f"m{payload}": 0.5}
    summary["seconds"][payload] = 60.0
    summary["tasks"]["dropped"] = {"rows_quarantined": 3, payload: 1}
    (folder / "summary.json").write_text(json.dumps(summary))
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row | {f"k{payload}": 1.0}) + "\n" for row in metrics))
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(
        config.replace("label: null", f"label: {json.dumps('x' + payload)}", 1) + f"# {json.dumps(payload)}\n"
    )
    other = make_run(tmp_path / "other", steps=2, warmup=1, tasks=2, passed=(0, 1, 2))
    text = write_report(folder, [other]).read_text(encoding="utf-8")
    page, whole = Page(text), Page(write_report(other, [folder]).read_text(encoding="utf-8"))
    assert page.scripts == clean.scripts == whole.scripts  # the only script is the page's own, unchanged
    for tag in ("img", "iframe", "object", "embed", "base", "form", "input", "link"):
        assert page.kinds.get(tag, 0) == clean.kinds.get(tag, 0), tag
    new = (
        {tag for tag, *_ in page.tags}
        - {tag for tag, *_ in clean.tags}
        - {"tr", "td", "th", "table", "thead", "tbody", "caption", "section"}
    )
    assert not new & {"script", "b", "a", "svg", "title"}
    assert payload.split("\u2028")[-1].strip("\x0b") in page.words and "evil()" in page.words or "7*7" in page.words
    assert "\n49" not in page.words
    assert "3 bad rows" in page.words


def test_a_run_whose_texts_cannot_be_written_is_refused(tmp_path: Path) -> None:
    folder = make_run(tmp_path, steps=2, warmup=1, tasks=2, passed=(0, 1, 2))
    file = folder / "eval" / "after.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[0]["turns"][0]["text"] = "\ud800"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"after\.jsonl:1: .*surrogate"):
        write_report(folder)
