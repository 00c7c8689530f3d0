"""Which conversation belongs to which task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from pact_nemo.environments.base import ToolCall
from pact_nemo.errors import DataError

Message = dict[str, str]


class TurnLike(Protocol):
    """A turn of a conversation."""

    @property
    def calls(self) -> Sequence[ToolCall]: ...
    @property
    def user_turn(self) -> int: ...


class ConversationLike(Protocol):
    """What is read of an imported conversation, :class:`pact_nemo.traces.conversations.Conversation`."""

    @property
    def file(self) -> str: ...
    @property
    def line(self) -> int: ...
    @property
    def opening(self) -> Sequence[Message]: ...
    @property
    def user_turns(self) -> Sequence[Sequence[Message]]: ...
    @property
    def turns(self) -> Sequence[TurnLike]: ...
    @property
    def task_id(self) -> str | None: ...
    @property
    def info(self) -> Mapping[str, Any]: ...
    @property
    def places(self) -> Sequence[Sequence[str]]: ...


def conversation_id(conversation: ConversationLike) -> str:
    """The id of a conversation's own task."""
    return conversation.task_id if conversation.task_id is not None else f"conversation_{conversation.line}"


def first_of_each(conversations: Sequence[ConversationLike]) -> list[ConversationLike]:
    """The first conversation of each task. A second one is another trace of it, not another task.

    Raises:
        DataError: a later one asks for something else, or has other ``info`` for the tools: its calls would be taught
            under the other's request, in the other's world.
    """
    first: dict[str, ConversationLike] = {}
    for each in conversations:
        other = first.setdefault(conversation_id(each), each)
        fault = "begins with other words" if user_words(other.opening) != user_words(each.opening) else None
        if fault is None and each.info and each.info != other.info:
            fault = "has other info"
        if fault is not None:
            raise DataError(
                f"the conversation of line {other.line} has the task_id {each.task_id!r} too, and {fault}; give each"
                " request an id of its own",
                file=each.file,
                line=each.line,
                field="task_id",
            )
    return list(first.values())


class Conversations:
    """Which conversation belongs to a task: the one that names it, else the one that begins with its user's words."""

    def __init__(self, conversations: Sequence[ConversationLike]):
        self._by_id: dict[str, ConversationLike] = {}
        self._taken: dict[str, str] = {}  # words -> id of the first task that begins with them
        self._by_words: dict[str, ConversationLike] = {}
        for conversation in conversations:
            if conversation.task_id is not None:
                self._by_id.setdefault(conversation.task_id, conversation)
            else:
                self._by_words.setdefault(user_words(conversation.opening), conversation)

    def of(self, task_id: str, opening: Sequence[Message]) -> ConversationLike | None:
        """The conversation of a task; None where there is none.

        Raises:
            DataError: it names no task, and two tasks begin with its words.
        """
        words = user_words(opening)
        unnamed = self._by_words.get(words)
        if unnamed is not None:
            other = self._taken.setdefault(words, task_id)
            if other != task_id:
                raise DataError(
                    f"the tasks {other!r} and {task_id!r} begin with the same words, and the conversation with them"
                    " names none of both: give it a task_id",
                    file=unnamed.file,
                    line=unnamed.line,
                    field="task_id",
                )
        return self._by_id.get(task_id, unnamed)


def user_words(messages: Sequence[Message]) -> str:
    """What the user says in some messages, as a key: the system message may differ."""
    return "\n".join(message["content"].strip() for message in messages if message["role"] == "user")
