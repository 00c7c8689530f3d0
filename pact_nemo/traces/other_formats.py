"""Which other format a row that was given as a trace is written in: so that a refusal can name it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pact_nemo.runtime import strict_json

WANTED = (
    "a trace is one JSON object a line with version, task_id, source, verified and turns"
    " (docs/design/traces.md). As traces.path, recipes read conversations in OpenAI format, too: messages with role,"
    " content and tool_calls. Write yours in one of these two, or make traces of your tasks with tools/make_traces.py"
)
OPENAI = "a chat in OpenAI format"  #: which :mod:`pact_nemo.traces.conversations` reads
_ENVELOPES = ("body", "request", "response", "data", "sample", "example")
_RESPONSES = ("function_call", "function_call_output", "reasoning")  # item types of OpenAI's responses
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
