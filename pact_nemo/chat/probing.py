"""What a chat template makes of a conversation, found by rendering marks: what it drops, alters or repeats is refused
by name.

Templates are programs. What they do with a role, a tool or a thought is read from what they write, never from words in
their source.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from pact_nemo.chat.thoughts import CLOSING, OPENING, ThoughtStyle
from pact_nemo.environments.base import ToolCall
from pact_nemo.errors import ConfigError, DataError

Message = Mapping[str, Any]
Render = Callable[[Sequence[Message], bool], str]  #: (messages, generation prompt) -> text
Earlier = Literal["kept", "until_user", "dropped"]

#: keys under which chat templates take a thought apart from the content
THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking")
#: of thoughts that templates look for in the content, and that the project does not read
_OTHER_MARKERS = (
    *((f"<{word}>", f"</{word}>") for word in ("thinking", "thought", "reasoning", "reason", "thoughts")),
    ("[THINK]", "[/THINK]"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)
#: text that templates like to escape, trim or fold
HARD = 'say "so" <b>&amp; é\n\n  twice\\'
USER = {"role": "user", "content": f"MARK-USER {HARD}"}
THOUGHT, VISIBLE, ANSWER = "MARK-THOUGHT first.\nMARK-THOUGHT-END", "MARK-VISIBLE", "MARK-ANSWER"

#: a tool whose every part can be looked for
TOOL: dict[str, Any] = {
    "name": "mark_tool",
    "description": "MARK-DESCRIPTION of the tool.",
    "parameters": {
        "type": "object",
        "properties": {"mark_argument": {"type": "string", "description": "MARK-ARGUMENT-DESCRIPTION"}},
        "required": ["mark_argument"],
    },
}
#: a second one, with what templates like to leave out: the end of a long text, choices, defaults, alternatives,
#: arguments within arguments and within lists
_FURTHER_TOOL: dict[str, Any] = {
    "name": "mark_further_tool",
    "description": f"MARK-FURTHER {'and so on, ' * 500}MARK-FURTHER-END",
    "parameters": {
        "type": "object",
        "properties": {
            "mark_choice": {"type": "string", "enum": ["MARK-CHOICE-A", "MARK-CHOICE-B"]},
            "mark_outer": {
                "type": "object",
                "properties": {"mark_inner": {"type": "integer", "description": "MARK-INNER"}},
            },
            "mark_list": {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {"mark_item": {"type": "string", "description": "MARK-ITEM"}},
                },
            },
            "mark_either": {
                "anyOf": [{"type": "string", "description": "MARK-EITHER"}, {"type": "integer"}],
            },
            "mark_preset": {"type": "string", "default": "MARK-DEFAULT"},
        },
    },
}
#: some templates show only the first few
_MANY_TOOLS = [{**TOOL, "name": f"mark_tool_of_many_{index}"} for index in range(20)]
_TOOL_PARTS = (
    "mark_tool",
    "MARK-DESCRIPTION of the tool.",
    "mark_argument",
    "MARK-ARGUMENT-DESCRIPTION",
    "mark_further_tool",
    "MARK-FURTHER-END",
    "mark_choice",
    "MARK-CHOICE-A",
    "MARK-CHOICE-B",
    "mark_outer",
    "mark_inner",
    "MARK-INNER",
    "mark_item",
    "MARK-ITEM",
    "MARK-EITHER",
    "MARK-DEFAULT",
    *(str(tool["name"]) for tool in _MANY_TOOLS),
)
_SYSTEM = {"role": "system", "content": "MARK-SYSTEM"}


def openai_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A tool as chat templates take it."""
    return {"type": "function", "function": dict(tool)}


def shows_tools(
    render: Callable[[Sequence[Message], Sequence[Mapping[str, Any]] | None, bool], str],
    write_calls: Callable[[list[ToolCall]], str],
) -> bool:
    """Whether the template itself shows tools that are passed to it (all of them, with all that their schemas say of
    each argument; with a system message and without one), and calls are written as it writes them.

    A template that teaches another way to call would contradict the tool format: the project's own text shows the tools
    then.
    """
    tools = [openai_tool(tool) for tool in (TOOL, _FURTHER_TOOL, *_MANY_TOOLS)]
    optional = [openai_tool({**TOOL, "parameters": {**TOOL["parameters"], "required": []}}), *tools[1:]]
    for conversation in ([USER], [_SYSTEM, USER]):
        try:
            text = render(conversation, tools, True)
        except DataError:
            if conversation[0] is USER:
                return False
            continue  # it takes no system message: none is passed with tools
        if not all(part in text for part in _TOOL_PARTS) or text == render(conversation, optional, True):
            return False  # the last: it doesn't say which arguments are required
    call = ToolCall(TOOL["name"], {"mark_argument": "MARK-CALL"})
    function = {"name": call.name, "arguments": call.arguments}
    try:
        text = render(
            [USER, {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}],
            tools,
            False,
        )
    except DataError:
        return True  # it has its own rules for structured calls, which the project doesn't use
    return "MARK-CALL" not in text or write_calls([call]) in text


def generation_text(render: Render, source: str) -> str:
    """What the template writes to open an assistant message.

    Raises:
        ConfigError: it is not a suffix, or the template fails on a plain user message.
    """
    whole, head = render([USER], True), render([USER], False)
    if not whole.startswith(head):
        raise ConfigError(
            f"{source}: its generation prompt is not a suffix of the conversation; take a template that only appends it"
        )
    return whole[len(head) :]


def find_thoughts(render: Render, source: str, generation: str) -> tuple[ThoughtStyle | None, str]:
    """How the template lays out thoughts, and the part of its generation prompt that belongs to the thought.

    Returns:
        (style, tail): style is None for a template that knows no thoughts, and where the generation prompt closes an
        empty thought (thinking is off).

    Raises:
        ConfigError: thoughts stand between other markers than ``<think>`` and ``</think>``.
    """
    tail = generation[generation.index(OPENING) :] if OPENING in generation else ""
    if CLOSING in tail:
        return None, tail
    for field in THOUGHT_FIELDS:
        found = _layout(render, source, generation, tail, {"content": VISIBLE, field: THOUGHT})
        if found is not None:
            opening, closing = found
            if OPENING not in opening or CLOSING not in closing:
                raise ConfigError(_unknown_markers(source, opening, closing))
            return ThoughtStyle(opening, closing, bool(tail), field), tail
    plain = not _parses(render, "<mark>", "</mark>")  # what alters any text is refused for that
    for opening, closing in _OTHER_MARKERS:
        if plain and _parses(render, opening, closing):
            raise ConfigError(_unknown_markers(source, opening, closing))
    if tail:
        return ThoughtStyle(tail, f"\n{CLOSING}\n\n", True, None), tail
    if _parses(render):
        found = _layout(render, source, generation, tail, {"content": f"{OPENING}\n{THOUGHT}\n{CLOSING}\n\n{VISIBLE}"})
        opening, closing = found or (f"{OPENING}\n", f"\n{CLOSING}\n\n")
        return ThoughtStyle(opening, closing, False, None), tail
    return None, tail


def _unknown_markers(source: str, opening: str, closing: str) -> str:
    return (
        f"{source} has thoughts between {opening!r} and {closing!r}; only {OPENING} and {CLOSING} are known, so calls"
        " inside a thought could not be told from calls; use a model that marks its thoughts so"
    )


def _layout(render: Render, source: str, generation: str, tail: str, message: Message) -> tuple[str, str] | None:
    """(text before, text after) a thought in an assistant message, or None where the template doesn't show it."""
    try:
        text, head = render([USER, {"role": "assistant", **message}], False), render([USER], False)
    except DataError:
        return None
    bare = head + generation.removesuffix(tail)
    start, visible = text.find(THOUGHT), text.rfind(VISIBLE)
    if start < 0 or visible < start:
        return None
    if not text.startswith(bare) or start < len(bare):
        raise ConfigError(
            f"{source} opens an assistant message with a thought otherwise than its generation prompt does; repair the"
            " template"
        )
    return text[len(bare) : start], text[start + len(THOUGHT) : visible]


def _parses(render: Render, opening: str = OPENING, closing: str = CLOSING) -> bool:
    """Whether the template takes a thought between these markers out of an earlier message's content, or lays it out
    anew.
    """
    content = f"{opening}{THOUGHT}{closing}{VISIBLE}"
    try:
        texts = [
            render([USER, {"role": "assistant", "content": content}], False),
            render([USER, {"role": "assistant", "content": content}, USER], False),
        ]
    except DataError:
        return False
    return any(content not in text for text in texts)


def check_marks(source: str, text: str, marks: Sequence[tuple[str, str, Sequence[str]]]) -> None:
    """Raises ConfigError unless each mark is in the rendering once, as it is, behind the mark before it.

    Args:
        source: what to name.
        text: the rendering.
        marks: (what it is, its word, forms that are accepted) each, in the order of the conversation.
    """
    position = 0
    for what, word, forms in marks:
        if word not in text:
            raise ConfigError(
                f"{source} drops {what}: the model would never see it; take a template that has a branch for it"
            )
        count = sum(text.count(form) for form in dict.fromkeys(forms))
        if count == 0:
            at = text.index(word)
            difference = first_difference(forms[0], text[at : at + len(forms[0])])
            raise ConfigError(f"{source} alters {what}: {difference}; take a template that writes it as it is")
        if count > 1:
            raise ConfigError(
                f"{source} repeats {what} ({count} times), so it can't be cut out of the conversation; repair the"
                " template"
            )
        position, before = text.index(word), position
        if position < before:
            raise ConfigError(
                f"{source} writes {what} before what came earlier; take a template that keeps the order of the messages"
            )


def observation_forms(content: str) -> list[str]:
    """What the content of a tool message may look like in a rendering. Llama 3 templates write it as a JSON string."""
    return [content, json.dumps(content, ensure_ascii=False)[1:-1], json.dumps(content)[1:-1]]


def first_difference(expected: str, rendered: str) -> str:
    """Where two texts part, with a little of both."""
    at = next(
        (i for i, (a, b) in enumerate(zip(expected, rendered, strict=False)) if a != b),
        min(len(expected), len(rendered)),
    )
    return (
        f"after {rendered[max(0, at - 30) : at]!r} it writes {rendered[at : at + 40]!r} instead of"
        f" {expected[at : at + 40]!r}"
    )


def earlier_thoughts(
    render: Render, source: str, generation: str, tail: str, style: ThoughtStyle | None, observed: Sequence[Message]
) -> tuple[Earlier, str]:
    """What the template does with the thought of an assistant message that others follow, and what it writes in the
    place of a dropped one.

    Raises:
        ConfigError: it drops thoughts within a turn and brings them back later, or replaces them in more than one way.
    """
    literal = tail if style is None else style.opening + THOUGHT + style.closing
    if not literal:
        return "kept", ""
    message: dict[str, str] = (
        {"content": VISIBLE} if style is None else style.message(literal.removeprefix(tail) + VISIBLE)
    )
    bare = render([USER], False) + generation.removesuffix(tail)

    def lead(following: Sequence[Message]) -> str:
        text = render([USER, {"role": "assistant", **message}, *following], False)
        if not text.startswith(bare) or VISIBLE not in text:
            raise ConfigError(
                f"{source} opens an earlier assistant message otherwise than its generation prompt does; repair the"
                " template"
            )
        return text[len(bare) : text.index(VISIBLE)]

    within, later = lead(observed), lead([*observed, {"role": "assistant", "content": ANSWER}, USER])
    if within == later == literal:
        return "kept", ""
    if within == literal and THOUGHT not in later:
        return "until_user", later
    if within == later and THOUGHT not in within:
        return "dropped", within
    raise ConfigError(
        f"{source} lays out an earlier thought as {within!r}, and as {later!r} once a user speaks again; repair the"
        " template"
    )
