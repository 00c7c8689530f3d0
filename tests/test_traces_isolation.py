"""No trace reaches generation: the packages that make rollouts can't import the traces package, by any spelling."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import pact_nemo

ROOT = Path(pact_nemo.__file__).parent
FORBIDDEN = "pact_nemo.traces"


def _imports(source: str, package: str) -> Iterator[str]:
    """Absolute names of everything imported in ``source`` (a module of ``package``), literal dynamic imports
    included.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("pact_nemo."):
            yield node.value


def _touches(source: str, package: str) -> bool:
    return any(name == FORBIDDEN or name.startswith(f"{FORBIDDEN}.") for name in _imports(source, package))


@pytest.mark.parametrize("package", ["rollouts", "serving", "environments", "chat", "objective"])
def test_no_module_below_the_traces_imports_them(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, f"package {package} is gone: this test would prove nothing"
    offenders = [
        str(path.relative_to(ROOT))
        for path in files
        if _touches(path.read_text(encoding="utf-8"), f"pact_nemo.{package}")
    ]
    assert offenders == []


@pytest.mark.parametrize(
    "source",
    [
        "import pact_nemo.traces",
        "import pact_nemo.traces.schema as s",
        "from pact_nemo import traces",
        "from pact_nemo.traces import schema",
        "from ..traces.spans import encode_trace",
        "from .. import traces",
        "def f():\n    from pact_nemo.traces.ground_truth import make_trace",
        "import importlib\nimportlib.import_module('pact_nemo.traces.ground_truth')",
    ],
)
def test_the_walk_sees_every_spelling(source: str) -> None:
    assert _touches(source, "pact_nemo.rollouts")


@pytest.mark.parametrize(
    "source", ["import pact_nemo.chat", "from ..chat import template", "from pact_nemo import errors", "x = 'traces'"]
)
def test_the_walk_has_no_false_alarm(source: str) -> None:
    assert not _touches(source, "pact_nemo.rollouts")


def test_a_rollout_has_no_room_for_a_trace() -> None:
    from dataclasses import fields

    from pact_nemo.rollouts.types import Rollout, Turn

    names = {item.name for item in (*fields(Rollout), *fields(Turn))}
    assert not [name for name in names if "trace" in name or "privileged" in name]
