"""``tools/evaluate.py``: where its settings come from, and what it says of episodes that failed."""

from __future__ import annotations

import argparse
from pathlib import Path

from pact_nemo.environments.base import Outcome, Task
from pact_nemo.rollouts.types import Rollout
from tools.evaluate import counted, settings_of

CONF = Path(__file__).resolve().parents[1] / "conf"


def options(environment: str | None = None, config: str | None = None, *words: str) -> argparse.Namespace:
    return argparse.Namespace(
        environment=environment, config=[CONF / config] if config else None, overrides=list(words)
    )


def test_the_environment_is_the_option_s_or_else_that_of_the_settings_file() -> None:
    own = "pact_own-smollm2_135m-cpu.yaml"
    assert settings_of(options(None, own, "agent.tools=shop.py:Shop", "tasks.path=t.jsonl")).environment == "own"
    assert settings_of(options("own", None, "agent.tools=shop.py:Shop", "tasks.path=t.jsonl")).environment == "own"
    assert settings_of(options()).environment == "bfcl"
    assert settings_of(options("toolhop", None, "tasks.path=t.json")).environment == "toolhop"


def test_each_metric_has_its_own_count_and_the_first_failure_is_named() -> None:
    tasks = [Task(name, name, "c", (), (), ()) for name in "abc"]

    def rollout(task: str, outcome: Outcome | None) -> Rollout:
        made = Rollout(task, 0, [1], [], [], [], [], outcome, 0)
        if outcome is None:
            made.status, made.error = "failed", "SandboxFailure: lost"
        return made

    played = [rollout("a", Outcome(True, 1.0, metrics={"calls": 2.0})), rollout("b", None)]
    played.append(rollout("c", Outcome(False, 0.0, metrics={"calls": 4.0, "errors": 1.0})))
    found = counted(played, tasks)
    assert found == {"metric_counts": {"calls": 2, "errors": 1}, "first_failure": "b: SandboxFailure: lost"}
    assert counted(played[:1], tasks)["first_failure"] is None
