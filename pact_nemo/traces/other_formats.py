"""Which other format a row that was given as a trace is written in: so that a refusal can name it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

WANTED = (
    "a trace is one JSON object a line with version, task_id, source, verified and turns (docs/traces.md). Nothing reads other formats yet, an "
    "importer is planned; until then make traces of your tasks with tools/make_traces.py, from ground truth, recorded answers or a teacher"
)


def other_format(row: Any) -> str | None:
    """The name of the format of a row that is no trace; None where it is none that is known."""
    if isinstance(row, list):
        return _of_messages(row)
    if not isinstance(row, Mapping) or "turns" in row or "version" in row:
        return None
    for key in ("messages", "conversations", "conversation", "chosen", "contents"):
        found = _of_messages(row[key]) if isinstance(row.get(key), list) else None
        if found is not None:
            return f"{found} under {key!r}"
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
    if not any("role" in message for message in known):
        return None
    blocks = [block for message in known if isinstance(message.get("content"), list) for block in message["content"] if isinstance(block, Mapping)]
    if any(block.get("type") in ("tool_use", "tool_result", "thinking") for block in blocks):
        return "a chat in Anthropic format (content blocks tool_use and tool_result)"
    calls = any(message.get("tool_calls") or message.get("function_call") for message in known)
    return f"a chat in OpenAI format (messages with role and content{' and tool_calls' if calls else ''})"
