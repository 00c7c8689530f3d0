"""The turns of a conversation out of its messages: who speaks after whom, and which result answers which call."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from pact_nemo.traces.builder import TraceBuilder
from pact_nemo.traces.chat_messages import Called, ChatMessage, ConversationError
from pact_nemo.traces.schema import ReasoningSegment
from pact_nemo.traces.segments import split_reasoning

Words = tuple[dict[str, str], ...]


def _side(message: ChatMessage) -> str:
    return "user" if message.role in ("user", "system") else message.role


class Assembly:
    """Puts the turns of a conversation together.

    Attributes:
        builder: holds them.
        opening, later, places: as :class:`Conversation` has them.
        closings: user turn -> what the assistant says after its last call.

    Args:
        tools: names of the tools that the row offers.
    """

    def __init__(self, tools: Sequence[str]):
        self.builder = TraceBuilder()
        self.opening: Words = ()
        self.later: list[Words] = []
        self.closings: dict[int, str] = {}
        self.places: list[tuple[str, ...]] = []
        self._tools = set(tools)
        self._begun = False
        self._closing = ""
        self._run: list[ChatMessage] = []  # assistant messages whose calls wait for their results
        self._answered: set[str] = set()

    def take(self, messages: Sequence[ChatMessage]) -> None:
        """Take a whole conversation.

        Raises:
            ConversationError: calls and results don't go together.
        """
        for side, group in groupby(_telling(messages), key=_side):
            found = list(group)
            if side == "tool":
                self._results(found)
                continue
            if self._run:
                self._results([])
            if side == "user":
                self._user(found)
            else:
                self._assistant(found)
        if self._run:
            self._results([])

    def _user(self, messages: Sequence[ChatMessage]) -> None:
        words = tuple({"role": message.role, "content": message.text} for message in messages)
        if not self._begun:
            self.opening = words
            return
        self.builder.user(words, [], self._closing)
        self.later.append(words)
        self._closing = ""

    def _assistant(self, messages: Sequence[ChatMessage]) -> None:
        self._begun = True
        if any(message.calls for message in messages):
            self._run = list(messages)
            return
        self._closing = "\n\n".join(message.text for message in messages if message.text)
        if not self.builder.acted_in(len(self.later)):
            self.builder.assistant([], [], [], len(self.later))
            self.places.append(())
        self.closings[len(self.later)] = self._closing

    def _results(self, messages: Sequence[ChatMessage]) -> None:
        """The results of the calls that wait for them."""
        calls = [called for message in self._run for called in message.calls]
        if not calls:
            raise ConversationError("orphan_result", "a result without a call right before it", messages[0].place)
        observations = _paired(calls, messages, self._answered)
        self._answered.update(called.id for called in calls if called.id is not None)
        self._tools.update(called.call.name for called in calls)
        written = [piece for message in self._run for piece in (message.thought, message.text) if piece]
        segments = [ReasoningSegment(*piece) for piece in split_reasoning("\n\n".join(written), sorted(self._tools))]
        self.builder.assistant(segments, [called.call for called in calls], observations, len(self.later))
        self.places.append(tuple(called.place.field for called in calls))
        self._run, self._closing = [], ""
        self.closings.pop(len(self.later), None)


def _telling(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """The messages without those of an assistant that say and do nothing; a thought counts before its next message."""
    kept: list[ChatMessage] = []
    for message in reversed(messages):
        goes_on = bool(message.thought and kept and kept[-1].role == "assistant")
        if message.role != "assistant" or message.calls or message.text or goes_on:
            kept.append(message)
    return kept[::-1]


def _paired(calls: Sequence[Called], results: Sequence[ChatMessage], answered: set[str]) -> tuple[str, ...]:
    """The results of an assistant message's calls, in the order of the calls.

    A result with an id goes to the call of that id; others go to the calls that are left, in order. Where no call has
    an id, all go by order.

    Args:
        calls: at least one.
        results: the tool messages that follow.
        answered: ids of all earlier calls.

    Raises:
        ConversationError: a call without a result, with two, or a result without a call.
    """
    ids = [called.id for called in calls]
    for index, called in enumerate(calls):
        if called.id is not None and called.id in ids[:index]:
            raise ConversationError("bad_call", f"two calls of one message have the id {called.id!r}", called.place)
    by_id = any(ids)
    found: dict[int, ChatMessage] = {}
    for result in (item for item in results if by_id and item.answers is not None):
        here = result.place.under("tool_call_id")
        if result.answers not in ids:
            known = "has its result already" if result.answers in answered else "is not of the message before"
            reason = "double_result" if result.answers in answered else "orphan_result"
            raise ConversationError(reason, f"the call {result.answers!r} {known}", here)
        index = ids.index(result.answers)
        if index in found:
            raise ConversationError("double_result", f"the call {result.answers!r} has two results", here)
        found[index] = result
    for result in (item for item in results if not by_id or item.answers is None):
        left = next((index for index in range(len(calls)) if index not in found), None)
        if left is None:
            message = f"one result more than the {len(calls)} calls before it"
            raise ConversationError("double_result", message, result.place)
        found[left] = result
    for index, called in enumerate(calls):
        _check_result(called, found.get(index))
    return tuple(found[index].text for index in range(len(calls)))


def _check_result(called: Called, result: ChatMessage | None) -> None:
    name = called.call.name
    if result is None:
        raise ConversationError("unanswered_call", f"the call of {name!r} has no result", called.place)
    if result.tool not in (None, "", name):
        raise ConversationError(
            "wrong_result", f"a result of {result.tool!r} answers the call of {name!r}", result.place.under("name")
        )
