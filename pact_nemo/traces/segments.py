"""Types of reasoning segments, and the cumulative prefix levels L0 ⊂ … ⊂ L4 (appendix C), which go by position."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

NO_LEVEL = -1
TOP_LEVEL = 4
PREVIEW = "explicit_call_preview"

#: What a segment of reasoning does. Types are for readers, filters and annotators; only a preview of the literal call
#: decides a level.
SEGMENT_TYPES = (
    "task_restate",
    "tool_scan",
    "failure_reflection",
    "tool_selection",
    "irrelevant_tool_rejection",
    "fallback_plan",
    "required_arg_grounding",
    "optional_arg_analysis",
    "decision_summary",
    "final_answer_grounding",
    "other",
    PREVIEW,
)


def prefix_levels(types: Sequence[str]) -> list[int]:
    """Lowest prefix level that contains each segment of one turn, in the order of the text; ``NO_LEVEL`` = in none.

    L0 holds no reasoning. L1 … L4 are ever longer prefixes of the text: L1 the first chunk, L4 all of it that is safe,
    i.e. what stands before the first preview of the literal call. Of n safe segments the i-th (from 0) enters at level
    1 + floor(4 i / n).
    """
    safe = types.index(PREVIEW) if PREVIEW in types else len(types)
    return [1 + TOP_LEVEL * index // safe for index in range(safe)] + [NO_LEVEL] * (len(types) - safe)


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
    (
        "task_restate",
        r"\b(?:the user (?:wants|asks|needs|says|is asking)|the task is|the question is|i (?:need|have) to)\b",
    ),
    ("tool_scan", r"\b(?:available|provided|offered) (?:tools|functions)\b|\btools? (?:are|include)\b"),
    ("decision_summary", r"^(?:so|therefore|thus|in short|in summary|now)\b"),
)


# what follows the bracket of a call that is written out
_ARGUMENT = r"""(?:\)|\w+\s*=|['"\[{\d-]|True\b|False\b|None\b)"""


def preview_start(text: str, tool_names: Iterable[str]) -> int:
    """Where ``text`` first writes a call of one of the tools down, in any notation; -1 if it doesn't."""
    names = "|".join(re.escape(name) for name in sorted(tool_names, key=len, reverse=True))
    forms = [
        r"<tool_call\b",
        r"<function\s*=",
        r"<\|python_tag\|>",
        r"""\{\s*["'](?:name|function|arguments|parameters)["']\s*:""",
    ]
    if names:
        forms.append(rf"(?<!\w)(?:{names})\s?\(\s*{_ARGUMENT}")
    found = re.search("|".join(forms), text, flags=re.IGNORECASE)
    return found.start() if found else -1


def segment_type(paragraph: str, tool_names: Iterable[str]) -> str:
    """Type of a paragraph of free reasoning by deterministic rules; ``other`` where none applies.

    Text that writes a call of a tool down is ``explicit_call_preview`` before any other rule: it must reach no level.
    """
    known = list(tool_names)
    if preview_start(paragraph, known) >= 0:
        return PREVIEW
    text = paragraph.strip().casefold()
    for kind, pattern in _RULES:
        if re.search(pattern, text):
            return kind
    names = "|".join(re.escape(name.casefold()) for name in sorted(known, key=len, reverse=True))
    if names and re.search(rf"(?<!\w)(?:{names})(?!\w)", text):
        return "tool_selection"
    return "other"


def split_reasoning(text: str, tool_names: Iterable[str]) -> list[tuple[str, str]]:
    """(type, text) of each piece of free reasoning; the texts concatenate to ``text`` without its outer white space.

    A piece is a paragraph. A paragraph that comes to write a call down is parted before the sentence in which it does,
    so that what is safe of it can be taught.
    """
    names = list(tool_names)
    pieces = re.split(r"(\n\s*\n)", text.strip())
    result: list[tuple[str, str]] = []
    for gap, paragraph in zip(["", *pieces[1::2]], pieces[0::2], strict=True):
        start = preview_start(paragraph, names)
        sentences = [match.end() for match in re.finditer(r"[.!?:;](?=\s)|\n", paragraph[: max(start, 0)])]
        parts = [paragraph[: sentences[-1]], paragraph[sentences[-1] :]] if sentences else [paragraph]
        for index, part in enumerate(parts):
            if part:
                result.append((segment_type(part, names), gap + part if index == 0 else part))
    return result
