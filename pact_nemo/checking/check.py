"""Everything that can be wrong with tools, tasks and traces, in one pass."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pact_nemo.chat.template import ChatFormat
from pact_nemo.checking.conversation_checks import conversation_findings, system_findings
from pact_nemo.checking.data_checks import (
    closing_findings,
    drift_findings,
    dropped_findings,
    length_findings,
    name_findings,
    row_findings,
    task_findings,
    tool_findings,
)
from pact_nemo.checking.file_checks import key_findings, stray_findings, task_rows
from pact_nemo.checking.findings import Finding, grouped
from pact_nemo.checking.plays import Expert, Script
from pact_nemo.checking.reward_checks import expert_findings, nothing_findings, other_findings, session_findings
from pact_nemo.config.schema import Config
from pact_nemo.data.conversations import conversations_of, dropped_conversations, judged_conversations
from pact_nemo.data.task_traces import find_traces
from pact_nemo.data.tasks import build_environment, check_batches, load_tasks, refuse_evaluation_only
from pact_nemo.environments.base import Environment, Task
from pact_nemo.errors import ConfigError, DataError, EnvironmentFailure
from pact_nemo.runtime.quarantine import Quarantine
from pact_nemo.traces.schema import read_traces


@dataclass
class Checked:
    """What a check saw.

    Attributes:
        findings: in the order of the checks.
        tools: schemas as the model sees them.
        tasks, played, traces: how many there are: tasks, tasks of which episodes were played, usable traces.
    """

    findings: list[Finding] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)
    tasks: int = 0
    played: int = 0
    traces: int = 0

    def count(self, level: str) -> int:
        return sum(finding.level == level for finding in self.findings)


def check(
    config: Config,
    chat: ChatFormat | None,
    *,
    limit: int = 64,
    note: Callable[[str], None] = lambda text: None,
) -> Checked:
    """Check the environment, the tasks and the traces of a config. Never raises for what is wrong with them.

    Args:
        chat: template and tool format that lengths are counted with; None: they are not.
        limit: episodes are played of so many tasks at most, drawn by ``tasks.split_seed``.
        note: told what comes next.
    """
    found, quarantine = Checked(), Quarantine("quarantine")
    environment: Environment | None = None
    try:
        environment = build_environment(config, quarantine)
        _check(config, chat, environment, quarantine, limit, note, found)
    except ConfigError as error:
        found.findings.append(Finding("error", "settings", "", str(error)))
    except (DataError, EnvironmentFailure) as error:
        found.findings.append(Finding("error", "file" if isinstance(error, DataError) else "tools", "", str(error)))
    finally:
        found.findings = grouped([*row_findings(quarantine), *found.findings])
        if environment is not None:
            environment.close()
    return found


def _check(
    config: Config,
    chat: ChatFormat | None,
    environment: Environment,
    quarantine: Quarantine,
    limit: int,
    note: Callable[[str], None],
    found: Checked,
) -> None:
    note("rows")
    tasks = environment.tasks()
    refuse_evaluation_only(config, tasks)
    if config.traces.path is not None and not Path(config.traces.path).is_file():
        raise ConfigError(f"traces.path={config.traces.path}: no such file")
    found.tasks = len(tasks)
    found.findings += key_findings(config)
    if not tasks:
        raise ConfigError("no task can be used; the rows above say why")
    found.tools = list({tool["name"]: tool for task in tasks for tool in task.tools}.values())
    found.findings += [*name_findings(environment), *task_findings(environment, tasks)]
    found.findings += [*task_rows(config, quarantine).findings(), *closing_findings(config, tasks)]
    note("traces")
    used, findings = _traces(config, environment, tasks, quarantine)
    found.findings += findings
    found.traces = len(used)
    called = Counter(call.name for trace, _ in used.values() for turn in trace.turns for call in turn.calls)
    found.findings += tool_findings(tasks, called)
    without = sum(task.id not in used for task in tasks)
    if without:
        text = f"{without} of {len(tasks)} tasks have no trace: RL alone trains them"
        found.findings.append(Finding("note" if used else "warning", "trace", "", text))
    if chat is not None:
        note("lengths")
        found.findings += length_findings(config, chat, tasks, used)
        found.findings += _split_findings(config, chat, environment, set(used))
    played = sorted(tasks, key=lambda task: task.id)
    random.Random(config.tasks.split_seed).shuffle(played)
    played = played[:limit]
    found.played = len(played)
    scripts = {task.id: Script.of_trace(*used[task.id], task) for task in played if task.id in used}
    for task in played:
        if task.id not in scripts and (any(task.reference_calls) or task.reference_answer):
            scripts[task.id] = Script.of_reference(task)
    note(f"episodes of {len(played)} tasks")
    told = {
        task.id: [text for turn in used[task.id][0].turns for text in turn.observations]
        for task in played
        if task.id in used and used[task.id][0].source != "ground_truth"  # made by this environment
    }
    plays, findings = expert_findings(environment, played, scripts, told)
    found.findings += findings
    shown = {task.id: used[task.id] for task in played if task.id in used}
    found.findings += drift_findings(shown, plays, config.tasks.max_observation_chars)
    found.findings += nothing_findings(environment, played, plays)
    found.findings += other_findings(environment, played, scripts, plays)
    if getattr(config.environment_config, "workers", 2) > 1:  # two episodes at a time
        found.findings += session_findings(environment, played, scripts, plays)


def _split_findings(config: Config, chat: ChatFormat, environment: Environment, traced: set[str]) -> list[Finding]:
    """Whether a run with these settings could split the tasks and fill its batches. A note: nothing is wrong with the
    rows, and there may be more of them later.
    """
    try:
        train, _, _ = load_tasks(config, environment, chat, Quarantine("quarantine"))
        warmup = None
        if config.traces.max_tasks is None:  # else a run chooses among its training tasks, not among all
            warmup = [task for task in train if task.id in traced][: config.warmup.max_tasks]
        check_batches(config, train, warmup)
    except (ConfigError, DataError) as error:
        return [Finding("note", "settings", "", f"a run with these settings would be refused: {error}")]
    return []


def _traces(
    config: Config, environment: Environment, tasks: list[Task], quarantine: Quarantine
) -> tuple[dict[str, Expert], list[Finding]]:
    """Task id -> (trace, what is said after its last call and at the end of the user turns behind it)."""
    told = conversations_of(config, quarantine)
    if told is not None:
        judged = list(judged_conversations(config, environment, told, tasks))
        rows = task_rows(config, quarantine)
        used, findings = conversation_findings(judged, tasks, environment, rows)
        dropped = dropped_findings(config.traces.path, dropped_conversations(config, quarantine))
        return used, [*dropped, *findings, *system_findings(judged)]
    made = find_traces(config, environment, tasks, [], quarantine)
    lost = {reason: count for reason, count in made.dropped.items() if count and reason != "trace_missing"}
    findings = [
        Finding("warning", "trace", "", f"{count} traces are left out: {reason}") for reason, count in lost.items()
    ]
    by_id = {task.id: task for task in tasks}
    if config.traces.path is not None:
        told_ids = [trace.task_id for trace in read_traces(Path(config.traces.path), Quarantine("quarantine"))]
        findings += stray_findings(config.traces.path, told_ids, list(by_id))
    return {
        name: (several[0], (by_id[name].reference_answer or "",)) for name, several in made.sources.items()
    }, findings
