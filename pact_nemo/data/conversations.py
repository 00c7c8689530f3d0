"""Conversations under ``traces.path``: read once, given to tasks, verified."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import cast

from pact_nemo.config.schema import Config
from pact_nemo.environments.base import Environment, Task, ToolCall
from pact_nemo.environments.own.conversations import conversation_id, user_words
from pact_nemo.runtime.quarantine import BadRow, Quarantine
from pact_nemo.traces.annotate import Style
from pact_nemo.traces.conversations import NOTHING_TO_LEARN, Conversation, ImportReport, as_trace, read_conversations
from pact_nemo.traces.filters import why_not
from pact_nemo.traces.other_formats import refuse_as_conversations
from pact_nemo.traces.schema import Trace, is_trace_file
from pact_nemo.traces.verification import why_unverified

log = logging.getLogger(__name__)


def conversations_of(config: Config, quarantine: Quarantine) -> list[Conversation] | None:
    """The conversations of ``traces.path``; None where there is no such file, or it holds traces of our own schema.

    Raises:
        DataError: a row is malformed and the quarantine is strict, or no row is left; names file, row and field.
    """
    path = config.traces.path
    if path is None or not Path(path).is_file() or is_trace_file(path):
        return None
    found, bad, _ = _read(*_key(config, quarantine.strict))
    known = {(row.error.file, row.error.line, row.error.field) for row in quarantine.rows}
    for row in bad:
        if (row.error.file, row.error.line, row.error.field) not in known:
            quarantine.add(row.error, row.raw)
    return found


def refuse_conversations(config: Config) -> None:
    """Say why ``traces.path`` is no file of conversations, where :func:`conversations_of` gave None.

    Raises:
        DataError: always where the path is given.
    """
    if config.traces.path is not None:
        refuse_as_conversations(config.traces.path)


def dropped_conversations(config: Config, quarantine: Quarantine) -> dict[str, int]:
    """How many sound conversations of ``traces.path`` hold nothing to learn, by reason
    (:data:`~pact_nemo.traces.conversations.NOTHING_TO_LEARN`); after :func:`conversations_of`, of the same file.
    """
    return _read(*_key(config, quarantine.strict))[2]


def _key(config: Config, strict: bool) -> tuple[tuple[str, int, int, bool], tuple[tuple[str, str], ...]]:
    status = Path(str(config.traces.path)).stat()
    file = (str(config.traces.path), status.st_mtime_ns, status.st_size, strict)
    return file, tuple(sorted(config.traces.fields.items()))


@lru_cache(maxsize=4)
def _read(
    key: tuple[str, int, int, bool], fields: tuple[tuple[str, str], ...]
) -> tuple[list[Conversation], tuple[BadRow, ...], dict[str, int]]:
    path, _, _, strict = key
    quarantine, report = Quarantine("strict" if strict else "quarantine"), ImportReport()
    found = read_conversations(path, quarantine, dict(fields), report)
    log.info("%s\n%s", path, report)
    dropped = {reason: report.dropped[reason] for reason in NOTHING_TO_LEARN if report.dropped[reason]}
    return found, tuple(quarantine.rows), dropped


@dataclass(frozen=True)
class Judged:
    """What a conversation is to a run.

    Attributes:
        conversation: as it was read.
        task: that it belongs to; None where it belongs to none of those asked for.
        trace: made of it; None without a task.
        reason: why it is no expert trace; None where it is one, or where it belongs to a task that wasn't asked for.
    """

    conversation: Conversation
    task: Task | None
    trace: Trace | None
    reason: str | None


def judged_conversations(
    config: Config, environment: Environment, told: list[Conversation], tasks: list[Task]
) -> Iterator[Judged]:
    """Each conversation with the task among ``tasks`` that it belongs to, and what speaks against it: ``of_no_task``,
    a reason of :func:`~pact_nemo.traces.filters.why_not`, or one of ``traces.verify``.
    """
    by_id = {task.id: task for task in tasks}
    by_words = {user_words(task.user_turns[0]): task for task in reversed(tasks)}
    there = environment.tasks()
    others = {task.id for task in there} | {user_words(task.user_turns[0]) for task in there}
    for conversation in told:
        name, words = conversation_id(conversation), user_words(conversation.opening)
        task = by_id.get(name) or (by_words.get(words) if conversation.task_id is None else None)
        if task is None:
            lost = name not in others and (conversation.task_id is not None or words not in others)
            yield Judged(conversation, None, None, "of_no_task" if lost else None)
            continue
        yield _judged(config, environment, conversation, task)


def _judged(config: Config, environment: Environment, conversation: Conversation, task: Task) -> Judged:
    """A conversation of a task; where an episode ends with the request's turn, the part of that turn."""
    if getattr(environment, "first_turn_only", False):
        part = conversation.first_turn()
        if part is None:
            return Judged(conversation, task, None, "no_call_in_first_turn")
        conversation = part
    trace, reason = _verified(config, environment, conversation, task)
    if reason == "replay_refused" and conversation.turns[-1].user_turn >= len(task.user_turns):
        reason = "longer_than_task"
    return Judged(conversation, task, trace, reason)


def import_traces(
    config: Config, environment: Environment, told: list[Conversation], tasks: list[Task]
) -> tuple[dict[str, list[Trace]], Counter[str]]:
    """Traces of the tasks that conversations belong to, and how many can't be used, by reason.

    A task's first conversation is its main trace, further ones are alternatives. Those of held-out tasks are left
    alone.
    """
    found: dict[str, list[Trace]] = {}
    rejected: Counter[str] = Counter()
    for one in judged_conversations(config, environment, told, tasks):
        if one.reason is not None:
            rejected[one.reason] += 1
            if one.task is not None:
                where = f"{one.conversation.file}:{one.conversation.line}"
                log.warning("%s: no expert trace of %s: %s", where, one.task.id, one.reason)
        elif one.task is not None and one.trace is not None:
            found.setdefault(one.task.id, []).append(one.trace)
    return found, rejected


def _verified(
    config: Config, environment: Environment, conversation: Conversation, task: Task
) -> tuple[Trace, str | None]:
    """The trace that a conversation makes for a task, and why it can't be used; None where it can."""
    rename: Callable[[ToolCall], ToolCall] | None = getattr(environment, "shown_call", None)
    trace = as_trace(conversation, task.id, True, rename, task.tools, cast(Style, config.traces.style))
    reason = why_not(trace, task)
    if reason is None:
        limits = config.traces
        reason = why_unverified(environment, task, (conversation, trace), limits.verify, limits.min_score)
    return trace, reason
