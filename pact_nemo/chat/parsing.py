"""Assistant messages to calls: one reader for each way to write them. Nothing here raises on what a policy wrote.

What the readers share:

- Calls within a thought are neither made nor malformed (:mod:`pact_nemo.chat.thoughts`); thought markers within a
  call's arguments are data.
- A call is made with exactly the arguments that were written, or it is an error that the policy sees
  (:mod:`pact_nemo.chat.json_calls`).
- A call in another format's dress is an error that shows the own format, not a final answer
  (:mod:`pact_nemo.chat.foreign_calls`).
- The time is linear in the message's length. What fails over and over ends the reading after a fixed number of
  failures.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from pact_nemo.chat.foreign_calls import PYTHON_TAG, foreign_attempt
from pact_nemo.chat.json_calls import (
    LINE,
    LINE_OF_JSON,
    Tools,
    calls_from,
    decode,
    json_attempt,
    parameter_names,
    skip_fence,
)
from pact_nemo.chat.thoughts import CLOSING, MARKER, OPENING, VisibleText, WasThought
from pact_nemo.environments.base import ToolCall
from pact_nemo.environments.calls import parse_call_list
from pact_nemo.errors import ToolCallError

TOOL_CALL_OPENING, TOOL_CALL_CLOSING = "<tool_call>", "</tool_call>"
MAX_ERRORS = 50  #: malformed calls of one message after which no more of it is read

_HERMES = re.compile(f"{MARKER}|{TOOL_CALL_OPENING}")
# Where reading goes on after a block that can't be read. JSON escapes quotes and line ends in its texts, so neither
# form is within an argument.
_AFTER_BROKEN = re.compile(
    rf'{MARKER}|{TOOL_CALL_CLOSING}|^[ \t]*(?={TOOL_CALL_OPENING})|(?={TOOL_CALL_OPENING}\s{{0,40}}\{{\s{{0,40}}")',
    re.MULTILINE,
)
_LLAMA = re.compile(rf"{MARKER}|{re.escape(PYTHON_TAG)}|{LINE_OF_JSON}", re.MULTILINE)
_LLAMA_NEXT = re.compile(rf"{MARKER}|{re.escape(PYTHON_TAG)}|```[\w-]*|[^\s;]")
_PYTHONIC = re.compile(rf"{MARKER}|{LINE}\[\s*[A-Za-z_][\w.\-]*\s*\(", re.MULTILINE)
_NOT_BLANK = re.compile(rf"{MARKER}|\S")
_QUOTE_OR_MARKER = re.compile(rf"{MARKER}|\'\'\'|\"\"\"|'|\"")
_QUOTED = {  # the rest of a Python string literal, by its opening quote
    "'": re.compile(r"(?:[^'\\\n]|\\.)*+'", re.DOTALL),
    '"': re.compile(r'(?:[^"\\\n]|\\.)*+"', re.DOTALL),
    "'''": re.compile(r"(?:[^'\\]|\\.|'(?!''))*+\'\'\'", re.DOTALL),
    '"""': re.compile(r'(?:[^"\\]|\\.|"(?!""))*+"""', re.DOTALL),
}


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
    found = json_attempt(reading, _LLAMA, parameter_names(tools))
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
        calls = parse_call_list(written, parameter_names(tools))
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
