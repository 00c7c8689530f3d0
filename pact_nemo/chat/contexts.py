"""What the model sees of its earlier messages when it speaks again: with their thoughts, or, where its chat template
drops those, without.

Sampled ids stay as they came. A message that loses its thought keeps the sampled ids of what it said aloud, so the
contexts of one episode share all but the thoughts that are gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

KEEP, TEMPLATE = "keep", "template"
EARLIER_THOUGHTS = (KEEP, TEMPLATE)


class ShowsEarlier(Protocol):
    """The part of :class:`pact_nemo.chat.template.ChatFormat` that contexts are made with."""

    @property
    def opened_ids(self) -> list[int]: ...
    def earlier_ids(self, ids: Sequence[int], user: bool) -> list[int] | None: ...


@dataclass
class _Message:
    """An assistant message.

    Attributes:
        start: tokens after x, in the present context, before the thought that the generation prompt opened, or before
            the message itself.
        sampled: its ids, end-of-turn token included.
        shown: the ids that stand for it without its thought; None = as sampled, opened thought included.
        after: ids from behind its end-of-turn token to the end of the next generation prompt.
        user: whether a user has spoken since; None = nothing has followed yet.
    """

    start: int
    sampled: list[int]
    shown: list[int] | None = None
    after: list[int] = field(default_factory=list)
    user: bool | None = None


class Contexts:
    """The contexts of one conversation, one after the other. Each is the one before, cut back to some length, and
    further tokens.

    Attributes:
        length: tokens after x in the present context.

    Args:
        chat: says how an earlier message is shown.
    """

    def __init__(self, chat: ShowsEarlier):
        self._chat = chat
        self._opened = list(chat.opened_ids)
        self._messages: list[_Message] = []
        self.length = 0

    def said(self, ids: Sequence[int]) -> None:
        """The assistant's next message, end-of-turn token included."""
        self._messages.append(_Message(self.length - len(self._opened), list(ids)))
        self.length += len(ids)

    def follow(self, after: Sequence[int], user: bool) -> tuple[int, list[int]]:
        """What the context becomes when the conversation goes on.

        Args:
            after: ids from behind the last message's end-of-turn token to the end of the next generation prompt.
            user: whether a user speaks (else only tools).

        Returns:
            (keep, ids): the first ``keep`` tokens after x stay, ``ids`` follow them. ``keep`` is negative where x
            itself loses the thought that its generation prompt opened.
        """
        messages = self._messages
        messages[-1].after = list(after)
        first = None
        for index, message in enumerate(messages):
            if message.user is None or (user and not message.user):
                shown = self._chat.earlier_ids(message.sampled, user)
                if shown != message.shown and first is None:
                    first = index
                message.shown, message.user = shown, user
        if first is None:
            keep, ids = self.length, list(after)
        else:
            keep, ids = messages[first].start, []
            for index in range(first, len(messages)):
                message = messages[index]
                message.start = keep + len(ids)
                ids += [*self._opened, *message.sampled] if message.shown is None else message.shown
                closing = len(message.after) - (len(self._opened) if index + 1 < len(messages) else 0)
                ids += message.after[:closing]
        self.length = keep + len(ids)
        return keep, ids
