"""Conversations in OpenAI's chat format, as users export them, as expert traces.

Rules:

- What stands before the first assistant message is the prompt. Each later run of user and system messages begins a user
  turn; calls keep theirs.
- Assistant messages in a row are one message: their words and calls, in order. Calls of one message stay one turn.
- What an assistant thinks or says with a call is its reasoning. A call without a word gets the annotator's
  (:func:`as_trace`).
- An assistant message without a call closes a user turn. It is context, never taught, and its thought is left out. One
  that says nothing doesn't count.
- A trace ends with its last call. What the assistant says next is the answer, no part of the trace.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pact_nemo.environments.base import ToolCall
from pact_nemo.environments.own.fields import check_mapped, one_of_both
from pact_nemo.environments.python_tools import tool_schemas
from pact_nemo.environments.rows import Row, read_rows
from pact_nemo.errors import ConfigError, DataError
from pact_nemo.runtime.quarantine import Quarantine
from pact_nemo.traces.annotate import Context, Style, annotate_turn
from pact_nemo.traces.chat_keys import system_beside
from pact_nemo.traces.chat_messages import ConversationError, Place, read_message
from pact_nemo.traces.conversation_turns import Assembly, Words
from pact_nemo.traces.other_formats import other_format
from pact_nemo.traces.schema import Trace, TraceTurn

FIELDS = ("messages", "tools", "task_id", "reward", "info")  #: of a row, by our names
#: why a sound conversation is dropped
NOTHING_TO_LEARN = ("no_user_message", "no_call", "nothing_before_assistant")
SOURCE = "conversation"  #: of their traces
Schema = dict[str, Any]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Conversation:
    """A conversation in which an assistant calls tools, names as its row has them.

    Attributes:
        file: where it stands.
        line: its line or row, from 1.
        opening: system and user messages before the first assistant message.
        later: system and user messages of each further user turn, those behind the last call included.
        turns: the trace's turns, up to the last call. A turn that calls without a word has no segments yet.
        answers: what the assistant says right after the last call, and at the end of each user turn behind it; empty
            texts where it says nothing.
        task_id: of the task that it solves; None where the row names none.
        tools: schemas that the row offers; None where it tells none.
        reward: that the row tells.
        info: what else the row tells of its task.
        places: per turn the field of each call, e.g. ``messages[6].tool_calls[0]``.
        messages: how many assistant messages there are.
        without_calls: how many of them make no call.
    """

    file: str
    line: int
    opening: Words
    later: tuple[Words, ...]
    turns: tuple[TraceTurn, ...]
    answers: tuple[str, ...]
    task_id: str | None = None
    tools: tuple[Schema, ...] | None = None
    reward: float | None = None
    info: dict[str, Any] = field(default_factory=dict)
    places: tuple[tuple[str, ...], ...] = ()
    messages: int = 0
    without_calls: int = 0

    @property
    def user_turns(self) -> tuple[Words, ...]:
        """Messages of the user turns that the trace reaches: those behind its last call are left out."""
        return (self.opening, *self.later[: self.turns[-1].user_turn])

    def first_turn(self) -> Conversation | None:
        """The conversation up to its second user turn; None without a call there."""
        turns = tuple(turn for turn in self.turns if turn.user_turn == 0)
        if not turns[-1].calls or len(turns) == len(self.turns):
            return self if turns[-1].calls else None
        last = replace(turns[-1], user_messages_after=(), new_tools_after=(), closing="")
        answers = (turns[-1].closing_message,)
        return replace(self, later=(), turns=(*turns[:-1], last), answers=answers, places=self.places[: len(turns)])


@dataclass
class ImportReport:
    """What became of the conversations of a file.

    Attributes:
        kept: conversations that were read.
        dropped: number of those that were not, by reason.
        calls: calls of those kept.
        calls_with_words: those of them that the assistant wrote words to.
        messages: assistant messages of those kept.
        without_calls: those of them that make no call.
    """

    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    calls: int = 0
    calls_with_words: int = 0
    messages: int = 0
    without_calls: int = 0

    def keep(self, conversation: Conversation) -> None:
        """Count a conversation that was read."""
        self.kept += 1
        self.messages += conversation.messages
        self.without_calls += conversation.without_calls
        for turn in conversation.turns:
            self.calls += len(turn.calls)
            self.calls_with_words += len(turn.calls) if turn.reasoning.strip() else 0

    @property
    def reasons(self) -> str:
        """The reasons for what was dropped, the commonest first."""
        return ", ".join(f"{reason} {count}" for reason, count in self.dropped.most_common())

    def __str__(self) -> str:
        dropped = sum(self.dropped.values())
        return "\n".join(
            [
                f"conversations: {self.kept} kept, {dropped} dropped{f' ({self.reasons})' if dropped else ''}",
                f"calls: {self.calls}, {_percent(self.calls_with_words, self.calls)} with the assistant's own words;"
                " the others get annotated reasoning",
                f"assistant messages: {self.messages}, {_percent(self.without_calls, self.messages)} without a call;"
                " they are context and are not taught",
            ]
        )


def _percent(part: int, whole: int) -> str:
    return f"{part} ({100 * part / whole:.0f} %)" if whole else "0"


def read_conversations(
    path: str | Path,
    quarantine: Quarantine | None = None,
    fields: Mapping[str, str] | None = None,
    report: ImportReport | None = None,
) -> list[Conversation]:
    """The conversations of a ``.jsonl``, ``.json`` or ``.parquet`` file, in order.

    Sound conversations that hold nothing to learn are dropped and counted: without a call, without a user's message, or
    with nothing before the first assistant message.

    Args:
        path: the file.
        quarantine: takes rows that can't be read; None: the first one is refused.
        fields: our name of a field -> its name in the file, e.g. ``{"messages": "traj"}``.
        report: counts what became of the rows.

    Raises:
        ConfigError: ``fields`` maps a field that no row has.
        DataError: no such file, one that can't be parted into rows, a refused row, or no row that can be used; names
            file, line and field.
    """
    unknown = sorted(set(fields or {}) - set(FIELDS))
    if unknown:
        raise ConfigError(f"a conversation has no field {unknown[0]!r}; known: {', '.join(FIELDS)}")
    if not Path(path).is_file():
        raise DataError("no such file of conversations; give the path of the exported one", file=str(path))
    report = report if report is not None else ImportReport()
    quarantine = quarantine if quarantine is not None else Quarantine()
    before = len(quarantine)
    rows = read_rows(path, quarantine)
    if len(quarantine) > before:
        report.dropped["unreadable_row"] += len(quarantine) - before
    check_mapped(rows, fields or {}, "traces.fields", FIELDS[:1])
    kept = []
    for row in rows:
        made = quarantine.parse(lambda: _conversation(row, fields or {}), row.values)  # noqa: B023 - called at once
        if isinstance(made, Conversation):
            kept.append(made)
            report.keep(made)
        else:
            report.dropped[made or _reason(quarantine.rows[-1].error)] += 1
    if not kept:
        first = f"; the first: {quarantine.rows[before].error}" if len(quarantine) > before else ""
        reasons = (
            f"no row can be imported ({report.reasons})"
            if report.dropped
            else "the file is empty: it has no conversation"
        )
        raise DataError(
            f"{reasons}; give a file of chats in OpenAI's format in which tools are called{first}", file=str(path)
        )
    if report.dropped:
        log.warning("%s: conversations left out: %s", path, report.reasons)
    return kept


def _reason(error: DataError) -> str:
    """The short name of what is wrong with a row; of a fault that has none, by its field."""
    return error.reason if isinstance(error, ConversationError) else f"bad_{re.split(r'[.[]', error.field or 'row')[0]}"


def _conversation(row: Row, fields: Mapping[str, str]) -> Conversation | str:
    """The conversation of a row, or why it is dropped."""
    one_of_both(row, fields, "traces.fields")
    names = {**dict(zip(FIELDS, FIELDS, strict=True)), **fields}
    tools = _tools(row, names["tools"])
    place = Place(row.file, row.number, names["messages"])
    messages = [
        read_message(value, place.under(f"[{index}]"), tools)
        for index, value in enumerate(_messages(row, names["messages"], place))
    ]
    beside = system_beside(row.values, [message.text for message in messages if message.role == "system"])
    if beside is not None:
        message = f"{beside!r} stands beside the messages, which don't say it; make it the first, of role 'system'"
        raise ConversationError("system_beside", message, Place(row.file, row.number, beside))
    assembly = Assembly([tool["name"] for tool in tools or ()])
    assembly.take(messages)
    trace = assembly.builder.build("", SOURCE, True)
    if not any(message.role == "user" for message in messages):
        return "no_user_message"
    if trace is None:
        return "no_call"
    if not assembly.opening:
        return "nothing_before_assistant"
    spoken = [message for message in messages if message.role == "assistant"]
    return Conversation(
        row.file,
        row.number,
        assembly.opening,
        tuple(assembly.later),
        trace.turns,
        tuple(assembly.closings.get(turn, "") for turn in range(trace.turns[-1].user_turn, len(assembly.later) + 1)),
        task_id=None if row.values.get(names["task_id"]) is None else row.text(names["task_id"]),
        tools=tools,
        reward=_reward(row, names["reward"]),
        info={} if row.values.get(names["info"]) is None else row.json(names["info"], dict),
        places=tuple(assembly.places[: len(trace.turns)]),
        messages=len(spoken),
        without_calls=sum(not message.calls for message in spoken),
    )


def _messages(row: Row, name: str, place: Place) -> list[Any]:
    if row.values.get(name) is None:
        found = other_format(row.values)
        hint = f"this is {found}" if found else f"the row has {', '.join(row.values) or 'no fields'}"
        raise ConversationError("no_messages", f"no {name!r} here: {hint}; map the field that holds the chat", place)
    messages: list[Any] = row.json(name, list)
    if not any(isinstance(message, Mapping) and "role" in message for message in messages):
        raise ConversationError(
            "other_format", f"this is {other_format(messages) or 'no chat'}, not one in OpenAI's format", place
        )
    return messages


def _tools(row: Row, name: str) -> tuple[Schema, ...] | None:
    """The schemas that a row offers, under ``tools`` or the older ``functions``; None without any."""
    name = name if row.values.get(name) is not None else "functions"
    if row.values.get(name) is None:
        return None
    offered = row.json(name, list)
    fields = [(f"{name}[{index}]", tool) for index, tool in enumerate(offered)]
    return tuple(tool_schemas(row, fields, names=False)) or None  # the environment shows them under its own names


def _reward(row: Row, name: str) -> float | None:
    value = row.values.get(name)
    if value is None or isinstance(value, int | float):
        return None if value is None else float(value)
    raise row.complain(f"expected a number, found {value!r:.60}", name)


def as_trace(
    conversation: Conversation,
    task_id: str,
    verified: bool,
    rename: Callable[[ToolCall], ToolCall] | None = None,
    tools: Sequence[Schema] = (),
    style: Style = "full",
) -> Trace:
    """The trace of a conversation; calls without a word get the annotator's reasoning.

    Args:
        conversation: what to make it of.
        task_id: of the task that it solves.
        verified: whether it is known to solve it.
        rename: gives a call the names that the task has for it. Of tools that the row offers it is asked without
            arguments.
        tools: the task's schemas, by the names that the task has; empty: the row's own. Of a called tool without a
            schema the annotator knows the call alone.
        style: of the annotator; ``compact`` where no schema is known, because ``full`` speaks of what is offered.
    """
    rename = rename or (lambda call: call)
    own = {rename(ToolCall(tool["name"])).name: tool for tool in conversation.tools or ()}
    offered = list(tools or [{**tool, "name": name} for name, tool in own.items()])
    known = {tool["name"] for tool in offered}
    turns = [replace(turn, calls=tuple(map(rename, turn.calls))) for turn in conversation.turns]
    seen: list[str] = []
    earlier, words, first = "", _words(conversation.opening), True
    for index, turn in enumerate(turns):
        if turn.calls and not turn.reasoning.strip():
            later = [other for other in turns[index + 1 :] if other.user_turn == turn.user_turn]
            needed = frozenset(call.name for other in later for call in other.calls)
            bare = [
                {**own.get(call.name, _bare(call)), "name": call.name} for call in turn.calls if call.name not in known
            ]
            context = Context([*offered, *bare], words, earlier, tuple(seen), first, needed)
            segments = annotate_turn(turn.calls, context, style if offered else "compact")
            turns[index] = replace(turn, segments=segments)
        seen += turn.observations
        first = bool(turn.user_messages_after)
        if first:
            earlier, words = f"{earlier}\n{words}", _words(turn.user_messages_after)
    return Trace(task_id, SOURCE, tuple(turns), verified)


def _words(messages: Words) -> str:
    return "\n".join(message["content"] for message in messages if message["role"] == "user")


def _bare(call: ToolCall) -> Schema:
    """A schema of a called tool of which only the call is known."""
    properties: dict[str, Any] = {key: {} for key in call.arguments}
    return {
        "name": call.name,
        "description": "",
        "parameters": {"type": "object", "properties": properties, "required": list(properties)},
    }
