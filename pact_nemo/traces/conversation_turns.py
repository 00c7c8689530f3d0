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

    A result with an id goes to the call of that id; others go to the calls that are left, in order, those that name a
    tool to its calls. Where no call has an id, all go so.

    Args:
        calls: at least one.
        results: the tool messages that follow.
        answered: ids of all earlier calls.

    Raises:
        ConversationError: a call without a result, with two, a result without a call, or of which the call isn't
            known.
    """
    ids = [called.id for called in calls]
    for index, called in enumerate(calls):
        if called.id is not None and called.id in ids[:index]:
            raise ConversationError("bad_call", f"two calls of one message have the id {called.id!r}", called.place)
    by_id = any(ids)
    found: dict[int, ChatMessage] = {}
    rest: list[ChatMessage] = []
    for result in results:
        answers = result.answers if result.answers is not None or result.own_id not in ids else result.own_id
        if not by_id or answers is None:
            rest.append(result)
            continue
        here = result.place.under("tool_call_id" if answers == result.answers else "id")
        if answers not in ids:
            known = "has its result already" if answers in answered else "is not of the message before"
            reason = "double_result" if answers in answered else "orphan_result"
            raise ConversationError(reason, f"the call {answers!r} {known}", here)
        index = ids.index(answers)
        if index in found:
            raise ConversationError("double_result", f"the call {answers!r} has two results", here)
        found[index] = result
    _by_order(calls, rest, found)
    for index, called in enumerate(calls):
        _check_result(called, found.get(index))
    return tuple(found[index].text for index in range(len(calls)))


def _by_order(calls: Sequence[Called], results: Sequence[ChatMessage], found: dict[int, ChatMessage]) -> None:
    """Give results that name no call to the calls that have none in ``found``."""
    waiting = [called.call.name for index, called in enumerate(calls) if index not in found]
    for result in results:
        named = result.answers or result.own_id
        twice = next((name for name in waiting if waiting.count(name) > 1 and result.tool in (None, name)), None)
        if named is not None and twice is not None:
            message = f"no call has the id {named!r}, and {twice!r} is called twice: give the calls their ids"
            raise ConversationError("orphan_result", message, result.place)
        left = [index for index in range(len(calls)) if index not in found]
        if not left:
            message = f"one result more than the {len(calls)} calls before it"
            raise ConversationError("double_result", message, result.place)
        found[next((index for index in left if calls[index].call.name == result.tool), left[0])] = result


def _check_result(called: Called, result: ChatMessage | None) -> None:
    name = called.call.name
    if result is None:
        raise ConversationError("unanswered_call", f"the call of {name!r} has no result", called.place)
    if result.tool not in (None, "", name):
        raise ConversationError(
            "wrong_result", f"a result of {result.tool!r} answers the call of {name!r}", result.place.under("name")
        )
