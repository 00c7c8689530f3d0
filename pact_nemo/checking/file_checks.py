"""What can be told from the files alone: keys that look like ours, rows without an id, traces of no task."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pact_nemo.checking.findings import Finding, Level
from pact_nemo.config.schema import Config
from pact_nemo.environments.own.conversations import user_words
from pact_nemo.environments.own.fields import mapped
from pact_nemo.environments.own.settings import FIELDS, OwnConfig
from pact_nemo.environments.own.tasks import REQUESTS, row_id
from pact_nemo.environments.rows import Row, number_text, read_rows
from pact_nemo.runtime.quarantine import Quarantine
from pact_nemo.traces.conversations import FIELDS as CONVERSATION_FIELDS
from pact_nemo.traces.schema import is_trace_file

NEAR = 0.8  #: of difflib's ratio, from which on a key looks like another


def key_findings(config: Config) -> list[Finding]:
    """Keys of the rows of tasks and conversations that mean nothing here and look like one that does."""
    own = config.environment_config
    found: list[Finding] = []
    if isinstance(own, OwnConfig) and config.tasks.path is not None:
        found += misspelt_keys(config.tasks.path, FIELDS, own.fields, "goes to the class only")
    if config.traces.path is not None and Path(config.traces.path).is_file() and not is_trace_file(config.traces.path):
        found += misspelt_keys(config.traces.path, CONVERSATION_FIELDS, config.traces.fields, "is read by nobody")
    return found


def misspelt_keys(path: str, known: Sequence[str], fields: Mapping[str, str], fate: str) -> list[Finding]:
    """The keys of a file's rows that look like one of ours that the row lacks.

    Args:
        known: our names of fields.
        fields: our name -> the name in this file.
        fate: what becomes of other keys.
    """
    if not Path(path).is_file():
        return []  # said already
    theirs = {fields.get(name, name): name for name in known}
    found = []
    for row in read_rows(path, Quarantine("quarantine")):
        absent = [name for name in theirs if row.values.get(name) is None]
        for key in row.values:
            near = difflib.get_close_matches(key, absent, 1, NEAR) if key not in theirs else []
            if near:
                text = f"the key {key!r} {fate} (near: {near[0]!r})"
                found.append(Finding("warning", "key", f"{path}:{row.number}", text, f"rename it to {near[0]!r}"))
    return found


@dataclass(frozen=True)
class TaskRows:
    """What conversations can't name a task by.

    Attributes:
        without_id: id that a task got -> place of its row, which has none.
        refused: id, and the user's words, of a task whose row was refused -> the place of the fault.
        rows: that can be read.
    """

    without_id: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    rows: int = 0

    def findings(self) -> list[Finding]:
        """Rows without an id."""
        if not self.without_id:
            return []
        count, first = len(self.without_id), next(iter(self.without_id.values()))
        level: Level = "warning" if count < self.rows else "note"  # of all rows it may be meant
        text = f"{count} of {self.rows} task rows have no id, the first here"
        return [Finding(level, "id", first, text, "conversations and reports name a task by it; give each row one")]


def task_rows(config: Config, quarantine: Quarantine) -> TaskRows:
    """What the rows of ``tasks.path`` of an own agent are named by.

    Args:
        quarantine: holds the rows that were refused.
    """
    own, path = config.environment_config, config.tasks.path
    if not isinstance(own, OwnConfig) or path is None or not Path(path).is_file():
        return TaskRows()
    rows = [
        Row(mapped(row.values, own.fields), row.file, row.number) for row in read_rows(path, Quarantine("quarantine"))
    ]
    without = {row_id(row): f"{row.file}:{row.number}" for row in rows if row.values.get("id") is None}
    refused: dict[str, str] = {}
    for bad in quarantine.rows:
        values = mapped(bad.raw, own.fields) if isinstance(bad.raw, dict) else {}
        for name in _names(values):
            refused.setdefault(name, f"{bad.error.file}:{bad.error.line}")
    return TaskRows(without, refused, len(rows))


def _names(values: Mapping[str, Any]) -> list[str]:
    """The id and the user's words of a refused row, as far as it has them; none of a conversation's."""
    request = next((values[key] for key in REQUESTS if values.get(key) is not None), None)
    messages = [{"role": "user", "content": request}] if isinstance(request, str) else request
    messages = [one for one in messages if isinstance(one, dict)] if isinstance(messages, list) else []
    if any(message.get("role") == "assistant" for message in messages):
        return []
    said = user_words([one for one in messages if isinstance(one.get("content"), str) and "role" in one])
    name = values.get("id")
    named = name if isinstance(name, str) else number_text(name) if isinstance(name, int | float) else ""
    return [one for one in (named, said) if one]


def stray_findings(path: str, told: Sequence[str], known: Sequence[str]) -> list[Finding]:
    """Traces of our own schema that belong to no task.

    Args:
        told: the task that each trace names.
        known: ids of the tasks.
    """
    strays = [name for name in told if name not in known]
    if not strays:
        return []
    closest = difflib.get_close_matches(strays[0], known, 1)
    near = f" (near: {closest[0]!r})" if closest else ""
    text = f"{len(strays)} of {len(told)} traces belong to no task; the first names {strays[0]!r}{near}"
    level: Level = "error" if len(strays) == len(told) else "warning"
    return [Finding(level, "trace:of_no_task", path, text, "mend task_id, or take the trace out")]
