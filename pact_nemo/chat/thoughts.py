"""The thought of an assistant message: what a thinking model writes between ``<think>`` and ``</think>`` before it
speaks or calls.

The one place that knows the markers. A thought is never executed, never an answer and never read by a reward.

Rules, which every reader of messages shares:

- ``<think>`` opens a thought anywhere in a message; the first ``</think>`` after it closes it. An unclosed thought runs
  to the message's end.
- ``</think>`` without an opening marker closes a thought that was open when the message began. Everything before it is
  thought.
- A message that is thought only has an empty visible text. It asks for nothing, so it is a final message with an empty
  answer.
- A marker within an argument of a call is data (:class:`VisibleText` leaves that to the reader of calls).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

OPENING, CLOSING = "<think>", "</think>"
MARKER = "</?think>"  #: regular expression of either marker
_MARKER = re.compile(MARKER)


class WasThought(Exception):
    """A closing marker without an opening one: everything before it was thought, and what was read of it doesn't
    count.
    """


class VisibleText:
    """Walks over what a message says outside of its thoughts, in time linear in its length.

    Attributes:
        position: where the next search begins; a reader moves it behind what it has read.

    Args:
        text: the message as the model wrote it.
        opened: the generation prompt has opened a thought already, so ``text`` begins inside it.
    """

    def __init__(self, text: str, opened: bool = False):
        self.text, self.position = text, 0
        if opened:
            self._close()

    def _close(self) -> None:
        end = self.text.find(CLOSING, self.position)
        self.position = len(self.text) if end < 0 else end + len(CLOSING)

    def search(self, pattern: re.Pattern[str] = _MARKER) -> re.Match[str] | None:
        """The next match of ``pattern`` that is no marker. ``pattern`` has to match the markers, too:
        ``f"{MARKER}|..."``.

        :attr:`position` is behind the match then, or at the text's end.

        Raises:
            WasThought: :attr:`position` is where the visible text begins.
        """
        while (match := pattern.search(self.text, self.position)) is not None:
            self.position = match.end()
            if match.group() == CLOSING:
                raise WasThought
            if match.group() != OPENING:
                return match
            self._close()
        self.position = len(self.text)
        return None


def _pieces(text: str, opened: bool) -> tuple[list[str], list[str]]:
    """(thoughts, visible pieces) of a message, in order."""
    thoughts: list[str] = []
    visible: list[str] = []
    position = before = 0  # before: up to where a closing marker without an opening one made everything thought
    while True:
        if opened:
            end = text.find(CLOSING, position)
            thoughts.append(text[position:] if end < 0 else text[position:end])
            if end < 0:
                break
            position, opened = end + len(CLOSING), False
        match = _MARKER.search(text, position)
        visible.append(text[position:] if match is None else text[position : match.start()])
        if match is None:
            break
        position = match.end()
        opened = match.group() == OPENING
        if not opened:
            before, thoughts, visible = match.start(), [], []
    return [_MARKER.sub("", text[:before]), *thoughts], visible


def thoughts_and_visible(text: str, opened: bool = False) -> tuple[str, str]:
    """(thoughts, visible) of an assistant message, both without outer white space. Several thoughts are joined by blank
    lines.

    Args:
        text: the message as the model wrote it.
        opened: the generation prompt has opened the thought already, so ``text`` begins inside it.
    """
    thoughts, visible = _pieces(text, opened)
    return "\n\n".join(piece for piece in map(str.strip, thoughts) if piece), "".join(visible).strip()


def visible_text(text: str, opened: bool = False) -> str:
    """What an assistant message says outside of its thoughts, without outer white space; arguments as in
    :func:`thoughts_and_visible`.
    """
    return thoughts_and_visible(text, opened)[1]


def split_thought(text: str, opened: bool = False) -> tuple[str, str]:
    """(thought, visible) of an assistant message, both without outer white space: as chat templates part it, at the
    thought that it begins with.

    Without a closing marker the rest of an open thought is all there is: nothing is visible. Markers further on stay
    where they are, because they may be an argument's; :func:`visible_text` takes every thought out.

    Args:
        text: the message as the model wrote it.
        opened: the generation prompt has opened the thought already, so ``text`` begins inside it. A message with a
            closing marker and no opening one before it is read in the same way.
    """
    body = text.lstrip()
    if body.startswith(OPENING):
        body, opened = body[len(OPENING) :], True
    closing, opening = body.find(CLOSING), body.find(OPENING)
    if not opened and not (closing >= 0 and (opening < 0 or closing < opening)):
        return "", text.strip()
    thought, _, visible = body.partition(CLOSING)
    return thought.strip(), visible.strip()


@dataclass(frozen=True)
class ThoughtStyle:
    """How a model writes its thoughts, as its chat template shows it.

    Attributes:
        opening: text before a thought, e.g. ``<think>\\n``.
        closing: text between a thought and what is visible, e.g. ``\\n</think>\\n\\n``: the switch to the call.
        opened: the generation prompt ends with ``opening``, so the policy begins inside the thought.
        field: the key of a chat message under which the template takes the thought apart from the content; None: it is
            part of the content.
    """

    opening: str
    closing: str
    opened: bool
    field: str | None

    @property
    def written(self) -> str:
        """The part of ``opening`` that the policy writes itself."""
        return "" if self.opened else self.opening

    def message(self, content: str) -> dict[str, str]:
        """The keys of a chat message for what the policy wrote: ``content``, and ``field`` where the template has
        one.
        """
        whole = self.opening + content if self.opened and not content.startswith(self.opening) else content
        if self.field is None:
            return {"content": whole}
        if whole.startswith(self.opening) and self.closing in whole:
            thought, _, visible = whole[len(self.opening) :].partition(self.closing)
        else:  # a thought that isn't laid out as the template does it, or none
            thought, visible = split_thought(whole)
            visible = visible if thought or CLOSING in whole else content
        return {"content": visible, self.field: thought} if CLOSING in whole else {"content": visible}
