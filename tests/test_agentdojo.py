"""AgentDojo's suites as own agents: its solutions pass its checkers through our sessions, and doing nothing does not.

Runs where the package is installed: ``pip install --no-deps agentdojo==0.1.35``.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from pact_nemo.checking.plays import NOTHING, Script, play
from pact_nemo.checkout import ROOT
from pact_nemo.config.load import load_config
from pact_nemo.data.conversations import conversations_of, import_traces
from pact_nemo.data.tasks import build_environment
from pact_nemo.runtime.quarantine import Quarantine

FOLDER = ROOT / "examples" / "agentdojo"
NEEDED = ("agentdojo", "deepdiff", "yaml", "email_validator")
#: suite -> (user tasks, those whose checker is content with an episode that does nothing)
SUITES = {"Banking": (16, 5), "Slack": (21, 0), "Travel": (20, 0), "Workspace": (40, 0)}


@pytest.fixture(autouse=True)
def installed() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: examples/agentdojo/suites.py says how")


@pytest.mark.parametrize(
    "suite", ["Banking", "Slack", *(pytest.param(name, marks=pytest.mark.slow) for name in ("Travel", "Workspace"))]
)
def test_its_own_solutions_pass_its_own_checkers(suite: str, tmp_path: Path) -> None:
    script = [sys.executable, str(FOLDER / "make_data.py"), suite.lower(), str(tmp_path)]
    made = subprocess.run(script, check=True, timeout=120, capture_output=True, text=True)
    assert "left out" not in made.stdout
    files = [f"{kind}.path={tmp_path}/{suite.lower()}-{kind}.jsonl" for kind in ("tasks", "traces")]
    words = [f"agent.tools={FOLDER}/suites.py:{suite}", *files, "tasks.max_observation_chars=null"]
    config = load_config(ROOT / "conf" / "pact_own-smollm2_135m-cpu.yaml", words)
    environment = build_environment(config)
    try:
        tasks = environment.tasks()
        told = conversations_of(config, Quarantine()) or []
        found, rejected = import_traces(config, environment, told, tasks)  # replayed, and judged by score()
        nothing = [task.id for task in tasks if play(environment, task, NOTHING).success]
        first = found[tasks[0].id][0]
        half = play(environment, tasks[0], Script.of_trace(first, ("Done.",), tasks[0]))
    finally:
        environment.close()
    assert not rejected and half.failure is None
    assert (len(tasks), len(found), len(nothing)) == (SUITES[suite][0], SUITES[suite][0], SUITES[suite][1])


def test_no_vendor_of_models_is_imported() -> None:
    program = f"""
import sys
sys.path.insert(0, {str(FOLDER)!r})
for name in ("openai", "anthropic", "cohere", "google", "langchain"):
    sys.modules[name] = None  # an import of it fails
import suites
print(len(suites.Banking.suite.user_tasks))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout == "16\n", done.stderr
