"""The thought of an assistant message: what a thinking model writes between ``<think>`` and ``</think>`` before it speaks or calls.

The one place that knows the markers. A thought is never executed, never an answer and never read by a reward.
"""

from __future__ import annotations

from dataclasses import dataclass

OPENING, CLOSING = "<think>", "</think>"


def split_thought(text: str, opened: bool = False) -> tuple[str, str]:
    """(thought, visible) of an assistant message, both without outer white space.

    The thought is what the message begins with. Without a closing marker the rest of an open thought is all there is: nothing is visible.

    Args:
        text: the message as the model wrote it.
        opened: the generation prompt has opened the thought already, so ``text`` begins inside it. A message with a closing marker and no
            opening one before it is read in the same way.
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
        field: the key of a chat message under which the template takes the thought apart from the content; None: it is part of the content.
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
        """The keys of a chat message for what the policy wrote: ``content``, and ``field`` where the template has one."""
        whole = self.opening + content if self.opened and not content.startswith(self.opening) else content
        if self.field is None:
            return {"content": whole}
        if whole.startswith(self.opening) and self.closing in whole:
            thought, _, visible = whole[len(self.opening) :].partition(self.closing)
        else:  # a thought that isn't laid out as the template does it, or none
            thought, visible = split_thought(whole)
            visible = visible if thought or CLOSING in whole else content
        return {"content": visible, self.field: thought} if CLOSING in whole else {"content": visible}
