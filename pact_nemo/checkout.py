"""The checkout that a script lies in, and the console scripts, which start a checkout's own scripts.

The package is installed in editable mode, so it always lies in a checkout. Another checkout's script must not run with
the code of this one: :func:`enter` refuses that by name.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
#: console script -> the checkout's script that it starts; ``pyproject.toml`` names the same ones
SCRIPTS = {
    "pact-train": "recipes/pact_bfcl.py",
    "pact-evaluate": "tools/evaluate.py",
    "pact-traces": "tools/make_traces.py",
    "pact-check": "tools/check.py",
    "pact-plan": "tools/plan.py",
    "pact-rehearse": "tools/rehearse.py",
    "pact-report": "tools/report.py",
    "pact-compare": "tools/compare.py",
    "pact-serve": "tools/serve.py",
    "pact-doctor": "tools/doctor.py",
    "pact-bench": "tools/bench.py",
}


def enter(script: str) -> None:
    """First call of a script: ``recipes`` and ``tools`` of its checkout can be imported from here on.

    Ends the program with exit code 2 where Python imports the package of another checkout."""
    path = Path(script).resolve()
    root = path.parents[1]
    if root != ROOT:
        _refuse(
            f"{path} would run with the code of {ROOT}, which this Python has installed. Run it with {root}'s own"
            f" environment (make install there), or say which code is meant: PYTHONPATH={root}"
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))


def console() -> None:
    """A console script: the checkout's script of that name, with the same words."""
    name = Path(sys.argv[0]).name
    script = ROOT / SCRIPTS[name]
    if not script.is_file():
        _refuse(
            f"{name} starts {SCRIPTS[name]} of a checkout, and {ROOT} has none. The recipes and their settings are no"
            " part of an installed package: clone the project and run make install, or pip install -e CLONE"
        )
    sys.argv[0] = str(script)
    runpy.run_path(str(script), run_name="__main__")


def _refuse(why: str) -> NoReturn:
    print(f"configuration error: {why}", file=sys.stderr)
    raise SystemExit(2)
