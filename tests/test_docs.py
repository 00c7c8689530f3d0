"""The pages: no dead link, lines that fit, a fresh list of settings, a site without warnings, and code that runs as it
stands.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pact_nemo.chat.tool_formats import TOOL_FORMATS
from pact_nemo.config.schema import Config
from pact_nemo.environments.base import ToolCall
from pact_nemo.environments.registry import ENVIRONMENTS
from pact_nemo.methods.registry import METHODS
from pact_nemo.policy.families import FAMILIES, MODEL_TYPES
from tools import check_markdown, settings_reference

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def test_no_page_has_a_fault() -> None:
    assert [fault for page in check_markdown.pages() for fault in check_markdown.faults(page)] == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("word " * 21, "104 columns"),
        ("[x](absent.md)", "dead link absent.md"),
        ("[x](other.md#absent)", "dead anchor"),
        ("[x](#absent)", "dead anchor"),
        ("# A & B\n[x](#a--b)", "dead anchor"),  # GitHub's spelling only
        ("- item\n  [x](absent.md)", "dead link"),
        ("text [of two\nlines](absent.md)", ":1: dead link"),
        ("```text\n" + "word " * 21 + "\n```", "105 columns"),
        ("![x](absent.png)", "dead link absent.png"),
        ("word\n" * 26, "a sentence of 26 words"),
        ("- " + "word\n  " * 26, "a sentence of 26 words"),
        ("word\n" * 13 + "(e.g. " + "word\n" * 12 + "word)", "a sentence of 27 words"),
    ],
)
def test_a_fault_is_found(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "other.md").write_text("# There\n")
    page = tmp_path / "page.md"
    page.write_text(f"{text.rstrip()}\n")
    (fault,) = check_markdown.faults(page)
    assert words in fault and "page.md:" in fault


@pytest.mark.parametrize(
    "text",
    [
        "| " + "word " * 30 + "|",
        "x" * 200,
        "[x](other.md#there-it-is)",
        "`[x](absent.md)`",
        "    [x](absent.md)",
        "[x](https://example.org/absent.md#a)",
        ("word\n" * 25 + ".\n") * 2,
        "word\n" * 24 + "`" + "code " * 9 + "`",
        "word\n" * 24 + "[" + "name " * 9 + "](other.md)",
        "# " + "word " * 19,
        "> word\n\n" + "word\n" * 25,
        "```\n" + "word\n" * 26 + "```",
        "| a |\n" * 26,
        "1. word\n\n" + "        code\n" * 26,
        "<!-- table -->\n" + "word\n" * 26 + "<!-- /table -->",
    ],
)
def test_what_may_be_is_no_fault(tmp_path: Path, text: str) -> None:
    (tmp_path / "other.md").write_text("# There: it is\n")
    page = tmp_path / "page.md"
    page.write_text(f"{text}\n")
    assert check_markdown.faults(page) == []


def test_a_long_sentence_is_found_where_it_begins(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Title\n\nA short one.\n- An item.\n  It is short. The next\n" + "  word\n" * 24)
    (fault,) = check_markdown.faults(page)
    assert fault == f"{page}:5: a sentence of 26 words, at most 25: The next word word ..."


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("Run `a. b c`, or `a\nb. c`. Then ``x ` y. z``.", [4, 2]),
        ("See [a page. Of mine](other.md#a). See ![it](x.png).", [2, 2]),
        ("A tool, e.g. this, i.e. that, etc. and so on. It is (cf. there) mine.", [10, 5]),
        ("It takes 1.5 s. Then 1,024.25 of 3.11.7. Done!", [4, 4, 1]),
        ('**Bold.** A name (of it). Is it "so?" Yes', [1, 4, 3, 1]),
        ("a - b + c = d", [4]),
        ("- One item\n- another\n  one. Yes.\n\nThe end", [2, 2, 1, 2]),
        ("One:\n\n    code here\n\nTwo words:\n```\ncode\n```\nThree words now", [1, 2, 3]),
        ("Before it\n<!-- table -->\nMade by a tool.\n<!-- /table -->\nBehind it now", [2, 3]),
    ],
)
def test_the_words_of_a_sentence_are_counted(text: str, counts: list[int]) -> None:
    assert [count for _, count, _ in check_markdown.sentences(text.splitlines())] == counts


def test_wrapping_changes_no_word_and_is_settled() -> None:
    for page in check_markdown.pages():
        text = page.read_text()
        wrapped = check_markdown.wrapped(text)
        assert wrapped.split() == text.split(), page
        assert check_markdown.wrapped(wrapped) == wrapped, page


def test_a_wrapped_line_does_not_become_a_list() -> None:
    text = "word " * 19 + "12345 - then 1. more " + "word " * 10
    assert not re.search(r"(?m)^(- |1\. )", check_markdown.wrapped(text))


def test_every_package_has_a_row_and_every_row_a_package() -> None:
    rows = re.findall(r"(?m)^\| `(\w+)/` \|", (DOCS / "design" / "architecture.md").read_text())
    packages = [path.parent.name for path in (ROOT / "pact_nemo").glob("*/__init__.py")]
    assert sorted(rows) == sorted(packages)


def test_a_file_that_a_page_names_is_there() -> None:
    places = {"NAME", "path/to/", "csv_file"}  # what the reader is to put in
    for page in check_markdown.pages():
        for name in re.findall(r"`([\w.-]+/[\w./-]+\.(?:py|yaml|sh))\b", page.read_text()):
            if not any(place in name for place in places):
                assert any((ROOT / base / name).exists() for base in ("", "pact_nemo", "tools")), (page, name)


def test_the_list_of_settings_is_fresh() -> None:
    assert settings_reference.PAGE.read_text() == settings_reference.page(), "run python tools/settings_reference.py"


@dataclasses.dataclass
class Inner:
    """Of a part."""

    behind: int = 1  #: stands behind
    #: stands above,
    #: on two lines
    above: str | None = None
    listed: list[str] = dataclasses.field(default_factory=lambda: ["a"])  #: stands behind the bracket
    bare: bool = False


@dataclasses.dataclass
class Outer:
    """Of a whole.

    Attributes:
        wait_s: stands in the docstring,
            on two lines.
    """

    wait_s: float = 2.5
    inner: Inner = dataclasses.field(default_factory=Inner)


def test_a_setting_is_read_wherever_its_meaning_stands() -> None:
    rows = {row.key: row for row in settings_reference.settings(Inner)}
    assert {key: row.meaning for key, row in rows.items()} == {
        "behind": "stands behind",
        "above": "stands above, on two lines",
        "listed": "stands behind the bracket",
        "bare": "",
    }
    assert (rows["above"].type, rows["above"].default, rows["listed"].default) == ("str | null", "null", "[a]")
    nested = {row.key: row for row in settings_reference.settings(Outer)}
    assert list(nested) == ["wait_s", "inner.behind", "inner.above", "inner.listed", "inner.bare"]
    assert nested["wait_s"].unit == "seconds"
    assert settings_reference.meanings(Outer)["wait_s"] == "stands in the docstring, on two lines."


def test_every_setting_is_listed_and_read_somewhere() -> None:
    def keys(value: Any, prefix: str = "") -> set[str]:
        found = set()
        for field in dataclasses.fields(value):
            inner = getattr(value, field.name)
            name = f"{prefix}{field.name}"
            own = name == "environment_config"  # listed for each environment
            found |= keys(inner, f"{name}.") if dataclasses.is_dataclass(inner) and not own else {name}
        return found

    rows = list(settings_reference.settings())
    assert {row.key for row in rows} == keys(Config())
    listed = {title.partition(", ")[2] or title.rpartition(".")[2] for title, _, _ in settings_reference.own()}
    assert {f"method={name}" for name in METHODS} | {f"environment={name}" for name in ENVIRONMENTS} <= listed
    assert {"wandb", "mlflow", "tensorboard"} <= listed
    unread = [row.key for row in rows if not row.readers]
    assert len(unread) < 20, unread  # sections that are read as a whole
    assert [row.key for row in rows if not row.meaning] == []
    assert "policy/packing.py" not in next(row.readers for row in rows if row.key == "tasks.path")


def test_the_site_is_built_without_a_warning_and_asks_no_other_host(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) >= len(list(DOCS.rglob("*.md")))
    for page in pages:
        asked = re.findall(r"<(?:script|link|img|iframe)[^>]*?(?:src|href)=\"?(https?://[^\"\s>]+)", page.read_text())
        assert not asked, (page, asked)


def module_of(page: str, folder: Path) -> Any:
    """The one Python block of a page, as a module."""
    (block,) = re.findall(r"(?ms)^```python\n(.*?)^```$", (DOCS / page).read_text())
    assert len(block.splitlines()) <= 60, f"{page}: {len(block.splitlines())} lines"
    path = folder / f"page_{Path(page).stem}.py"
    path.write_text(block)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_model_of_the_page_is_computed_as_transformers_does(tmp_path: Path) -> None:
    before = dict(FAMILIES), dict(MODEL_TYPES)
    try:
        assert module_of("extend/model.md", tmp_path).worst_difference(tmp_path / "model") < 1e-4
    finally:
        for table, old in zip((FAMILIES, MODEL_TYPES), before, strict=True):
            table.clear()
            table.update(old)


def test_the_tool_format_of_the_page_keeps_what_a_format_has_to_keep(tmp_path: Path) -> None:
    try:
        module_of("extend/tool_format.md", tmp_path)
        made = TOOL_FORMATS["tagged"]
    finally:
        TOOL_FORMATS.pop("tagged", None)
    calls = [
        ToolCall("find", {"place": 'a "</call>" <call name="x">', "n": [1, 2.5, None, {"é": True}]}),
        ToolCall("content-type.v2", {}),
    ]
    tools = [{"name": call.name, "description": "", "parameters": {"type": "object"}} for call in calls]
    text = made.render_calls(calls)
    turn = made.parse(f"Because.\n{text}", tools)
    assert (turn.reasoning, turn.calls, turn.errors) == ("Because.", calls, [])
    assert made.parse(f"<think>{text}</think>Done.", tools).calls == []
    for broken in (
        '<call name="find">{"a": 1}',
        '<call name="find">{a}</call>',
        '<call name="find">[1]</call>',
        text[:-3],
    ):
        assert made.parse(broken, tools).errors, broken
    answer = made.parse("Nothing to call.", tools)
    assert (answer.calls, answer.errors) == ([], [])
    assert all(tool["name"] in made.render_tools(tools) for tool in tools)
