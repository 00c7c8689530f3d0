"""Types of reasoning segments and the cumulative prefix levels L0 ⊂ … ⊂ L4 (appendix C; which type enters at which level is this
project's choice).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

NUM_LEVELS = 5
NO_LEVEL = -1
TOP_LEVEL = NUM_LEVELS - 1

#: Lowest level that contains a segment type. L0 holds what only reads the situation, L1 adds the choice of the tool, L2 where the required
#: arguments come from, L3 the optional ones, L4 everything else. A preview of the literal call is in none: the call itself is supervised
#: apart.
LEVEL_OF_TYPE: dict[str, int] = {
    "task_restate": 0,
    "tool_scan": 0,
    "failure_reflection": 0,
    "tool_selection": 1,
    "irrelevant_tool_rejection": 1,
    "fallback_plan": 1,
    "required_arg_grounding": 2,
    "optional_arg_analysis": 3,
    "decision_summary": 4,
    "final_answer_grounding": 4,
    "other": 4,
    "explicit_call_preview": NO_LEVEL,
}


def prefix_levels(types: Sequence[str]) -> list[int]:
    """Level of each segment of one turn, in order: at least its type's level and never below an earlier segment's.

    So each level is a prefix of the turn's reasoning, with ``explicit_call_preview`` (``NO_LEVEL``) cut out of every one.
    """
    levels, reached = [], 0
    for kind in types:
        level = LEVEL_OF_TYPE[kind]
        if level != NO_LEVEL:
            reached = level = max(level, reached)
        levels.append(level)
    return levels


_RULES: tuple[tuple[str, str], ...] = (
    ("failure_reflection", r"\b(?:error|failed|failure|didn't work|did not work|went wrong|mistake)\b"),
    ("fallback_plan", r"\b(?:instead|alternatively|otherwise|fall ?back|another way)\b"),
    (
        "irrelevant_tool_rejection",
        r"\b(?:irrelevant|not relevant|not needed|no need for|don't need|doesn't help|does not help|unrelated)\b",
    ),
    ("final_answer_grounding", r"\b(?:final answer|the answer is|answer to the user)\b"),
    ("optional_arg_analysis", r"\b(?:optional|default)\b"),
    ("required_arg_grounding", r"\b(?:argument|parameter|required)s?\b|\b\w+\s?=\s?\S"),
    ("task_restate", r"\b(?:the user (?:wants|asks|needs|says|is asking)|the task is|the question is|i (?:need|have) to)\b"),
    ("tool_scan", r"\b(?:available|provided|offered) (?:tools|functions)\b|\btools? (?:are|include)\b"),
    ("decision_summary", r"^(?:so|therefore|thus|in short|in summary|now)\b"),
)


def segment_type(paragraph: str, tool_names: Iterable[str]) -> str:
    """Type of a paragraph of free reasoning by deterministic rules; ``other`` (in L4 only) where none applies.

    Text that looks like a literal call of a tool is ``explicit_call_preview`` before any other rule: it must reach no level.
    """
    names = "|".join(re.escape(name) for name in sorted(tool_names, key=len, reverse=True))
    text = paragraph.strip().casefold()
    if (names and re.search(rf"\b(?:{names.casefold()})\s*\(", text)) or re.search(r'\{\s*"name"\s*:', text) or "<tool_call" in text:
        return "explicit_call_preview"
    for kind, pattern in _RULES:
        if re.search(pattern, text):
            return kind
    if names and re.search(rf"\b(?:{names.casefold()})\b", text):
        return "tool_selection"
    return "other"


def split_reasoning(text: str, tool_names: Iterable[str]) -> list[tuple[str, str]]:
    """(type, text) of each paragraph of free reasoning; the texts concatenate to ``text`` without its outer white space."""
    names = list(tool_names)
    pieces = re.split(r"(\n\s*\n)", text.strip())
    result = [(segment_type(pieces[0], names), pieces[0])] if pieces[0] else []
    for gap, paragraph in zip(pieces[1::2], pieces[2::2], strict=True):
        result.append((segment_type(paragraph, names), gap + paragraph))
    return result
