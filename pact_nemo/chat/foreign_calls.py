"""Calls in the dress of another format than the policy's own: errors that it sees, and no final answers.

Plain answers stay answers, though they speak of brackets, JSON or tools: only that counts which no answer holds, or
which ends the message as a call of an offered tool.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping, Sequence

from pact_nemo.chat.json_calls import (
    LINE,
    LINE_OF_JSON,
    MAX_BROKEN,
    Tools,
    after_broken,
    calls_offered,
    decode,
    json_attempt,
    parameter_names,
)
from pact_nemo.chat.thoughts import MARKER, VisibleText, WasThought, visible_text
from pact_nemo.environments.calls import parse_call, parse_calls
from pact_nemo.errors import ToolCallError

Offered = Mapping[str, Sequence[str]]  #: argument names of each offered tool, by its name

PYTHON_TAG = "<|python_tag|>"
_MAX_LISTS = 10  # last places of a message where a list of calls may begin
_NAME = r"([A-Za-z_][\w.\-]{0,200})"
_FOREIGN_TAG = re.compile(
    rf"{MARKER}|<\|?(?:tool_calls?|function_call|functioncall)\|?>(?=\s{{0,40}}[\[{{])|\[TOOL_CALLS\]"
    rf"|<｜tool▁calls?▁begin｜>|{re.escape(PYTHON_TAG)}|<\|tool_calls?_(?:section_)?begin\|>|<start_function_call>"
    rf"|<function=([\w.\-]{{1,200}})|<invoke name=[\"']?([\w.\-]{{1,200}})|\bto=functions\.([\w.\-]{{1,200}})"
    rf"|<tool_code>\s{{0,40}}(?:print\()?{_NAME}\s{{0,40}}\("
    rf"|{LINE}\[[\s\[]{{0,40}}{_NAME}\s{{0,40}}\(|{LINE}Action:[ \t]*([\w.\-]{{1,200}})[ \t]*$",
    re.MULTILINE,
)
_FOREIGN_JSON = re.compile(rf"{MARKER}|{LINE_OF_JSON}", re.MULTILINE)
_INLINE_JSON = re.compile(rf'{MARKER}|(?:\[\s{{0,40}})?\{{\s{{0,40}}"')
_INLINE_END = re.compile(r"(?:[\s`\];.]|</?[A-Za-z_]{1,40}>){0,40}\Z")
_INLINE_LIST = re.compile(rf"{MARKER}|(?:\[|{LINE}\()\s{{0,40}}{_NAME}\s{{0,40}}\(", re.MULTILINE)
_BARE_CALL = re.compile(r"(?:[A-Za-z_]\w{0,200} ?= ?)?(?:print\()?(([A-Za-z_]\w{0,200})\(.*?\))\)?")


def foreign_attempt(text: str, tools: Tools, first: int = 0) -> int | None:
    """Where a message without a call of its own format begins to call a tool in another way; None where it doesn't: it
    is an answer then.

    Ways: a JSON call at the start of a line, and one of an offered tool that ends the message; ``<tool_call>`` and its
    like with JSON; ``<function=name>``, ``<invoke name=...>``, ``<tool_code>`` with ``name(...)``,
    ``to=functions.name``; the tags of Llama, Mistral, DeepSeek, Kimi and Gemma; ``[name(...)]`` at the start of a line
    or at the end of the message; ``(name(...), name(...))`` and ``name(...)`` as what the last line is; ``Action:
    name``. A bare name counts for offered tools only.

    Args:
        first: what is visible begins here.
    """
    offered = parameter_names(tools)
    for find in (_foreign_tag, _foreign_json, _inline_json, _inline_list):
        reading = VisibleText(text)
        reading.position = first
        while True:
            try:
                start = find(reading, offered)
                break
            except WasThought:  # a marker within data, which the format's own reader has passed over
                continue
        if start is not None:
            return start
    line = visible_text(text[first:]).rstrip("`\r\n\t ").rpartition("\n")[2].strip("` \t")
    bare = _BARE_CALL.fullmatch(line)
    if bare is None or bare.group(2) not in offered:
        return None
    try:
        parse_call(bare.group(1), offered)
    except ToolCallError:
        return None
    return max(text.rfind(line), 0)


def _foreign_tag(reading: VisibleText, offered: Offered) -> int | None:
    while (match := reading.search(_FOREIGN_TAG)) is not None:
        if match.lastindex is None or match.group(match.lastindex) in offered:
            return match.start()
    return None


def _inline_json(reading: VisibleText, offered: Offered) -> int | None:
    """Within a line JSON is mostly data, so only that counts which says an offered tool's name and arguments, and ends
    the message.
    """
    broken = 0
    while broken < MAX_BROKEN and (match := reading.search(_INLINE_JSON)) is not None:
        try:
            value, end = decode(reading.text, match.start())
        except ToolCallError as error:
            broken += 1
            reading.position = after_broken(error, match.start())
            continue
        if calls_offered(value, offered) and _INLINE_END.match(reading.text, end):
            return match.start()
        reading.position = end
    return None


def _foreign_json(reading: VisibleText, offered: Offered) -> int | None:
    found = json_attempt(reading, _FOREIGN_JSON, offered)
    return None if found is None else found[0]


def _inline_list(reading: VisibleText, offered: Offered) -> int | None:
    """A list of literal calls that ends the message, wherever it begins; in parentheses it has to begin a line and to
    hold several, because answers put a word in them.
    """
    starts: deque[int] = deque(maxlen=_MAX_LISTS)
    while (match := reading.search(_INLINE_LIST)) is not None:
        if match.group(1) in offered:
            starts.append(match.start())
    for start in starts:
        try:
            parse_calls(reading.text[start:].rstrip("` \t\r\n.;"), offered)
        except ToolCallError:
            continue
        return start
    return None
