"""Assistant messages to calls: one reader for each way to write them. Nothing here raises on what a policy wrote.

What the readers share:

- Calls within a thought are neither made nor malformed (:mod:`pact_nemo.chat.thoughts`); thought markers within a
  call's arguments are data.
- A call is made with exactly the arguments that were written, or it is an error that the policy sees
  (:mod:`pact_nemo.chat.json_calls`).
- A call in another format's dress is an error that shows the own format, not a final answer (:func:`foreign_attempt`).
- The time is linear in the message's length. What fails over and over ends the reading after a fixed number of
  failures.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from json import JSONDecodeError
from typing import Any

from pact_nemo.chat.json_calls import (
    Tools,
    calls_from,
    calls_offered,
    decode,
    is_attempt,
    looks_like_attempt,
    skip_fence,
)
from pact_nemo.chat.thoughts import CLOSING, MARKER, OPENING, VisibleText, WasThought, visible_text
from pact_nemo.environments.base import ToolCall
from pact_nemo.environments.calls import parse_call, parse_call_list
from pact_nemo.errors import ToolCallError

TOOL_CALL_OPENING, TOOL_CALL_CLOSING = "<tool_call>", "</tool_call>"
PYTHON_TAG = "<|python_tag|>"
MAX_ERRORS = 50  #: malformed calls of one message after which no more of it is read
_MAX_BROKEN = 200  # places of one message that look like JSON and are none

_LINE = rf"(?:^|(?<={CLOSING}))[ \t]*"  # a line's start; what follows a thought begins one
_LINE_OF_JSON = _LINE + r"(?:```[\w-]*[ \t]*\n[ \t]*)?[\[{]"
_HERMES = re.compile(f"{MARKER}|{TOOL_CALL_OPENING}")
# Where reading goes on after a block that can't be read. JSON escapes quotes and line ends in its texts, so neither
# form is within an argument.
_AFTER_BROKEN = re.compile(
    rf'{MARKER}|{TOOL_CALL_CLOSING}|^[ \t]*(?={TOOL_CALL_OPENING})|(?={TOOL_CALL_OPENING}\s{{0,40}}\{{\s{{0,40}}")',
    re.MULTILINE,
)
_LLAMA = re.compile(rf"{MARKER}|{re.escape(PYTHON_TAG)}|{_LINE_OF_JSON}", re.MULTILINE)
_LLAMA_NEXT = re.compile(rf"{MARKER}|{re.escape(PYTHON_TAG)}|```[\w-]*|[^\s;]")
_PYTHONIC = re.compile(rf"{MARKER}|{_LINE}\[\s*[A-Za-z_][\w.\-]*\s*\(", re.MULTILINE)
_NOT_BLANK = re.compile(rf"{MARKER}|\S")
_QUOTE_OR_MARKER = re.compile(rf"{MARKER}|\'\'\'|\"\"\"|'|\"")
_QUOTED = {  # the rest of a Python string literal, by its opening quote
    "'": re.compile(r"(?:[^'\\\n]|\\.)*+'", re.DOTALL),
    '"': re.compile(r'(?:[^"\\\n]|\\.)*+"', re.DOTALL),
    "'''": re.compile(r"(?:[^'\\]|\\.|'(?!''))*+\'\'\'", re.DOTALL),
    '"""': re.compile(r'(?:[^"\\]|\\.|"(?!""))*+"""', re.DOTALL),
}
_FOREIGN_TAG = re.compile(
    rf"{MARKER}|<(?:tool_call|function_call)>(?=\s{{0,40}}[\[{{])|\[TOOL_CALLS\]|<｜tool▁calls?▁begin｜>|{re.escape(PYTHON_TAG)}"
    rf"|<function=([\w.\-]{{1,200}})|<invoke name=[\"']?([\w.\-]{{1,200}})"
    rf"|{_LINE}\[\s{{0,40}}([A-Za-z_][\w.\-]{{0,200}})\s{{0,40}}\(|{_LINE}Action:[ \t]*([\w.\-]{{1,200}})[ \t]*$",
    re.MULTILINE,
)
_FOREIGN_JSON = re.compile(rf"{MARKER}|{_LINE_OF_JSON}", re.MULTILINE)
_INLINE_JSON = re.compile(rf'{MARKER}|(?:\[\s{{0,40}})?\{{\s{{0,40}}"')
_INLINE_END = re.compile(r"(?:[\s`\];.]|</?[A-Za-z_]{1,40}>){0,40}\Z")
_BARE_CALL = re.compile(r"(?:[A-Za-z_]\w{0,200} ?= ?)?(?:print\()?(([A-Za-z_]\w{0,200})\(.*?\))\)?")


@dataclass(frozen=True)
class ParsedTurn:
    """What an assistant message says.

    Attributes:
        reasoning: text before the calls (the whole message when there is none) as it was written, thoughts included,
            outer whitespace removed.
        calls: well-formed calls in order.
        errors: one message per malformed call text. With neither calls nor errors the message is a final answer.
    """

    reasoning: str
    calls: list[ToolCall] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


class _Reading(VisibleText):
    """A walk over a message and what was read so far."""

    def __init__(self, text: str, in_thought: bool = False, first: int = 0):
        super().__init__(text, in_thought)
        self.position = max(self.position, first)
        self.calls: list[ToolCall] = []
        self.errors: list[str] = []
        self.start = -1  # of the first call text
        self.first = self.position  # what is visible begins here

    def run(self, reader: Callable[[_Reading, Tools], None], tools: Tools) -> ParsedTurn:
        """Read everything that is visible; anew where a marker shows that all of it was thought."""
        while True:
            try:
                reader(self, tools)
                self.search()  # past the rest: it may hold such a marker
                break
            except WasThought:
                self.calls, self.errors, self.start, self.first = [], [], -1, self.position
        return ParsedTurn((self.text if self.start < 0 else self.text[: self.start]).strip(), self.calls, self.errors)

    def fail(self, message: str, start: int) -> None:
        """Note a malformed call whose text begins at ``start``."""
        self.errors.append(message)
        if self.start < 0:
            self.start = start


def _names(tools: Tools) -> frozenset[str]:
    return frozenset(tool["name"] for tool in tools)


def _parameters(tools: Tools) -> dict[str, list[str]]:
    """Argument names of each tool in schema order, by tool name."""
    return {tool["name"]: list(tool["parameters"].get("properties", {})) for tool in tools}


def parse(
    text: str, tools: Tools, in_thought: bool, reader: Callable[[_Reading, Tools], None], example: str
) -> ParsedTurn:
    """What an assistant message says.

    Args:
        text: the message as the policy wrote it.
        tools: that are offered.
        in_thought: the generation prompt has opened a thought, so the message begins inside it.
        reader: one of this module's.
        example: a call as the format writes it, shown where one is written in another way.
    """
    reading = _Reading(text, in_thought)
    turn = reading.run(reader, tools)
    if turn.calls or turn.errors:
        return turn
    start = foreign_attempt(text, tools, reading.first)
    return turn if start is None else ParsedTurn(text[:start].strip(), [], [f"a call is written as {example}"])


# -- Hermes
# ----------------------------------------------------------------------------------------------------------------------


def read_hermes(reading: _Reading, tools: Tools) -> None:
    """``<tool_call>`` blocks anywhere in the visible text."""
    while len(reading.errors) < MAX_ERRORS and (match := reading.search(_HERMES)) is not None:
        text, start = reading.text, match.start()
        try:
            # the JSON decoder, not a search, finds the end: an argument may contain the closing tag
            value, end = decode(text, skip_fence(text, match.end()))
            end = skip_fence(text, end)
            if not text.startswith(TOOL_CALL_CLOSING, end):
                raise ToolCallError(f"{TOOL_CALL_CLOSING} is missing after the call")
        except ToolCallError as error:
            reading.fail(str(error), start)
            after = _AFTER_BROKEN.search(text, match.end())
            if after is None:
                reading.position = len(text)  # without a closing tag nothing that follows can be whole
            else:
                reading.position = after.end() if after.group() == TOOL_CALL_CLOSING else after.start()
            continue
        reading.position = end + len(TOOL_CALL_CLOSING)
        try:
            reading.calls += calls_from(value, tools)
            reading.start = start if reading.start < 0 else reading.start
        except ToolCallError as error:
            reading.fail(str(error), start)


# -- Llama 3
# ----------------------------------------------------------------------------------------------------------------------


def read_llama3_json(reading: _Reading, tools: Tools) -> None:
    """JSON objects from the start of a line to the end of the message; JSON that is no call is passed over."""
    found = _json_attempt(reading, _LLAMA, _names(tools))
    if found is None:
        return
    start, value, end = found
    if end is None:
        reading.fail(value, start)
        return
    reading.start = start
    try:
        reading.calls += calls_from(value, tools)
        reading.position = end
        while (match := reading.search(_LLAMA_NEXT)) is not None:
            if match.group() == PYTHON_TAG or match.group().startswith("```"):
                continue
            if match.group() not in ("{", "["):
                raise ToolCallError("there is text after the calls")
            value, reading.position = decode(reading.text, match.start())
            reading.calls += calls_from(value, tools)
    except ToolCallError as error:
        reading.fail(str(error), start)


def _json_attempt(
    reading: _Reading, pattern: re.Pattern[str], names: frozenset[str]
) -> tuple[int, Any, int | None] | None:
    """The first JSON value at a match of ``pattern`` that is meant as a call: (start of its line, value, end).

    Where it can't be read: (start, what is wrong, None). A match that ends in no bracket is a mark of calls: what
    follows it has to be one.
    """
    broken = 0
    while (match := reading.search(pattern)) is not None:
        marked = match.group()[-1] not in "[{"
        position = skip_fence(reading.text, match.end()) if marked else match.end() - 1
        try:
            value, end = decode(reading.text, position)
        except ToolCallError as error:
            broken += 1
            if marked or broken > _MAX_BROKEN or looks_like_attempt(reading.text, position, names):
                return match.start(), str(error), None
            reading.position = _after_broken(error, position)
            continue
        if marked or is_attempt(value, names):
            return match.start(), value, end
        reading.position = end
    return None


def _after_broken(error: ToolCallError, position: int) -> int:
    """Where to look on behind JSON at ``position`` that can't be read: a value within what the decoder has read before
    it gave up is a part of these data, or breaks at the same place.
    """
    cause = error.__cause__
    return max(cause.pos if isinstance(cause, JSONDecodeError) else 0, position + 1)


# -- Python call text
# -----------------------------------------------------------------------------------------------------------------


def read_pythonic(reading: _Reading, tools: Tools) -> None:
    """``[f(a=1), g()]`` from the start of a line to the end of the message."""
    match = reading.search(_PYTHONIC)
    if match is None:
        return
    reading.start, text = match.start(), reading.text
    end = _first_marker(text, match.start())
    written = text[match.start() : end].rstrip()
    if written.endswith("```"):  # the code block that the calls stand in
        written = written[:-3]
    try:
        calls = parse_call_list(written, _parameters(tools))
    except ToolCallError as error:
        reading.fail(str(error), match.start())
        return
    reading.calls, reading.position = calls, end
    if reading.search(_NOT_BLANK) is not None:
        reading.calls = []
        reading.fail("there is text after the calls", match.start())


def _first_marker(text: str, position: int) -> int:
    """Where the first thought marker outside of quotes stands, from ``position`` on; the text's length where there is
    none.
    """
    while (match := _QUOTE_OR_MARKER.search(text, position)) is not None:
        quote = match.group()
        if quote in (OPENING, CLOSING):
            return match.start()
        closed = _QUOTED[quote].match(text, match.end())
        if closed is None:
            break  # never closed: no call, whatever follows
        position = closed.end()
    return len(text)


# -- calls in another format's dress
# --------------------------------------------------------------------------------------------------


def foreign_attempt(text: str, tools: Tools, first: int = 0) -> int | None:
    """Where a message without a call of its own format begins to call a tool in another way; None where it doesn't: it
    is an answer then.

    Ways: a JSON call at the start of a line, and one of an offered tool that ends the message; ``<tool_call>`` with
    JSON, ``<function=name>``, ``<invoke name=...>``, the tags of Llama, Mistral and DeepSeek, ``[name(...)]`` at the
    start of a line, ``name(...)`` as the last line, and ``Action: name``. A bare name counts for offered tools only.

    Args:
        first: what is visible begins here.
    """
    names = _names(tools)
    for find in (_foreign_tag, _foreign_json, _inline_json):
        reading = _Reading(text, first=first)
        while True:
            try:
                start = find(reading, names)
                break
            except WasThought:  # a marker within data, which the format's own reader has passed over
                continue
        if start is not None:
            return start
    line = visible_text(text[first:]).rstrip("`\r\n\t ").rpartition("\n")[2].strip("` \t")
    bare = _BARE_CALL.fullmatch(line)
    if bare is None or bare.group(2) not in names:
        return None
    try:
        parse_call(bare.group(1), _parameters(tools))
    except ToolCallError:
        return None
    return max(text.rfind(line), 0)


def _foreign_tag(reading: _Reading, names: frozenset[str]) -> int | None:
    while (match := reading.search(_FOREIGN_TAG)) is not None:
        if match.lastindex is None or match.group(match.lastindex) in names:
            return match.start()
    return None


def _inline_json(reading: _Reading, names: frozenset[str]) -> int | None:
    """Within a line JSON is mostly data, so only that counts which says an offered tool's name and arguments, and ends
    the message.
    """
    broken = 0
    while broken < _MAX_BROKEN and (match := reading.search(_INLINE_JSON)) is not None:
        try:
            value, end = decode(reading.text, match.start())
        except ToolCallError as error:
            broken += 1
            reading.position = _after_broken(error, match.start())
            continue
        if calls_offered(value, names) and _INLINE_END.match(reading.text, end):
            return match.start()
        reading.position = end
    return None


def _foreign_json(reading: _Reading, names: frozenset[str]) -> int | None:
    found = _json_attempt(reading, _FOREIGN_JSON, names)
    return None if found is None else found[0]
