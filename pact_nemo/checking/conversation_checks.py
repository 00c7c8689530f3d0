"""Conversations: what speaks against each of them, and how they replay."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from pact_nemo.checking.file_checks import TaskRows
from pact_nemo.checking.findings import Finding
from pact_nemo.checking.plays import Expert, Script, play
from pact_nemo.data.conversations import Judged
from pact_nemo.environments.base import Environment, Task
from pact_nemo.environments.own.conversations import user_words
from pact_nemo.traces.conversations import Conversation
from pact_nemo.traces.verification import new_error

#: what a reason for leaving out a conversation means to its owner, and what to do
REASONS = {
    "of_no_task": ("belongs to no task", "it has no task_id, and its user's words are no task's: give it one"),
    "unknown_tool": ("calls a tool that its task does not offer", "offer it, or take the conversation out"),
    "malformed_turn": ("has a call without an observation", "export it whole, tool messages included"),
    "role_text_in_observation": ("has a template's role marker in an observation", "take the marker out of the tool"),
    "tool_call_tag_in_observation": ("has a tag of tool calls in an observation", "take the tag out of the tool"),
    "control_text_in_turn": ("has a template's control text in a turn", "take it out"),
    "answer_leaked": ("names the answer before a tool or the question has", "take it out: it teaches to guess"),
    "no_reward": ("has no reward, and traces.verify=reward believes rewards", "set traces.verify=replay"),
    "low_reward": ("has a reward below traces.min_score", "take it out, or lower traces.min_score"),
    "replay_refused": ("can't be replayed", "mend what is named here"),
    "replay_error": ("brings an error that it did not have", "mend the call's argument, the tool or the task's info"),
    "no_call_in_first_turn": (
        "calls nothing in its first user turn, and agent.user_turns=first takes that one only",
        "set agent.user_turns=recorded, or take it out",
    ),
    "longer_than_task": (
        "calls tools in a user turn that its task does not have",
        "give the task's row those user_turns, or set agent.user_turns=first to use the first turn's part",
    ),
    "replay_low_score": ("does not solve its task", "mend its answer, the task's, or score()"),
}


def conversation_findings(
    judged: Sequence[Judged], tasks: Sequence[Task], environment: Environment, rows: TaskRows
) -> tuple[dict[str, Expert], list[Finding]]:
    """What speaks against each conversation.

    Args:
        rows: of the tasks; says where one without a task may belong.

    Returns:
        task id -> (main trace, its answers) of those that can be used, and findings.
    """
    used: dict[str, Expert] = {}
    found: list[Finding] = []
    names = {task.id: user_words(task.user_turns[0]) for task in tasks}
    for one in judged:
        where = f"{one.conversation.file}:{one.conversation.line}"
        if one.reason is None:
            if one.task is not None and one.trace is not None:
                used.setdefault(one.task.id, (one.trace, one.conversation.answers))
            continue
        if one.reason == "of_no_task" and where in rows.refused.values():
            continue  # it is what its task's row was refused for
        text, remedy = REASONS.get(one.reason, (one.reason, ""))
        if one.reason == "unknown_tool" and one.task is not None and one.trace is not None:
            offered = [tool["name"] for tool in one.task.tools]
            called = {call.name for turn in one.trace.turns for call in turn.calls} - set(offered)
            near = {name: difflib.get_close_matches(name, offered, 1) for name in sorted(called)}
            told = ", ".join(f"{name!r}{f' (near: {close[0]!r})' if close else ''}" for name, close in near.items())
            text = f"{text}: {told}"
        elif one.reason == "of_no_task":
            text, remedy = _of_no_task(one.conversation, rows, names) or (text, remedy)
        elif one.task is not None and one.trace is not None and one.reason.startswith("replay"):
            text = f"{text}: {_replayed(environment, one)}"
        found.append(Finding("warning", f"trace:{one.reason}", where, text, remedy))
    if judged and not used:
        found.append(
            Finding("error", "trace", "", f"none of {len(judged)} conversations can be used", "see the warnings")
        )
    return used, found


def _of_no_task(one: Conversation, rows: TaskRows, tasks: Mapping[str, str]) -> tuple[str, str] | None:
    """What is known of the task that a conversation should belong to, and the remedy; None where nothing is.

    Args:
        tasks: id -> the user's words.
    """
    name, words = one.task_id, user_words(one.opening)
    refused = rows.refused.get(name or words) or rows.refused.get(words)
    if refused is not None:
        return f"the row of its task{f' {name!r}' if name else ''} was refused ({refused})", "mend that row"
    if name is None:
        return None
    closest = difflib.get_close_matches(name, list(tasks), 1)
    text = f"task_id {name!r} belongs to no task{f' (near: {closest[0]!r})' if closest else ''}"
    like = next((task for task, said in tasks.items() if said == words), None)
    if like is None:
        return f"{text}; its user's words are no task's either", "mend the id"
    if like in rows.without_id:
        return f"{text}; its words are those of {rows.without_id[like]}, which has no id", f"give that row id {name!r}"
    return f"{text}; its words are those of {like!r}", "mend the id"


def _replayed(environment: Environment, one: Judged) -> str:
    """The first thing that goes wrong where a conversation is replayed."""
    assert one.task is not None and one.trace is not None
    result = play(environment, one.task, Script.of_trace(one.trace, one.conversation.answers, one.task))
    if result.failure is not None:
        return result.failure
    told = [text for turn in one.trace.turns for text in turn.observations]
    places = [place for turn in one.conversation.places for place in turn]
    for call, now, then, place in zip(result.calls, result.observations, told, places, strict=False):
        if new_error(then, now):
            return f"{call.name}({_arguments(call.arguments)}) gives {now[:160]!r} [field {place}]"
    assert result.outcome is not None
    return f"score {result.outcome.score:g} ({result.outcome.reason})"


def _arguments(arguments: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())[:80]


def system_findings(judged: Sequence[Judged]) -> list[Finding]:
    """System messages of conversations that their tasks don't have: the prompt is the task's own."""
    of_task = [one for one in judged if one.task is not None]
    lost = [one for one in of_task if one.task and _system(one.conversation.opening) - _system(one.task.user_turns[0])]
    if not lost:
        return []
    text = f"{len(lost)} of {len(of_task)} conversations have a system message that is not their task's: it is dropped"
    where = f"{lost[0].conversation.file}:{lost[0].conversation.line}"
    return [Finding("note", "system", where, text, "to keep it, put it into a text file and set agent.system")]


def _system(messages: Sequence[Mapping[str, str]]) -> set[str]:
    return {message["content"].strip() for message in messages if message["role"] == "system"} - {""}
