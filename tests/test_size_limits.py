"""The limits of CONTRIBUTING.md: modules to read in one sitting, functions to read at one look."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
FOLDERS = ("pact_nemo", "recipes", "tools", "examples")
#: signatures that are not ours: autograd functions and kernels, and stand-ins for Transformer Engine's layers
FOREIGN_SIGNATURES = ("pact_nemo/policy/heads.py", "pact_nemo/rehearsal/")
WHOLE_SCHEMA = "pact_nemo/config/schema.py"  #: all settings in one place


def modules(*folders: str) -> Iterator[tuple[str, str]]:
    for folder in folders:
        for path in sorted((REPO / folder).rglob("*.py")):
            yield str(path.relative_to(REPO)), path.read_text(encoding="utf-8")


def test_no_module_is_longer_than_350_lines() -> None:
    lengths = {name: len(text.splitlines()) for name, text in modules(*FOLDERS, "tests") if name != WHOLE_SCHEMA}
    assert {name: lines for name, lines in lengths.items() if lines > 350} == {}


def test_no_function_is_longer_than_60_lines_or_takes_more_than_7_arguments() -> None:
    long, wide = {}, {}
    for name, text in modules(*FOLDERS):
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            place, given = f"{name}:{node.lineno} {node.name}", node.args
            assert node.end_lineno is not None
            if (lines := node.end_lineno - node.lineno + 1) > 60:
                long[place] = lines
            names = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
            count = len(names) - (names[:1] in (["self"], ["cls"]))
            if count > 7 and not name.startswith(FOREIGN_SIGNATURES):
                wide[place] = count
    assert (long, wide) == ({}, {})


def test_the_training_package_stays_under_2000_lines() -> None:
    assert sum(len(text.splitlines()) for _, text in modules("pact_nemo/training")) < 2000
