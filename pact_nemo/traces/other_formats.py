"""Which other format a row that was given as a trace is written in: so that a refusal can name it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pact_nemo.errors import DataError
from pact_nemo.runtime import strict_json

WANTED = (
    "a trace is one JSON object a line with version, task_id, source, verified and turns"
    " (docs/design/traces.md). As traces.path, recipes read conversations in OpenAI format, too: messages with role,"
    " content and tool_calls. Write yours in one of these two, or make traces of your tasks with tools/make_traces.py"
)
OPENAI = "a chat in OpenAI format"  #: which :mod:`pact_nemo.traces.conversations` reads
_ENVELOPES = ("body", "request", "response", "data", "sample", "example")
_RESPONSES = ("function_call", "function_call_output", "reasoning")  # item types of OpenAI's responses
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_SPACE = re.compile(r"\s*")
_MARKUP = ("<|im_start|>", "<|start_header_id|>", "<|start|>", "[INST]", "<｜User｜>", "<start_of_turn>")


def other_format(row: Any) -> str | None:
    """The name of the format of a row that is no trace; None where it is none that is known."""
    if isinstance(row, list):
        return _of_messages(row)
    if not isinstance(row, Mapping) or _is_trace(row):
        return None
    return (
        _of_values(row)
        or _of_keys(row)
        or next((found for key in _ENVELOPES if (found := other_format(row.get(key))) is not None), None)
    )


def _is_trace(row: Mapping[str, Any]) -> bool:
    turns = row.get("turns")
    return isinstance(turns, list) and all(
        isinstance(turn, Mapping) and "role" not in turn and "from" not in turn for turn in turns
    )


def _of_values(row: Mapping[str, Any]) -> str | None:
    """The format of a row with a list of chat messages, or with a whole chat as text."""
    for key, value in row.items():
        messages = _decoded(value)
        found = _of_messages(messages) if isinstance(messages, list) else None
        if found is not None:
            return f"{found} under {key!r}"
        if isinstance(value, str) and any(mark in value for mark in _MARKUP):
            return f"a rendered chat under {key!r}"
    return None


def _decoded(value: Any) -> Any:
    """A value, or what its JSON text says."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return strict_json.loads(value)
        except ValueError:
            return value
    return value


def _of_keys(row: Mapping[str, Any]) -> str | None:
    if isinstance(row.get("choices"), list):
        return "an answer of OpenAI's chat completions"
    if {"prompt_ids", "token_ids"} <= set(row):
        return "a rollout of a run (tools/make_traces.py --promote makes traces of a run's rollouts)"
    for pair in (("prompt", "completion"), ("prompt", "response"), ("instruction", "output"), ("question", "answer")):
        if set(pair) <= set(row):
            return f"a pair of {pair[0]} and {pair[1]}"
    return None


def _of_messages(messages: Sequence[Any]) -> str | None:
    """The format of a list of chat messages."""
    known = [message for message in messages if isinstance(message, Mapping)]
    if not known or len(known) < len(messages):
        return None
    if any("from" in message and "value" in message for message in known):
        return "a chat in ShareGPT format (from, value)"
    if any("parts" in message for message in known):
        return "a chat in Gemini format (contents of parts)"
    if any(message.get("type") in _RESPONSES for message in known):
        return "a chat in the format of OpenAI's responses (items such as function_call)"
    if not any("role" in message for message in known):
        return None
    blocks = [
        block
        for message in known
        if isinstance(message.get("content"), list)
        for block in message["content"]
        if isinstance(block, Mapping)
    ]
    if any(block.get("type") in ("tool_use", "tool_result", "thinking") for block in blocks):
        return "a chat in Anthropic format (content blocks tool_use and tool_result)"
    calls = any(message.get("tool_calls") or message.get("function_call") for message in known)
    return f"{OPENAI} (messages with role and content{' and tool_calls' if calls else ''})"


def refuse_other_format(lines: Sequence[bytes], file: str) -> None:
    """Refuse a file that isn't one of traces at all, under any policy for bad rows: its first row tells.

    Raises:
        DataError: names the format.
    """
    first, text = _first_line(lines)
    if text.startswith(b"PAR1"):
        raise DataError(f"this is a parquet file, not a file of traces: {WANTED}", file=file)
    if text.startswith(_UTF16):
        raise DataError("not UTF-8 but UTF-16: write the file as UTF-8", file=file)
    whole = b"\n".join(lines)
    row: Any = None
    for part in (text, whole):  # a row may be written over many lines
        try:
            row = strict_json.loads(part.decode("utf-8"))
            break
        except ValueError:  # also of what isn't UTF-8; said line by line
            continue
    if row is None and _begins_with_an_object(whole):
        raise DataError("not one object a line: an object goes over several lines, write it on one", file=file)
    if isinstance(row, list):
        found = other_format(row) or (other_format(row[0]) if row else None)
        raise DataError(
            f"this is one JSON list{f' ({found})' if found else ''}, not a trace a line: {WANTED}", file=file
        )
    found = other_format(row)
    if found is not None:
        raise DataError(f"this is {found}, not a trace: {WANTED}", file=file, line=first)
    key = _key_of_rows(row)
    if key is not None:
        raise DataError(
            f"this is one object that holds its rows under {key!r}: write the rows alone, one a line", file=file
        )


def refuse_as_conversations(path: str | os.PathLike[str]) -> None:
    """Say of a file that should have been one of conversations why it is none.

    Raises:
        DataError: always but for a file of conversations; names the format where it is known.
    """
    file = os.fspath(path)
    if not Path(file).is_file():
        raise DataError("no such file; give the path of conversations in OpenAI format", file=file)
    lines = Path(file).read_bytes().split(b"\n")
    refuse_other_format(lines, file)
    first, text = _first_line(lines)
    try:
        row = strict_json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8: {error}; write the file as UTF-8", file=file, line=first) from error
    except ValueError as error:
        raise DataError(f"not one object a line: {error}; repair the line", file=file, line=first) from error
    if isinstance(row, Mapping) and _is_trace(row):
        raise DataError("these are traces, and their tasks are missing: give tasks.path=tasks.jsonl, too", file=file)
    has = (
        f"a row with {', '.join(map(str, row)) or 'no key'}" if isinstance(row, Mapping) else "a row that is no object"
    )
    raise DataError(f"{has} is neither a chat in OpenAI format nor a trace: {WANTED}", file=file, line=first)


def _first_line(lines: Sequence[bytes]) -> tuple[int, bytes]:
    return next(((number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()), (0, b""))


def _begins_with_an_object(data: bytes) -> bool:
    """Whether a file that is no JSON begins with an object, which is more than a line."""
    try:
        text = data.decode("utf-8-sig")
        start = _SPACE.match(text)
        value, end = strict_json.decode_at(text, start.end() if start is not None else 0)
    except ValueError:
        return False
    return isinstance(value, dict) and "\n" in text[:end].strip()


def _key_of_rows(row: Any) -> str | None:
    """The key of an object under which a list of chats is."""
    if not isinstance(row, Mapping) or _is_trace(row):
        return None
    lists = ((key, value[0]) for key, value in row.items() if isinstance(value, list) and value)
    return next((str(key) for key, first in lists if isinstance(first, Mapping) and other_format(first)), None)
