#!/usr/bin/env python
"""Checks of the Markdown pages that need no network: lines of at most 100 columns, sentences of at most 25 words, no
dead link, no dead anchor.

    python tools/check_markdown.py                     # README.md, CONTRIBUTING.md, CHANGELOG.md and docs/
    python tools/check_markdown.py --wrap docs/x.md    # lay its paragraphs and lists out in 100 columns, then check

Tables may be wider, and so may a line that holds nothing but one word, such as an address. An anchor has to work on
GitHub and on the built site, whose rules differ for headings with punctuation between blanks.

The sentences are those of paragraphs and list items. Inline code is one word, and so is a link. What a tool writes
between ``<!-- table -->`` (or ``<!-- table NAME -->``) and ``<!-- /table -->`` is left out.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = 100
WORDS = 25
LINK = re.compile(r"(?<!\\)!?\[(?:[^\[\]]|\[[^\]]*\]\([^)]*\))*\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
ITEM = re.compile(r"^(\s*)([-*+]|\d+[.)])(\s+)")
TITLE = re.compile(r"^#{1,6}\s+(.*?)\s*#*$")
#: what stays on one line: a word, and a short piece of code with what hangs on it
WORD = re.compile(r"(?:`[^`]{1,60}`|\S)+")
#: a wrapped line must not begin with what Markdown takes for a mark of its own
MARK = re.compile(r"^([-*+#>|=]|\d+[.)]|```|~~~)")
CODE = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)", re.DOTALL)
#: the last word of a sentence, with what may close behind its mark
END = re.compile(r"[.!?][)\]\"'*_]*$")
ABBREVIATION = re.compile(r"(?:^|\W)(?:e\.g|i\.e|cf|vs|etc|al|approx)\.$", re.IGNORECASE)


def pages(root: Path = ROOT) -> list[Path]:
    """Every Markdown page of the project."""
    top = [root / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md") if (root / name).is_file()]
    return top + sorted((root / "docs").rglob("*.md"))


def kinds(lines: list[str]) -> Iterator[tuple[int, str, str]]:
    """Each line with its number and what it is: code, table, title, comment, blank or text."""
    fence, before, margin = "", "blank", 0  # margin: where the text of the list item begins
    for number, line in enumerate(lines, 1):
        mark = re.match(r"^\s*(```+|~~~+)", line)
        if fence:
            kind = "code"
            if mark and line.strip() == fence:
                fence = ""
        elif mark:
            kind, fence = "code", mark.group(1)
        elif not line.strip():
            kind = "blank"
        elif line.startswith(" " * (margin + 4)) and before in ("blank", "code", "title"):
            kind = "code"
        elif line.startswith("|") and line.rstrip().endswith("|"):
            kind = "table"
        elif TITLE.match(line):
            kind = "title"
        elif line.lstrip().startswith("<!--"):
            kind = "comment"
        else:
            kind = "text"
        if kind == "text" and (item := ITEM.match(line)):
            margin = len(item.group(0))
        elif kind in ("title", "table") or (kind == "text" and not line.startswith(" ") and before != "text"):
            margin = 0
        yield number, line, kind
        before = kind


def slugs(title: str) -> tuple[str, str]:
    """A heading's anchor on GitHub and on the site."""
    plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", title)
    plain = re.sub(r"[`*]", "", plain).strip().lower()
    kept = re.sub(r"[^\w\s-]", "", plain)
    return re.sub(r"\s", "-", kept), re.sub(r"[-\s]+", "-", kept).strip("-")


def anchors(path: Path) -> set[str]:
    """Anchors that mean the same heading on GitHub and on the site."""
    seen: dict[str, int] = {}
    found = set(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", path.read_text(encoding="utf-8")))
    for _, line, kind in kinds(path.read_text(encoding="utf-8").splitlines()):
        if kind == "title" and (match := TITLE.match(line)):
            github, site = slugs(match.group(1))
            if github == site and not seen.get(site):  # a second heading of the name is numbered differently
                found.add(site)
            seen[site] = seen.get(site, 0) + 1
    return found


def paragraphs(lines: list[str]) -> Iterator[tuple[int, str]]:
    """Each paragraph and list item with the number of its first line; nothing from between table markers."""
    block: list[str] = []
    first, generated = 0, False
    for number, line, kind in [*kinds(lines), (len(lines) + 1, "", "blank")]:
        item = ITEM.match(line) if kind == "text" else None
        if block and (kind != "text" or item):
            yield first, "\n".join(block)
            block = []
        if kind == "comment" and re.search(r"<!-- /?table( \w+)? -->", line):
            generated = "/table" not in line
        if kind == "text" and not generated:
            first = first if block else number
            block.append(line[item.end() :] if item else line)


def one_word(pattern: re.Pattern[str], word: str, text: str) -> str:
    """The text with a word for whatever matches; its line breaks stay, so that lines can be counted."""
    return pattern.sub(lambda match: word + "\n" * match.group(0).count("\n"), text)


def sentences(lines: list[str]) -> Iterator[tuple[int, int, str]]:
    """Each sentence of a page: the line where it begins, its number of words, and its first words."""
    for first, block in paragraphs(lines):
        text = one_word(LINK, "link", one_word(CODE, "code", block))
        start = first
        words: list[str] = []
        for match in re.finditer(r"\S+", text):
            word = match.group(0)
            if not words:
                start = first + text.count("\n", 0, match.start())
            if re.search(r"\w", word):  # a dash or a plus sign between blanks is no word
                words.append(word)
            if words and END.search(word) and not ABBREVIATION.search(word):
                yield start, len(words), " ".join(words[:4])
                words = []
        if words:
            yield start, len(words), " ".join(words[:4])


def faults(path: Path) -> list[str]:
    """What is wrong with a page, each fault with its line."""
    text, told = path.read_text(encoding="utf-8"), []
    for number, line, kind in kinds(text.splitlines()):
        where = f"{path}:{number}"
        if len(line) > COLUMNS and kind != "table" and len(line.split()) > 1:
            told.append(f"{where}: {len(line)} columns, at most {COLUMNS}")
    # a link may go on in the next line, so it is looked for in the page as one text
    shown = [re.sub(r"`[^`]*`", "", line) if kind != "code" else "" for _, line, kind in kinds(text.splitlines())]
    page = "\n".join(shown)
    for found in LINK.finditer(page):
        if fault := dead(path, found[1]):
            told.append(f"{path}:{page.count(chr(10), 0, found.start()) + 1}: {fault}")
    for number, count, words in sentences(text.splitlines()):
        if count > WORDS:
            told.append(f"{path}:{number}: a sentence of {count} words, at most {WORDS}: {words} ...")
    return told


def dead(page: Path, target: str) -> str | None:
    """Why a link of a page leads nowhere; None: it is alive, or another site's."""
    if re.match(r"[a-z][a-z+.-]*:", target):
        return None
    name, _, anchor = target.partition("#")
    there = (page.parent / unquote(name)).resolve() if name else page
    if not there.exists():
        return f"dead link {target}: {there} does not exist"
    if anchor and there.suffix == ".md" and anchor not in anchors(there):
        return f"dead anchor {target}: no heading of {there.name} has it on GitHub and on the site"
    return None


def wrapped(text: str) -> str:
    """The page with its paragraphs and list items laid out in ``COLUMNS``; code, tables and titles stay."""
    out: list[str] = []
    block: list[str] = []
    lead = rest = ""

    def close() -> None:
        nonlocal block
        lines: list[list[str]] = [[]]
        for word in WORD.findall(" ".join(block)):
            if lines[-1] and len(lead) + len(" ".join([*lines[-1], word])) > COLUMNS:
                lines.append([])
                while MARK.match(word) and len(lines[-2]) > 1:  # not at the start of a line
                    lines[-1].insert(0, word)
                    word = lines[-2].pop()
                lines[-1].insert(0, word)
            else:
                lines[-1].append(word)
        out.extend((rest if index else lead) + " ".join(words) for index, words in enumerate(lines) if words)
        block = []

    for _, line, kind in kinds(text.splitlines()):
        item = ITEM.match(line) if kind == "text" else None
        if kind != "text" or item:
            close()
        if kind != "text":
            out.append(line)
            continue
        if item:
            lead, rest = item.group(0), " " * len(item.group(0))
            block = [line[item.end() :]]
        elif block:
            block.append(line)
        else:
            lead = rest = line[: len(line) - len(line.lstrip())]
            block = [line]
        if line.endswith("  ") or line.endswith("\\"):
            close()
    close()
    return "\n".join(out) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wrap", action="store_true", help="first lay the pages out in 100 columns")
    parser.add_argument("pages", nargs="*", type=Path, metavar="PAGE", help="default: all")
    options = parser.parse_args()
    told = []
    for page in options.pages or pages():
        if options.wrap:
            text = page.read_text(encoding="utf-8")
            if (laid := wrapped(text)) != text:
                page.write_text(laid, encoding="utf-8")
        told += faults(page)
    print("\n".join(told) if told else "Markdown: no fault", file=sys.stderr if told else sys.stdout)
    return 1 if told else 0


if __name__ == "__main__":
    sys.exit(main())
