"""The thought of an assistant message: what a thinking model writes between ``<think>`` and ``</think>`` before it speaks or calls.

The one place that knows the markers. A thought is never executed, never an answer and never read by a reward.
"""

from __future__ import annotations

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
