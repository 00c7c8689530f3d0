"""Which traces are kept: the filters of appendix C, as one function that names the reason."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from pact_nemo.environments.base import Task
from pact_nemo.environments.calls import check_call
from pact_nemo.errors import ToolCallError
from pact_nemo.traces.schema import Trace

#: what a chat template could make a role or an end of a turn of. A line that begins with ``user:`` is none: mail, logs
#: and YAML have many
_ROLE_TEXT = re.compile(
    r"<[|\uff5c][^\s<>|\uff5c]+[|\uff5c]>"  # <|im_start|>, <|eot_id|>, <|START_OF_TURN_TOKEN|>, <｜User｜>
    r"|</?(?:start_of_turn|end_of_turn|start_of_role|end_of_role)>"
    r"|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]"
    r"|<</?SYS>>"
)
_CALL_TAG = re.compile(r"</?(?:tool_call|tool_response|tools|function|think)\b[^>]*>|<\|python_tag\|>", re.IGNORECASE)


def leaks_answer(trace: Trace, question: str, answer: str | None) -> bool:
    """Whether the reasoning names the final answer before a tool or the question has: the trace then solves nothing, it
    knows.

    Compared in lower case without commas, as whole words. Answers that are bare numbers below 100 occur by chance and
    are let pass.
    """
    if answer is None:
        return False
    wanted = re.sub(r"\s+", " ", answer.lower().replace(",", "")).strip()
    if not wanted or re.fullmatch(r"\d{1,2}", wanted):
        return False
    pattern = re.compile(rf"(?<!\w){re.escape(wanted)}(?!\w)")

    def names(text: str) -> bool:
        return pattern.search(re.sub(r"\s+", " ", text.lower().replace(",", ""))) is not None

    known = names(question)
    for turn in trace.turns:
        if not known and names(turn.reasoning):
            return True
        known = known or any(names(text) for text in turn.observations)
    return False


def turns_without_reasoning(trace: Trace) -> int:
    """How many of a trace's turns call without a word before: a teacher's thought that its server kept to itself looks
    like this.
    """
    return sum(bool(turn.calls) and not turn.reasoning.strip() for turn in trace.turns)


def why_not(trace: Trace, task: Task) -> str | None:
    """Why a trace must not be used for its task, or None: :func:`reject_reason`, or ``answer_leaked``
    (:func:`leaks_answer`).
    """
    reason = reject_reason(trace, task.tools)
    if reason is not None:
        return reason
    question = "\n".join(message["content"] for turn in task.user_turns for message in turn)
    return "answer_leaked" if leaks_answer(trace, question, task.reference_answer) else None


def reject_reason(trace: Trace, tools: Iterable[Mapping[str, Any]]) -> str | None:
    """Why a trace must not be used, or None.

    Args:
        trace: the candidate.
        tools: schemas offered at the start of its task; tools that the trace itself sees revealed later count from then
            on, and before (one BFCL ground truth calls such a tool early).

    Returns:
        ``unverified``, ``unknown_tool``, ``malformed_turn``, ``role_text_in_observation``,
        ``tool_call_tag_in_observation``, ``control_text_in_turn``, or None.
    """
    if not trace.verified:
        return "unverified"
    known = {tool["name"] for tool in tools} | {tool["name"] for turn in trace.turns for tool in turn.new_tools_after}
    if not trace.turns or not trace.turns[-1].calls:
        return "malformed_turn"
    for turn in trace.turns:
        if len(turn.calls) != len(turn.observations) or (not turn.calls and not turn.user_messages_after):
            return "malformed_turn"
        for call in turn.calls:
            if call.name not in known:
                return "unknown_tool"
            try:
                check_call(call)
            except ToolCallError:
                return "malformed_turn"
        for observation in turn.observations:
            if _ROLE_TEXT.search(observation):
                return "role_text_in_observation"
            if _CALL_TAG.search(observation):
                return "tool_call_tag_in_observation"
        written = turn.reasoning + turn.closing + "\n".join(repr(call.arguments) for call in turn.calls)
        if re.search(r"<\|\w+\|>", written) or _CALL_TAG.search(written):
            return "control_text_in_turn"
    return None
