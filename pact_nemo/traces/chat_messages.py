"""One message of a chat in OpenAI's format, as users export it: who speaks, what is said, thought and called.

Nothing that was written is dropped without a word: what can't be read is refused with file, line, field and remedy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pact_nemo.chat.json_calls import Tools, call_from
from pact_nemo.environments.base import ToolCall
from pact_nemo.errors import DataError, ToolCallError
from pact_nemo.rollouts.chat_episode import message_parts
from pact_nemo.runtime import strict_json
from pact_nemo.traces.chat_keys import (
    CALL_IDS,
    RESULT_IDS,
    RESULT_TOOLS,
    THOUGHT_LISTS,
    THOUGHTS,
    is_empty,
    unread_key,
)

_REMEDY = "repair the conversation or take the line out"
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
_TEXTS = ("text", "input_text", "output_text", "refusal", "summary_text", "reasoning_text")
_THOUGHT_TYPES = ("reasoning.text", "reasoning.summary", *THOUGHTS)
_THOUGHT_TEXTS = (*THOUGHTS, "text", "summary", "content")  # where a part that is a thought holds its words
_SEALED = ("reasoning.encrypted", "redacted_thinking")  # thoughts that nobody can read
_BESIDE_THOUGHT = ("type", "id", "index", "format", "status", "signature", "encrypted_content", "data")
_BLOCKS = ("tool_use", "tool_result")
_BESIDE = ("parsed_arguments", "strict")  #: what client libraries write beside the arguments
_BESIDE_CALL = ("extra_content", "provider_specific_fields", "thought_signature")  # and beside a call
_ENCODINGS = 3  # of arguments, one within the other, that are undone


class ConversationError(DataError):
    """A conversation that can't be imported.

    Args:
        reason: short name of the fault, by which reports count.
        message: what is wrong and what to do about it.
        place: where it stands.
    """

    def __init__(self, reason: str, message: str, place: Place):
        super().__init__(f"{message}; {_REMEDY}", file=place.file, line=place.line, field=place.field)
        self.reason = reason


@dataclass(frozen=True)
class Place:
    """A field of a row of a file."""

    file: str
    line: int
    field: str

    def under(self, part: str) -> Place:
        """The place of a part, e.g. ``content`` or ``[2]``."""
        return Place(self.file, self.line, f"{self.field}{part}" if part.startswith("[") else f"{self.field}.{part}")


@dataclass(frozen=True)
class Called:
    """A call of an assistant message: its id, where it has one, and its place."""

    call: ToolCall
    id: str | None
    place: Place


@dataclass(frozen=True)
class ChatMessage:
    """A message as this project takes it.

    Attributes:
        role: ``system``, ``user``, ``assistant`` or ``tool``.
        text: what it says aloud. Of an assistant's without outer white space and thoughts.
        place: where it stands.
        thought: an assistant's reasoning that isn't said aloud.
        calls: an assistant's calls.
        answers: id of the call that a tool's result answers.
        own_id: a result's own id, which may be the one of its call.
        tool: name of the tool that a result says it is from.
    """

    role: str
    text: str
    place: Place
    thought: str = ""
    calls: tuple[Called, ...] = ()
    answers: str | None = None
    own_id: str | None = None
    tool: str | None = None


def read_message(value: Any, place: Place, tools: Tools | None) -> ChatMessage:
    """A message of a chat in OpenAI's format.

    Args:
        value: the message.
        place: where it stands.
        tools: schemas that the conversation offers; None where it tells none.

    Raises:
        ConversationError: it is none, holds more than text or a key that isn't read, or a call of it can't be read.
    """
    if not isinstance(value, Mapping):
        raise ConversationError("bad_message", f"a message is an object, not {_kind(value)}", place)
    role = _ROLES.get(value["role"]) if isinstance(value.get("role"), str) else None
    if role is None:
        raise ConversationError(
            "bad_role", f"the role {value.get('role')!r} is none of {', '.join(_ROLES)}", place.under("role")
        )
    unread = unread_key(value, role)
    if unread is not None:
        raise ConversationError("unread_key", unread[1], place.under(unread[0]))
    if role == "assistant":
        return _assistant(value, place, tools)
    if value.get("content") is None and not (role == "tool" and "content" in value):
        raise ConversationError("no_content", f"a message of role {role!r} needs a content", place.under("content"))
    text, _ = _content(value["content"], place.under("content"))
    if role != "tool":
        return ChatMessage(role, text, place)
    return ChatMessage(
        role,
        text,
        place,
        answers=_one_of(value, RESULT_IDS, place),
        own_id=_id(value.get("id")),
        tool=_one_of(value, RESULT_TOOLS, place),
    )


def _assistant(value: Mapping[str, Any], place: Place, tools: Tools | None) -> ChatMessage:
    weight = value.get("weight")
    if weight is not None and weight != 1:
        message = f"a weight of {weight!r} can't be kept: calls are taught alike; take 'weight' out to teach it"
        raise ConversationError("bad_weight", message, place.under("weight"))
    text, inside = _content(value.get("content"), place.under("content"))
    refusal, _ = _content(value.get("refusal"), place.under("refusal"))
    if text.strip() and refusal.strip():
        message = "a message has a content or a refusal, not both"
        raise ConversationError("bad_refusal", message, place.under("refusal"))
    thoughts = [_thought(value.get(key), place.under(key)) for key in THOUGHTS]
    thoughts += [_thought_parts(value.get(key), place.under(key)) for key in THOUGHT_LISTS]
    thought, said = message_parts(
        {"content": text or refusal, "reasoning_content": "\n\n".join(_distinct([*thoughts, inside]))}
    )
    return ChatMessage("assistant", said, place, thought, tuple(_calls(value, place, tools)))


def _distinct(thoughts: Iterable[str]) -> list[str]:
    """Thoughts without empty ones and those that differ from an earlier one in white space only."""
    found: dict[str, str] = {}
    for thought in thoughts:
        found.setdefault("".join(thought.split()), thought)
    found.pop("", None)
    return list(found.values())


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def _id(value: Any) -> str | None:
    return None if value is None or value == "" else str(value)


def _one_of(value: Mapping[str, Any], keys: Sequence[str], place: Place) -> str | None:
    """What the first of ``keys`` says that says something; the others must say the same."""
    said = {key: found for key in keys if (found := _id(value.get(key))) is not None}
    if len(set(said.values())) > 1:
        raise ConversationError("orphan_result", f"{' and '.join(said)} differ", place.under(next(iter(said))))
    return next(iter(said.values()), None)


def _thought(value: Any, place: Place) -> str:
    text, inside = _content(value, place)
    return "\n\n".join(piece for piece in (text.strip(), inside) if piece)


def _content(value: Any, place: Place) -> tuple[str, str]:
    """(text, thoughts) of a content: null, a text, or a list of parts that are texts."""
    if value is None or isinstance(value, str):
        return value or "", ""
    if not isinstance(value, list):
        raise ConversationError("not_text", f"expected null, a text or a list of texts, found {_kind(value)}", place)
    found = [_part(part, place.under(f"[{index}]")) for index, part in enumerate(value)]
    return "".join(text for text, _ in found), "\n\n".join(thought for _, thought in found if thought)


def _part(part: Any, place: Place) -> tuple[str, str]:
    """(text, thought) of a part of a content."""
    if isinstance(part, str):
        return part, ""
    kind = part.get("type", "text") if isinstance(part, Mapping) else _kind(part)
    if kind in (*_THOUGHT_TYPES, *_SEALED):
        return "", _thought_part(part, place)
    key = "refusal" if kind == "refusal" else "text"
    if kind in _TEXTS and isinstance(part.get(key), str):
        return part[key], ""
    if kind in _BLOCKS:
        raise ConversationError("other_format", f"{kind!r} is a block of Anthropic's format, not OpenAI's", place)
    raise ConversationError("not_text", f"a part of type {kind!r} is no text, and only text is read", place)


def _thought_parts(value: Any, place: Place) -> str:
    """The thought that a list of parts is; those of one index are pieces of one text, as they were streamed."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise ConversationError("not_text", f"expected a list of thoughts, found {_kind(value)}", place)
    pieces: dict[Any, str] = {}
    for index, part in enumerate(value):
        here = place.under(f"[{index}]")
        if not isinstance(part, Mapping) or part.get("type") not in (*_THOUGHT_TYPES, *_SEALED):
            raise ConversationError("not_text", "this is no thought of a type that is known", here)
        key = ("part", index) if part.get("index") is None else ("index", str(part["index"]))
        pieces[key] = pieces.get(key, "") + _thought_part(part, here)
    return "\n\n".join(piece.strip() for piece in pieces.values() if piece.strip())


def _thought_part(part: Mapping[str, Any], place: Place) -> str:
    """The words of a part that is a thought; none of one that is sealed."""
    for key, value in part.items():
        if key not in (*_THOUGHT_TEXTS, *_BESIDE_THOUGHT) and not is_empty(value):
            raise ConversationError("not_text", f"the key {key!r} isn't read of a thought", place.under(key))
    if part["type"] not in _SEALED and not any(key in part for key in _THOUGHT_TEXTS):
        raise ConversationError("not_text", "a thought without a text", place)
    return "\n\n".join(_distinct(_words(part.get(key), place.under(key)) for key in _THOUGHT_TEXTS))


def _words(value: Any, place: Place) -> str:
    """A text as it is, or the texts of a list of parts, each a paragraph."""
    if not isinstance(value, list):
        return _content(value, place)[0]
    found = [_part(part, place.under(f"[{index}]")) for index, part in enumerate(value)]
    return "\n\n".join(piece for pair in found for piece in pair if piece)


def _calls(value: Mapping[str, Any], place: Place, tools: Tools | None) -> list[Called]:
    """The calls of an assistant message: ``tool_calls``, or the one of the older ``function_call``."""
    items, older = value.get("tool_calls"), value.get("function_call")
    here = place.under("tool_calls")
    if isinstance(items, str) and items.strip():
        items = _decoded(items, here)
    if items and not isinstance(items, list):
        raise ConversationError("bad_call", f"expected a list, found {_kind(items)}", here)
    if items and older:
        raise ConversationError("bad_call", "a message has tool_calls or function_call, not both", here)
    if older:
        return [_called(older, place.under("function_call"), tools)]
    return [_called(item, here.under(f"[{index}]"), tools) for index, item in enumerate(items or ())]


def _called(item: Any, place: Place, tools: Tools | None) -> Called:
    if not isinstance(item, Mapping):
        raise ConversationError("bad_call", f"a call is an object, not {_kind(item)}", place)
    wrapped = isinstance(item.get("function"), Mapping)
    inner, within = (item["function"], "function.") if wrapped else (item, "")
    parts = {key: part for key, part in inner.items() if part is not None and key not in _BESIDE}
    if "arguments" in parts:
        parts["arguments"] = _arguments(parts["arguments"], place.under(f"{within}arguments"))
    schemas = {tool["name"]: tool for tool in tools or ()}
    name = parts.get("name")
    if schemas and isinstance(name, str) and name not in schemas:
        raise ConversationError("not_offered", f'tool "{name}" is not offered; offered: {", ".join(schemas)}', place)
    if isinstance(name, str) and name in schemas and "arguments" in parts:
        parts["arguments"] = _without_nulls(parts["arguments"], schemas[name])
    beside = {key: part for key, part in item.items() if key != "function" and not is_empty(part)}
    written = {**beside, "function": parts} if wrapped else parts
    written = {key: part for key, part in written.items() if key not in _BESIDE_CALL}
    identifier = next((found for key in CALL_IDS if (found := _id(item.get(key))) is not None), None)
    try:
        return Called(call_from(written, tools or ()), identifier, place)
    except ToolCallError as error:
        raise ConversationError("bad_call", str(error), place) from error


def _arguments(value: Any, place: Place) -> dict[str, Any]:
    """Arguments as an object: as they are, as its JSON text, or as the JSON text of that text."""
    for _ in range(_ENCODINGS):
        if not isinstance(value, str):
            break
        value = _decoded(value, place) if value.strip() else {}
    if not isinstance(value, dict):
        raise ConversationError("bad_arguments", f"arguments are one JSON object, not {_kind(value)}", place)
    return value


def _decoded(text: str, place: Place) -> Any:
    try:
        return strict_json.loads(text, unique=True)
    except ValueError as error:
        raise ConversationError("bad_arguments", f"not valid JSON: {error}", place) from error


def _without_nulls(arguments: dict[str, Any], tool: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments without nulls that the tool knows no argument for: tables give every call the arguments of all."""
    known = tool["parameters"].get("properties") or {}
    return {key: value for key, value in arguments.items() if value is not None or key in known}
