"""Task rows of an own agent, and tasks read out of conversations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pact_nemo.environments.base import Task, ToolCall
from pact_nemo.environments.own.conversations import ConversationLike, Conversations, Message, conversation_id
from pact_nemo.environments.own.expected_calls import ExpectedCalls
from pact_nemo.environments.own.fields import mapped, one_of_both
from pact_nemo.environments.own.names import Aliases
from pact_nemo.environments.own.scoring import answer_fault
from pact_nemo.environments.own.settings import OwnConfig
from pact_nemo.environments.rows import Row, number_text
from pact_nemo.errors import DataError

REQUESTS = ("messages", "prompt", "question")  #: the keys of which one is the request


@dataclass(frozen=True)
class TaskReader:
    """Rows to tasks.

    Attributes:
        settings: the section ``agent``.
        aliases: names of tools and arguments as the model sees them.
        system: the system message of tasks that have none; empty: none.
        offers: what judges there are, of ``state``, ``score`` and ``judge``.
        instructed: every user that a model plays is told something (``agent.user.instructions``).
    """

    settings: OwnConfig
    aliases: Aliases
    system: str
    offers: frozenset[str]
    instructed: bool = False

    @cached_property
    def _expected(self) -> ExpectedCalls:
        return ExpectedCalls(self.aliases, self.settings.tools is not None, self.settings.simulated)

    def of_row(self, row: Row, conversations: Conversations) -> Task:
        """A task of a row of ``tasks.path``. Without expected calls it gets those of its conversation.

        Raises:
            DataError: names file, row, field and remedy.
        """
        one_of_both(row, self.settings.fields, "agent.fields")
        row = Row(mapped(row.values, self.settings.fields), row.file, row.number)
        name = row_id(row)
        turns = [self._opening(row), *self._later(row)]
        answers = self._answers(row)
        tools = self._tools(row)
        expected = self._expected.read(row, len(turns))
        hidden = {call.name for calls in expected for call in calls} - set(tools or self.aliases.own_names)
        if hidden:
            raise row.complain(
                f"the tool {min(hidden)!r} is expected and not offered: the row's tools are {', '.join(tools or ())}",
                "expected_calls",
            )
        told = conversations.of(name, turns[0])
        if not expected and told is not None:
            expected = self._told(told, needed=not (answers or self.offers & {"score", "judge"}))
            expected = expected if self.settings.simulated else expected[: len(turns)]
        return self._task(row, name, turns, expected, {"answers": answers, "tools": tools})

    def _told(self, conversation: ConversationLike, *, needed: bool) -> list[list[ToolCall]]:
        """The calls of a task's conversation. Where another judge is there, one with a fault is no reason to lose the
        task: it is left out as a trace, by name. Where they are to make the state that judges, none may be refused.
        """
        try:
            return self.calls_of(conversation, taken=needed and "state" in self.offers)
        except DataError:
            if needed:
                raise
            return []

    def of_conversation(self, conversation: ConversationLike) -> Task:
        """A task of a conversation: what stands before its first assistant message, and its calls as reference.

        Raises:
            DataError: it calls a tool that isn't there; names file, row and tool.
        """
        values = {"info": dict(conversation.info), "messages": list(conversation.opening)}
        row = Row(values, conversation.file, conversation.line)
        expected = self.calls_of(conversation)
        turns = [list(messages) for messages in conversation.user_turns]
        if self.settings.user_turns != "recorded":
            turns, expected = turns[:1], expected if self.settings.simulated else expected[:1]
        return self._task(row, conversation_id(conversation), turns, expected, {"answers": [], "tools": None})

    def calls_of(self, conversation: ConversationLike, *, taken: bool = False) -> list[list[ToolCall]]:
        """Calls of each user turn, by the tools' own names.

        Args:
            taken: the tools have to take the arguments.

        Raises:
            DataError: the conversation calls a tool that isn't there, or one that does not take the call; names file,
                row, field and tool.
        """
        calls: list[list[ToolCall]] = [[] for _ in conversation.user_turns]
        for turn, places in zip(conversation.turns, conversation.places, strict=True):
            for call, place in zip(turn.calls, places, strict=True):
                if not self.aliases.knows(call.name):
                    raise Row({}, conversation.file, conversation.line).complain(
                        f"the tool {call.name!r} is not offered; offered: {', '.join(sorted(self.aliases.own_names))}",
                        place,
                    )
                own = self.aliases.own(call)
                if taken:
                    self._expected.check(Row({}, conversation.file, conversation.line), own, f"{place}.arguments")
                calls[turn.user_turn].append(own)
        return calls

    def _task(
        self,
        row: Row,
        name: str,
        turns: list[list[Message]],
        expected: list[list[ToolCall]],
        own: dict[str, Any],
    ) -> Task:
        kept = [[call for call in calls if call.name not in self.settings.read_only] for calls in expected]
        calls_tell = any(expected if "state" in self.offers else kept)
        if not (own["answers"] or self.offers & {"score", "judge"} or calls_tell):
            raise row.complain(
                "nothing tells right from wrong: the tools have no score(), and the row has no answer and no"
                " expected_calls but those of agent.read_only; give one of them, a conversation of this task, or"
                " agent.judge",
                "answer",
            )
        if self.settings.simulated and not (row.text("user_instructions", "") or self.instructed):
            raise row.complain(
                "nobody tells the user of agent.user what they want: give the row user_instructions, or set"
                " agent.user.instructions",
                "user_instructions",
            )
        if self.system and all(message["role"] != "system" for message in turns[0]):
            turns[0] = [{"role": "system", "content": self.system}, *turns[0]]
        shown = [tuple(self.aliases.shown(call) for call in calls) for calls in kept]
        tools = self.aliases.schemas
        if own["tools"] is not None:
            tools = [self.aliases.by_own_name(tool) for tool in own["tools"]]
        if self.settings.simulated:  # the turns of another user are other ones
            shown = [tuple(call for calls in shown for call in calls)]
        return Task(
            id=name,
            group=row.text("group", name),
            category=row.text("category", "own"),
            user_turns=tuple(tuple(messages) for messages in turns),
            tools=tuple(tools),
            reference_calls=(*shown, *((),) * (len(turns) - len(shown))),
            reference_answer=_answer_text(own["answers"], self.settings.answer),
            data={"row": {**row.values, "id": name}, "answers": own["answers"], "expected": expected},
            any_turn=self.settings.simulated,
        )

    def _opening(self, row: Row) -> list[Message]:
        given = [key for key in REQUESTS if row.values.get(key) is not None]
        if len(given) != 1:
            raise row.complain(
                f"one of {', '.join(REQUESTS)} is the request; found {', '.join(given) or 'none'}", "messages"
            )
        if given[0] != "messages" and isinstance(row.values[given[0]], str):
            return [{"role": "user", "content": row.text(given[0])}]
        messages = _messages(row, row.json(given[0], list), given[0])
        if not any(message["role"] == "user" for message in messages):
            raise row.complain("there is no user message", given[0])
        return messages

    def _later(self, row: Row) -> list[list[Message]]:
        if row.values.get("user_turns") is None or self.settings.user_turns != "recorded":
            return []
        turns = []
        for index, turn in enumerate(row.json("user_turns", list)):
            field = f"user_turns[{index}]"
            given = [{"role": "user", "content": turn}] if isinstance(turn, str) else turn
            if not isinstance(given, list) or not given:
                raise row.complain("expected a text or a list of messages", field)
            turns.append(_messages(row, given, field))
        return turns

    def _answers(self, row: Row) -> list[Any]:
        value = row.values.get("answer")
        if value is None:
            return []
        answers = value if isinstance(value, list) and self.settings.answer != "json" else [value]
        for answer in answers:
            fault = answer_fault(self.settings.answer, answer)
            if fault is not None:
                raise row.complain(f"the answer {str(answer)[:60]!r} {fault}", "answer")
        return answers

    def _tools(self, row: Row) -> list[str] | None:
        """Own names of the tools that a row offers; None: all."""
        if row.values.get("tools") is None:
            return None
        names: list[str] = []
        for index, tool in enumerate(row.json("tools", list)):
            inner = tool.get("function", tool) if isinstance(tool, dict) else tool
            name = inner.get("name") if isinstance(inner, dict) else inner
            if not isinstance(name, str) or not self.aliases.knows(name):
                known = ", ".join(sorted(self.aliases.own_names))
                raise row.complain(f"the tool {name!r} does not exist; there are: {known}", f"tools[{index}]")
            if self.aliases.own_name(name) in names:
                raise row.complain(f"the tool {name!r} is there twice; take one out", f"tools[{index}]")
            names.append(self.aliases.own_name(name))
        if not names:
            raise row.complain("offers no tool; leave the key out to offer all", "tools")
        return names


def row_id(row: Row) -> str:
    """The id of a row's task; of a row without one, made of its number."""
    return row.text("id", f"task_{row.number}")


def _messages(row: Row, given: Sequence[Any], field: str) -> list[Message]:
    messages = []
    for index, message in enumerate(given):
        where = f"{field}[{index}]"
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise row.complain("expected a message with role and content, both texts", where)
        role = "system" if message.get("role") == "developer" else message.get("role")
        if role not in ("user", "system"):
            raise row.complain(
                f"the role {role!r} has no place in a request; a whole conversation is a trace (traces.path)", where
            )
        messages.append({"role": role, "content": message["content"]})
    return messages


def _answer_text(answers: Sequence[Any], rule: str) -> str | None:
    """The expected answer as a text that the rule takes for right; None where there is none."""
    if not answers:
        return None
    first = answers[0]
    if rule == "json":
        return json.dumps(first)
    if isinstance(first, str):
        return first
    return number_text(first) if isinstance(first, int | float) and not isinstance(first, bool) else json.dumps(first)
