"""The keys of a chat message in OpenAI's format: which are read, which are only about it, and what others may mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pact_nemo.chat.probing import THOUGHT_FIELDS

THOUGHTS = THOUGHT_FIELDS  #: texts of an assistant's thought: where chat templates look for it
THOUGHT_LISTS = ("reasoning_details", "thinking_blocks")  #: its parts, as OpenRouter and LiteLLM write them
CALL_IDS = ("call_id", "tool_call_id", "id")  #: of a call: the one that a result names comes first
RESULT_IDS = ("tool_call_id", "call_id")  #: of the call that a result answers
RESULT_TOOLS = ("name", "tool_name")  #: of the tool that a result is from

_READ = {
    "system": {"role", "content"},
    "user": {"role", "content"},
    "assistant": {"role", "content", "refusal", "weight", "tool_calls", "function_call", *THOUGHTS, *THOUGHT_LISTS},
    "tool": {"role", "content", "id", *RESULT_IDS, *RESULT_TOOLS},
}
#: what APIs and tools write about a message, and no model is shown
_ABOUT = set(
    "id name index status metadata response_metadata usage usage_metadata model finish_reason stop_reason logprobs"
    " timestamp created created_at createdAt updated_at updatedAt date time cost latency turn_idx cache_control".split()
)
_FLAGS = ("is_error", "error")  # true or false; a text there would be a result
_COPIES = {"assistant": {"parsed"}}  # of the content
_MEANT = {
    "content": ("text", "parts", "value", "output", "result", "response", "message"),
    "tool_calls": ("tool_call", "toolCalls", "toolCall", "toolInvocations", "calls", "functionCall", "function_calls"),
    "tool_call_id": ("toolCallId", "tool_use_id", "callId"),
    "reasoning_content": ("thought", "thoughts", "reasoning_text", "reasoningContent"),
}
_NO_TEXT = ("images", "image", "audio", "video", "videos", "files", "attachments")
_SYSTEM = ("system", "system_prompt", "system_message")  # of a row


def is_empty(value: Any) -> bool:
    """Whether nothing is written: null, an empty text, or lists and objects of such."""
    if isinstance(value, Mapping):
        return all(map(is_empty, value.values()))
    return all(map(is_empty, value)) if isinstance(value, list) else value is None or value == ""


def unread_key(message: Mapping[str, Any], role: str) -> tuple[str, str] | None:
    """(the first key of a message that says something and isn't read, what to do about it); None without one."""
    for key, value in message.items():
        if key in _READ[role] or key in _ABOUT or key in _COPIES.get(role, ()) or is_empty(value):
            continue
        if key == "type" and value == "message" or key in _FLAGS and isinstance(value, bool):
            continue
        meant = next((ours for ours, others in _MEANT.items() if key in others), None)
        if meant is not None:
            remedy = f"write it as {meant!r}"
        else:
            remedy = "only text is read" if key in _NO_TEXT else "take it out, or write what it says in 'content'"
        return key, f"the key {key!r} isn't read of a message of role {role!r}, and holds something; {remedy}"
    return None


def system_beside(row: Mapping[str, Any], said: list[str]) -> str | None:
    """The key of a system message that stands beside a row's messages; None where they say it, or there is none.

    Args:
        row: the whole row.
        said: texts of the system messages among its messages.
    """
    known = [text.strip() for text in said]
    found = ((key, row.get(key)) for key in _SYSTEM)
    return next(
        (
            key
            for key, value in found
            if not is_empty(value) and not (isinstance(value, str) and (not value.strip() or value.strip() in known))
        ),
        None,
    )
