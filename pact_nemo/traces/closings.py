"""The messages that close a trace's user turns, as turns of their own that are taught (``traces.closing``), and the
one that the warm-up teaches (``warmup.closing``).

The paper teaches none, so that no answer leaks into h*. A fixed text leaks nothing. A policy that is taught calls at
every step, and never an end, unlearns how to end.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

from pact_nemo.chat.template import ChatFormat
from pact_nemo.traces.schema import Trace, TraceTurn


@dataclass(frozen=True)
class ClosingTurn(TraceTurn):
    """The assistant message that closes a user turn, taught as a call is."""

    taught: ClassVar[bool] = True


def with_closings(trace: Trace, text: str | None) -> Trace:
    """``trace`` with a taught turn behind the last calls of each user turn. A turn that only says something is such a
    turn already, and is taught as one; one that reasons in place of calling stays as it is.

    Args:
        text: what is said where the trace tells no closing message, and always at its end: h* has no final answer.
            None: nothing is taught, and the trace stays as it is.
    """
    if text is None:
        return trace
    turns: list[TraceTurn] = []
    for index, turn in enumerate(trace.turns):
        last = index == len(trace.turns) - 1
        said, behind = turn.said, turn
        if turn.calls and (turn.user_messages_after or last):
            said = text if last else turn.closing or text
            turns.append(replace(turn, user_messages_after=(), new_tools_after=(), closing=""))
        if said:  # white space around it is none of the template's
            behind = ClosingTurn(
                (), (), (), turn.user_turn, turn.user_messages_after, turn.new_tools_after, closing=said.strip()
            )
        turns.append(behind)
    return replace(trace, turns=tuple(turns))


class Closing(NamedTuple):
    """A closing assistant message of the warm-up.

    Attributes:
        ids: its tokens, the generation prompt and the end-of-turn token included; empty for none.
        taught: which of them are taught: the words and the end-of-turn token.
        opening: how many of the first ones are the generation prompt.
    """

    ids: list[int]
    taught: list[bool]
    opening: int


def closing_ids(chat: ChatFormat, text: str | None) -> Closing:
    """The closing message as the policy writes it: behind an empty thought, whose markers aren't taught, where the
    model thinks. ``traces.closing`` has the same form.
    """
    if text is None:
        return Closing([], [], 0)
    parts, opening = chat.assistant_parts("", text), chat.generation_ids()
    ids, offsets = chat.encode_assistant(parts.text)
    said = len(parts.text) - len(parts.calls)
    taught = [False] * len(opening) + [end > said for _, end in offsets] + [True]
    return Closing([*opening, *ids, chat.end_of_turn_id], taught, len(opening))
