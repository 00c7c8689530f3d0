"""Deterministic annotator: typed reasoning for ground-truth calls, saying which tool, and where each argument comes
from.

Two styles: ``compact`` (one or two short sentences a turn, for small models) and ``full`` (also restates the task,
scans and rejects tools, looks at optional arguments and sums up). Neither writes the literal call down: it would be
taught as reasoning.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pact_nemo.chat.tool_formats import first_sentence
from pact_nemo.environments.base import ToolCall
from pact_nemo.environments.grounding import is_grounded
from pact_nemo.errors import ConfigError
from pact_nemo.traces.schema import CLOSING, ReasoningSegment

Style = Literal["compact", "full"]
_COMPACT_VALUE_CHARS, _COMPACT_PURPOSE_WORDS = 16, 6
_FULL_VALUE_CHARS, _FULL_PURPOSE_WORDS = 200, 20
_RESTATED_CHARS, _SCANNED_TOOLS = 240, 8
_BREAKS = frozenset(
    (
        "of in at for from by with to on that using based as per within into under between among given if containing"
    ).split()
)
_DANGLING = _BREAKS | frozenset("and or the a an any all".split())
_OF_A_THING = frozenset("of that which whose".split())  # what follows a noun, and no verb
_PREAMBLE = re.compile(  # "An advanced tool designed to …"
    r"^(?:an?|the|this)\b[^.,;]*?\b(?:tool|function|utility|api)\b"
    r"(?:\s+(?:that|which))?(?:\s+is)?(?:\s+designed)?(?:\s+(?:to|for))?\s+",
    re.IGNORECASE,
)
_ERROR = re.compile(r'^\s*(?:\{\s*"error"|Error\b)', re.IGNORECASE)


def purpose(tool: Mapping[str, Any], limit: int) -> str:
    """What a tool is for, from its description: at most ``limit`` words, ending where a phrase ends, e.g.
    ``display the contents of a file``.
    """
    sentence = _PREAMBLE.sub("", first_sentence(tool["description"])).rstrip(".!?")
    words = re.split(r"[,;:(]", sentence)[0].split()
    if len(words) > limit:
        if words[limit].lower() not in _BREAKS:
            breaks = [index for index in range(2, limit) if words[index].lower() in _BREAKS]
            limit = breaks[-1] if breaks else limit
        words = words[:limit]
    while len(words) > 1 and words[-1].lower() in _DANGLING:
        words.pop()
    if not words:
        return "go on"  # a tool without a description
    # the first word is a verb, often in the third person ("Displays the contents"): bring it to the infinitive
    verb = words[0].lower()
    if verb.endswith("ing"):  # "… tool for retrieving dates"
        return " ".join(["help with", verb, *words[1:]])
    if len(words) > 1 and words[1].lower() in _OF_A_THING:  # "Rooms that are free"
        return " ".join(["get", verb, *words[1:]])
    if verb.endswith(("sses", "shes", "ches", "xes", "zzes", "oes")):
        verb = verb[:-2]
    elif verb.endswith("ies") and len(verb) > 4:
        verb = f"{verb[:-3]}y"
    elif verb.endswith("s") and not verb.endswith("ss"):
        verb = verb[:-1]
    return " ".join([verb, *words[1:]])


def _source(value: Any, schema: Mapping[str, Any], words: str, earlier_words: str, observations: Sequence[str]) -> str:
    if isinstance(value, bool) or value is None:
        return "inferred"
    if is_grounded(value, words):
        return "user"
    if observations and is_grounded(value, observations[-1]):
        return "last result"
    if any(is_grounded(value, text) for text in observations):
        return "earlier result"
    if is_grounded(value, earlier_words):
        return "earlier request"
    return "default" if "default" in schema and schema["default"] == value else "inferred"


_PHRASES = {
    "user": "{what} from the user",
    "last result": "{what} from the last result",
    "earlier result": "{what} from an earlier result",
    "earlier request": "{what} from an earlier request",
    "default": "{what} by default",
    "inferred": "{what} to fit the request",
}


def _names(keys: Sequence[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])} and {keys[-1]}"


def _shown(key: str, value: Any, limit: int) -> str:
    text = repr(value)
    return f"{key}={text}" if len(text) <= limit else key


@dataclass(frozen=True)
class Context:
    """What the expert has seen when it reasons.

    Attributes:
        tools: the schemas offered.
        words: the user's words in the current user turn.
        earlier_words: the user's words before that.
        observations: all earlier observations, oldest first.
        first_of_user_turn: whether no assistant turn has followed the user's words yet.
        needed_later: names of the tools of this user turn's later calls.
    """

    tools: Sequence[Mapping[str, Any]]
    words: str
    earlier_words: str = ""
    observations: Sequence[str] = ()
    first_of_user_turn: bool = True
    needed_later: frozenset[str] = frozenset()


def _grounding(arguments: Mapping[str, Any], properties: Mapping[str, Any], context: Context, limit: int) -> str:
    """One sentence on where the arguments come from, those with one source together."""
    by_source: dict[str, list[str]] = {}
    for key, value in arguments.items():
        source = _source(value, properties.get(key, {}), context.words, context.earlier_words, context.observations)
        by_source.setdefault(source, []).append(_shown(key, value, limit))
    return "; ".join(_PHRASES[source].format(what=_names(keys)) for source, keys in by_source.items()) + "."


def annotate_turn(calls: Sequence[ToolCall], context: Context, style: Style) -> tuple[ReasoningSegment, ...]:
    """Typed reasoning that leads to the calls (at least one) of one assistant turn.

    Raises:
        ConfigError: unknown style.
    """
    if style not in ("compact", "full"):
        raise ConfigError(f"unknown annotator style {style!r}; known: compact, full")
    schemas = {tool["name"]: tool for tool in context.tools}
    pieces: list[tuple[str, str]] = []
    if context.observations and not context.first_of_user_turn and _ERROR.match(context.observations[-1]):
        pieces.append(("failure_reflection", "The last call failed."))
    if style == "full" and context.first_of_user_turn:
        pieces += _opening(calls, context)
    for call in calls:
        pieces += _call_pieces(call, schemas[call.name], context, style)
    if style == "full":
        pieces.append(("decision_summary", "All required arguments are known, so I make the call now."))
    return tuple(
        ReasoningSegment(kind, text if index == 0 else f" {text}") for index, (kind, text) in enumerate(pieces)
    )


def _opening(calls: Sequence[ToolCall], context: Context) -> list[tuple[str, str]]:
    needed = {call.name for call in calls} | context.needed_later
    others = [tool for tool in context.tools if tool["name"] not in needed]
    request = " ".join(context.words.split())
    shortened = request if len(request) <= _RESTATED_CHARS else f"{request[:_RESTATED_CHARS].rpartition(' ')[0]} …"
    pieces = [("task_restate", f'The user says: "{shortened}"')]
    names = [tool["name"] for tool in context.tools]
    more = f" and {len(names) - _SCANNED_TOOLS} more" if len(names) > _SCANNED_TOOLS else ""
    pieces.append(("tool_scan", f"The tools at hand are {', '.join(names[:_SCANNED_TOOLS])}{more}."))
    if others:
        text = f"{others[0]['name']} would only {purpose(others[0], _FULL_PURPOSE_WORDS)}, which is not asked for now."
        pieces.append(("irrelevant_tool_rejection", text))
    return pieces


def _call_pieces(call: ToolCall, tool: Mapping[str, Any], context: Context, style: Style) -> list[tuple[str, str]]:
    words, limit = (
        (_COMPACT_PURPOSE_WORDS, _COMPACT_VALUE_CHARS)
        if style == "compact"
        else (_FULL_PURPOSE_WORDS, _FULL_VALUE_CHARS)
    )
    properties: Mapping[str, Any] = tool["parameters"].get("properties", {})
    needed = set(tool["parameters"].get("required", []))
    required = {key: value for key, value in call.arguments.items() if key in needed}
    optional = {key: value for key, value in call.arguments.items() if key not in needed}
    pieces = [("tool_selection", f"Use {call.name} to {purpose(tool, words)}.")]
    if required:
        pieces.append(("required_arg_grounding", _grounding(required, properties, context, limit)))
    if optional:
        pieces.append(("optional_arg_analysis", _grounding(optional, properties, context, limit)))
    left = [key for key in properties if key not in call.arguments and key not in needed]
    if left and style == "full":
        pieces.append(("optional_arg_analysis", f"{_names(left)} can stay at the default."))
    return pieces


def annotate_closing(style: Style) -> str:
    """What closes a user turn whose calls are made, before the user speaks again."""
    return CLOSING if style == "compact" else "I have done what you asked for."


def annotate_abstention(style: Style, tools_follow: bool) -> tuple[ReasoningSegment, ...]:
    """Reasoning for a user turn in which the ground truth makes no call: a tool is missing (``tools_follow``), or
    something in the request is.
    """
    if tools_follow:
        kind, text = "irrelevant_tool_rejection", "No offered tool can do this yet."
    else:
        kind, text = "required_arg_grounding", "Something needed is missing from the request."
    return (ReasoningSegment(kind, text if style == "compact" else f"{text} So I make no call and tell the user."),)
