"""What an expert trace is, in memory and as JSON lines. A trace holds no final answer: its last turn is a tool turn."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from pact_nemo.environments.base import ToolCall, check_schema
from pact_nemo.errors import DataError
from pact_nemo.runtime import strict_json
from pact_nemo.runtime.files import write_text_atomic
from pact_nemo.runtime.quarantine import Quarantine
from pact_nemo.traces.other_formats import OPENAI, WANTED, other_format, refuse_other_format
from pact_nemo.traces.segments import PREVIEW, SEGMENT_TYPES, prefix_levels, preview_start

TRACE_VERSION = 1
CLOSING = "Done."  #: what closes a user turn of a trace that tells no closing message


@dataclass(frozen=True)
class ReasoningSegment:
    """A typed piece of reasoning. ``text`` is exact: white space that parts it from the segment before it is its
    own.
    """

    type: str
    text: str


@dataclass(frozen=True)
class TraceTurn:
    """One assistant turn (u*_t, a*_t, o*_t) of the expert and what the user says after it.

    Attributes:
        segments: the reasoning; its text is their concatenation.
        calls: calls of this turn. Empty only where the expert makes no call in a whole user turn, and another user turn
            follows.
        observations: one per call.
        user_turn: index of the user turn that this turn belongs to.
        user_messages_after: chat messages of the user turns that begin after this turn.
        new_tools_after: schemas revealed with them.
        closing: the assistant message that closes the user turn before ``user_messages_after``, as one does at
            inference. It is context, never taught. Empty where no user turn follows. In a turn without calls it is the
            message (:attr:`said`), unless the turn has reasoning, which is the message then and is taught.
    """

    segments: tuple[ReasoningSegment, ...]
    calls: tuple[ToolCall, ...]
    observations: tuple[str, ...]
    user_turn: int = 0
    user_messages_after: tuple[dict[str, str], ...] = ()
    new_tools_after: tuple[dict[str, Any], ...] = ()
    closing: str = ""
    #: whether :attr:`said` is supervised: no field, and in no file (pact_nemo/traces/closings.py)
    taught: ClassVar[bool] = False

    @property
    def reasoning(self) -> str:
        """The reasoning text u*_t."""
        return "".join(segment.text for segment in self.segments)

    @property
    def closing_message(self) -> str:
        """What the assistant says after the observations before the user speaks again; empty where no message stands
        there. A turn without calls is that message itself."""
        return (self.closing or CLOSING) if self.calls and self.user_messages_after else ""

    @property
    def said(self) -> str:
        """The message of a turn that has neither calls nor reasoning: context, unless it is ``taught``."""
        return "" if self.calls or self.segments else self.closing

    @property
    def segment_levels(self) -> list[int]:
        """Lowest prefix level that contains each segment; -1 = none. A segment that writes one of the turn's calls down
        counts as a preview, whatever type it was given."""
        names = [call.name for call in self.calls]
        return prefix_levels(
            [PREVIEW if preview_start(segment.text, names) >= 0 else segment.type for segment in self.segments]
        )


@dataclass(frozen=True)
class Trace:
    """An expert trace h* without the final answer.

    Attributes:
        task_id: id of the task it solves.
        source: ``ground_truth``, ``teacher``, ``conversation`` or another maker's name.
        turns: at least one.
        verified: the benchmark's checker passed it.
        version: of this schema.
    """

    task_id: str
    source: str
    turns: tuple[TraceTurn, ...]
    verified: bool
    version: int = TRACE_VERSION

    @property
    def later_user_turns(self) -> tuple[tuple[dict[str, str], ...], ...]:
        """What the user says in each user turn after the request."""
        return tuple(turn.user_messages_after for turn in self.turns if turn.user_messages_after)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, the inverse of :meth:`from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, row: Any, *, file: str | None = None, line: int | None = None) -> Trace:
        """Check and build.

        Raises:
            DataError: names file, line and field of the first thing that is wrong.
        """
        return _Reader(file, line).trace(row)


class _Reader:
    def __init__(self, file: str | None, line: int | None):
        self._file, self._line = file, line

    def _fail(self, message: str, field: str) -> DataError:
        return DataError(
            f"{message}; make that trace anew or take the line out", file=self._file, line=self._line, field=field
        )

    def _get(self, row: Any, key: str, kind: type, where: str) -> Any:
        path = f"{where}.{key}" if where else key
        if not isinstance(row, Mapping):
            raise self._fail("expected an object", where)
        if key not in row:
            raise self._fail("missing", path)
        value = row[key]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self._fail(f"expected {getattr(kind, '__name__', 'list')}, found {type(value).__name__}", path)
        return value

    def _known(self, row: Mapping[str, Any], allowed: set[str], where: str) -> None:
        unknown = sorted(str(key) for key in set(row) - allowed)
        if unknown:
            raise self._fail(f"unknown keys {unknown}; known: {sorted(allowed)}", where or "(row)")

    def trace(self, row: Any) -> Trace:
        found = other_format(row)
        if found is not None:
            raise DataError(f"this is {found}, not a trace: {WANTED}", file=self._file, line=self._line)
        version = self._get(row, "version", int, "")
        if version != TRACE_VERSION:
            raise self._fail(f"schema version {version} is not {TRACE_VERSION}", "version")
        self._known(row, {"version", "task_id", "source", "turns", "verified"}, "")
        turns = self._get(row, "turns", list | tuple, "")  # type: ignore[arg-type]
        if not turns:
            raise self._fail("a trace needs at least one turn", "turns")
        built = tuple(
            self._turn(turn, f"turns[{index}]", last=index == len(turns) - 1) for index, turn in enumerate(turns)
        )
        self._check_order(built)
        return Trace(
            task_id=self._get(row, "task_id", str, ""),
            source=self._get(row, "source", str, ""),
            turns=built,
            verified=self._get(row, "verified", bool, ""),
        )

    def _check_order(self, turns: Sequence[TraceTurn]) -> None:
        """User turns count from 0, each begins with its messages, and nothing that is written down is passed over."""
        expected = 0
        for index, turn in enumerate(turns):
            where = f"turns[{index}]"
            if turn.user_turn != expected:
                raise self._fail(
                    f"expected {expected}: user turns count from 0 and go on behind user_messages_after",
                    f"{where}.user_turn",
                )
            expected += bool(turn.user_messages_after)
            if turn.user_messages_after and index == len(turns) - 1:
                raise self._fail(
                    "no turn answers the user: a trace ends with its last call", f"{where}.user_messages_after"
                )
            if turn.new_tools_after and not turn.user_messages_after:
                raise self._fail("tools are revealed with a user's message only", f"{where}.new_tools_after")
            if turn.closing and not turn.user_messages_after:
                raise self._fail("a closing message stands before a user's message only", f"{where}.closing")

    def _turn(self, row: Any, where: str, last: bool) -> TraceTurn:
        segments = []
        for index, item in enumerate(self._get(row, "segments", list | tuple, where)):  # type: ignore[arg-type]
            path = f"{where}.segments[{index}]"
            kind = self._get(item, "type", str, path)
            if kind not in SEGMENT_TYPES:
                raise self._fail(f"unknown segment type {kind!r}; known: {sorted(SEGMENT_TYPES)}", f"{path}.type")
            segments.append(ReasoningSegment(kind, self._get(item, "text", str, path)))
            self._known(item, {"type", "text"}, path)
        calls = []
        for index, item in enumerate(self._get(row, "calls", list | tuple, where)):  # type: ignore[arg-type]
            path = f"{where}.calls[{index}]"
            calls.append(ToolCall(self._get(item, "name", str, path), dict(self._get(item, "arguments", dict, path))))
            self._known(item, {"name", "arguments"}, path)
        observations = self._get(row, "observations", list | tuple, where)  # type: ignore[arg-type]
        if len(observations) != len(calls) or not all(isinstance(text, str) for text in observations):
            raise self._fail(f"expected {len(calls)} texts, one per call", f"{where}.observations")
        self._known(
            row,
            {"segments", "calls", "observations", "user_turn", "user_messages_after", "new_tools_after", "closing"},
            where,
        )
        after = self._get(row, "user_messages_after", list | tuple, where)  # type: ignore[arg-type]
        for index, message in enumerate(after):
            self._get(message, "role", str, f"{where}.user_messages_after[{index}]")
            self._get(message, "content", str, f"{where}.user_messages_after[{index}]")
            self._known(message, {"role", "content"}, f"{where}.user_messages_after[{index}]")
            if message["role"] not in ("user", "system"):
                raise self._fail(
                    f"the user speaks as user, not as {message['role']!r}", f"{where}.user_messages_after[{index}].role"
                )
        if not calls and (last or not after):
            raise self._fail(
                "a turn without calls must be followed by a user turn: a trace holds no final answer", f"{where}.calls"
            )
        new_tools = self._get(row, "new_tools_after", list | tuple, where)  # type: ignore[arg-type]
        for index, tool in enumerate(new_tools):
            try:
                check_schema(tool)
            except ValueError as error:
                raise self._fail(str(error), f"{where}.new_tools_after[{index}]") from error
        return TraceTurn(
            segments=tuple(segments),
            calls=tuple(calls),
            observations=tuple(observations),
            user_turn=self._get(row, "user_turn", int, where),
            user_messages_after=tuple(after),
            new_tools_after=tuple(new_tools),
            closing=self._get(row, "closing", str, where) if "closing" in row else "",
        )


def write_traces(path: str | os.PathLike[str], traces: Iterable[Trace]) -> None:
    """One JSON object a line, written atomically."""
    lines = [json.dumps(trace.to_dict(), ensure_ascii=False, allow_nan=False) for trace in traces]
    write_text_atomic(path, "".join(f"{line}\n" for line in lines))


def read_traces(path: str | os.PathLike[str], quarantine: Quarantine | None = None) -> list[Trace]:
    """Read what :func:`write_traces` wrote. A task's first trace is its main one, further ones are alternatives.

    Args:
        path: the file.
        quarantine: takes bad rows; None: the first one is refused.

    Raises:
        DataError: the file is missing or begins in another format, which is named; or a refused row is torn, is not a
            trace, or is there already; names file, line and field.
    """
    file, quarantine = os.fspath(path), quarantine if quarantine is not None else Quarantine()
    if not Path(file).is_file():
        raise DataError("no such trace file; make it first (tools/make_traces.py)", file=file)
    traces: list[Trace] = []
    seen: dict[str, int] = {}
    lines = Path(file).read_bytes().split(b"\n")  # as bytes: one line that isn't UTF-8 is one bad row
    refuse_other_format(lines, file)
    for line, text in enumerate(lines, start=1):
        if text.strip():
            trace = quarantine.parse(lambda: _read(text, file, line, seen), text.decode("utf-8", "backslashreplace"))  # noqa: B023 - called at once
            if trace is not None:
                traces.append(trace)
    return traces


def is_trace_file(path: str | os.PathLike[str]) -> bool:
    """Whether the first row of a file is a trace by its keys, or is nothing that is known: :func:`read_traces` is to
    read it, or to say what is wrong. False: a file of chat messages, in JSON lines, a JSON list or parquet; or an
    empty one, which the reader of conversations refuses.
    """
    if Path(path).suffix == ".parquet":
        return False
    data = Path(path).read_bytes()
    try:
        refuse_other_format(data.split(b"\n"), os.fspath(path))
    except DataError as error:
        return OPENAI not in str(error)
    return bool(data.strip())


def _read(text: bytes, file: str, line: int, seen: dict[str, int]) -> Trace:
    remedy = "make that trace anew or take the line out"
    try:
        row = strict_json.loads(text.decode("utf-8"), unique=True)
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8: {error}; {remedy}", file=file, line=line) from error
    except ValueError as error:
        raise DataError(f"not a JSON line: {error}; {remedy}", file=file, line=line) from error
    trace = Trace.from_dict(row, file=file, line=line)
    written = json.dumps(trace.to_dict())
    if written in seen:
        raise DataError(
            f"{trace.task_id} has this very trace already, on line {seen[written]}; {remedy}",
            file=file,
            line=line,
            field="task_id",
        )
    seen[written] = line
    return trace
