"""Typing the paragraphs of free reasoning by a model, with the deterministic rules as the fallback and the last word on
call previews.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from pact_nemo.errors import ServerError
from pact_nemo.serving.chat_endpoint import Complete, whole
from pact_nemo.traces.segments import SEGMENT_TYPES, split_reasoning

_INSTRUCTION = """Each numbered paragraph below is a piece of an agent's reasoning before a tool call. Give each one the type that fits best:
{types}
Answer with JSON only: {{"types": ["type of paragraph 0", "type of paragraph 1", ...]}}, {count} entries.

{paragraphs}"""

_MEANINGS = {
    "task_restate": "says what the user wants",
    "tool_scan": "looks over the tools",
    "failure_reflection": "reflects on a call that failed",
    "tool_selection": "chooses a tool",
    "irrelevant_tool_rejection": "says why a tool doesn't help",
    "fallback_plan": "plans what to do otherwise",
    "required_arg_grounding": "says where a required argument comes from",
    "optional_arg_analysis": "weighs optional arguments",
    "decision_summary": "sums the decision up",
    "final_answer_grounding": "prepares the final answer",
    "explicit_call_preview": "writes the call down",
    "other": "anything else",
}
assert set(_MEANINGS) == set(SEGMENT_TYPES)


def read_types(text: str, count: int) -> list[str] | None:
    """The types of an annotator's answer, or None if it isn't exactly what was asked for."""
    match = re.search(r"\{.*\}", text, re.DOTALL)
    try:
        answer: Any = json.loads(match.group(0)) if match else None
    except (ValueError, RecursionError):
        return None
    types = answer.get("types") if isinstance(answer, dict) else None
    if (
        not isinstance(types, list)
        or len(types) != count
        or not all(isinstance(kind, str) and kind in SEGMENT_TYPES for kind in types)
    ):
        return None
    return types


class ModelAnnotator:
    """Types reasoning by asking a model.

    Attributes:
        fallbacks: turns whose answer was unusable, so that the rules' types were kept.
    """

    def __init__(self, complete: Complete):
        self._complete = complete
        self.turns = self.fallbacks = 0

    def __call__(self, text: str, tool_names: Sequence[str]) -> list[tuple[str, str]]:
        """(type, text) pieces whose texts concatenate to the reasoning; the rules' where the model doesn't answer as
        asked.

        A piece that the rules take for a preview of the literal call stays one: it must reach no level.
        """
        pieces = split_reasoning(text, tool_names)
        if not pieces:
            return pieces
        self.turns += 1
        types = "\n".join(f"- {kind}: {meaning}" for kind, meaning in _MEANINGS.items())
        paragraphs = "\n".join(f"[{index}] {piece.strip()}" for index, (_, piece) in enumerate(pieces))
        content = _INSTRUCTION.format(types=types, count=len(pieces), paragraphs=paragraphs)
        try:
            answer = whole(self._complete([{"role": "user", "content": content}], []), "the annotation")
        except ServerError:
            answer = {}
        found = read_types(str(answer.get("content") or ""), len(pieces))
        if found is None:
            self.fallbacks += 1
            return pieces
        return [
            (rule if rule == "explicit_call_preview" else kind, piece)
            for (rule, piece), kind in zip(pieces, found, strict=True)
        ]
