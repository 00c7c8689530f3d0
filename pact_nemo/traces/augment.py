"""More traces for a task that has one (beyond the paper): the same calls in another order, and solutions that the
policy found itself.

A variant is kept only if executing it gives what its trace says: the same observations, and the benchmark's own pass.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pact_nemo.environments.base import Environment, Outcome, Task, ToolCall
from pact_nemo.environments.sessions import start_scripted
from pact_nemo.errors import EnvironmentFailure, ToolCallError
from pact_nemo.rollouts.types import Rollout
from pact_nemo.traces.builder import TraceBuilder
from pact_nemo.traces.schema import ReasoningSegment, Trace, TraceTurn
from pact_nemo.traces.segments import split_reasoning

Kind = Literal["argument_order", "call_order"]
KINDS: tuple[Kind, ...] = ("argument_order", "call_order")
#: what is said after the calls where a task has no reference answer (a trace holds no answer; its calls are what is
#: replayed)
CLOSING = "Done."
_ORDER_WORDS = re.compile(
    r"\b(?:first|firstly|then|next|after|afterwards|before|finally|last|second|third)\b", re.IGNORECASE
)


@dataclass(frozen=True)
class Replay:
    """What executing a trace's calls gave: the observations of each turn and the checker's verdict."""

    observations: tuple[tuple[str, ...], ...]
    outcome: Outcome


def closings(trace: Trace, answers: Sequence[str], task: Task) -> Iterator[str]:
    """What closes each user turn of an episode that plays a trace, without end: before the turn of the last call what
    the trace says there, empty for nothing; then the answers. For an empty one, the words before, or the task's
    reference answer.

    Args:
        answers: what is said after the last call and at the end of each user turn behind it.
    """
    said = [""] * max((turn.user_turn for turn in trace.turns), default=0)
    for turn in trace.turns:
        if turn.user_turn < len(said):
            said[turn.user_turn] = turn.closing_message or turn.said
    yield from said
    words = task.reference_answer or CLOSING
    for answer in answers:
        words = answer or words
        yield words
    yield from itertools.repeat(words)


def replay(environment: Environment, task: Task, trace: Trace, answers: Sequence[str] = ()) -> Replay | None:
    """Execute a trace in a new session; None where the environment can't start it or refuses a call, or the task has
    fewer user turns than the trace.

    Args:
        answers: what is said after the last call and at the end of each user turn behind it (:func:`closings`).
    """
    try:
        session = start_scripted(environment, task, trace.later_user_turns)
    except EnvironmentFailure:
        return None
    try:
        seen: list[tuple[str, ...]] = []
        user_turn, said = 0, closings(trace, answers, task)
        for turn in trace.turns:
            while user_turn < turn.user_turn:
                if session.next_user_turn(next(said)) is None:
                    return None
                user_turn += 1
            seen.append(tuple(session.execute(list(turn.calls))) if turn.calls else ())
        while session.next_user_turn(next(said)) is not None:
            pass
        return Replay(tuple(seen), session.outcome())
    except (ToolCallError, EnvironmentFailure):
        return None
    finally:
        session.close()


def _shuffled(trace: Trace, generator: random.Random) -> Trace:
    def mixed(call: ToolCall) -> ToolCall:
        names = list(call.arguments)
        generator.shuffle(names)
        return ToolCall(call.name, {name: call.arguments[name] for name in names})

    turns = tuple(replace(turn, calls=tuple(mixed(call) for call in turn.calls)) for turn in trace.turns)
    return replace(trace, turns=turns, source=f"{trace.source}+argument_order")


def _has_several_arguments(trace: Trace) -> bool:
    return any(len(call.arguments) > 1 for turn in trace.turns for call in turn.calls)


def _may_swap(turn: TraceTurn) -> bool:
    """A turn whose reasoning speaks of an order keeps it."""
    return len(turn.calls) > 1 and not _ORDER_WORDS.search(turn.reasoning)


def _argument_orders(trace: Trace, generator: random.Random) -> Iterator[Trace]:
    if _has_several_arguments(trace):
        for _ in range(16):
            yield _shuffled(trace, generator)


def _call_orders(trace: Trace, generator: random.Random) -> Iterator[Trace]:
    """One turn's calls permuted at a time."""
    choices: list[tuple[int, tuple[int, ...]]] = []
    for index, turn in enumerate(trace.turns):
        if _may_swap(turn):
            orders = itertools.islice(itertools.permutations(range(len(turn.calls))), 1, 24)
            choices += [(index, order) for order in orders]
    generator.shuffle(choices)
    for index, order in choices:
        turn = trace.turns[index]
        changed = replace(
            turn, calls=tuple(turn.calls[i] for i in order), observations=tuple(turn.observations[i] for i in order)
        )
        yield replace(
            trace, turns=(*trace.turns[:index], changed, *trace.turns[index + 1 :]), source=f"{trace.source}+call_order"
        )


_MAKERS: dict[Kind, Callable[[Trace, random.Random], Iterator[Trace]]] = {
    "argument_order": _argument_orders,
    "call_order": _call_orders,
}

_MAY_CHANGE: dict[Kind, Callable[[Trace], bool]] = {
    "argument_order": _has_several_arguments,
    "call_order": lambda trace: any(map(_may_swap, trace.turns)),
}


def _written(trace: Trace) -> str:
    """What tells two traces apart; argument order counts."""
    return repr(
        [(turn.reasoning, [(call.name, list(call.arguments.items())) for call in turn.calls]) for turn in trace.turns]
    )


def variants(
    environment: Environment, task: Task, trace: Trace, kinds: Sequence[Kind], limit: int, seed: int
) -> list[Trace]:
    """Up to ``limit`` different variants that execution verified, each kind in turn.

    A function of its arguments: the random orders come from ``seed`` and the task's id.
    """
    now = replay(environment, task, trace) if any(_MAY_CHANGE[kind](trace) for kind in kinds) else None
    if now is None or not now.outcome.success:
        return []
    # observations as they come today: the trace's may have been cut to another length
    trace = replace(
        trace,
        turns=tuple(replace(turn, observations=seen) for turn, seen in zip(trace.turns, now.observations, strict=True)),
    )
    generator = random.Random(f"{seed}:{task.id}")
    seen = {_written(trace)}
    found: list[Trace] = []
    streams = [_MAKERS[kind](trace, generator) for kind in kinds]
    while streams and len(found) < limit:
        for stream in list(streams):
            candidate = next(stream, None)
            if candidate is None:
                streams.remove(stream)
                continue
            if len(found) >= limit or _written(candidate) in seen:
                continue
            seen.add(_written(candidate))
            result = replay(environment, task, candidate)
            if (
                result is not None
                and result.outcome.success
                and result.observations == tuple(turn.observations for turn in candidate.turns)
            ):
                found.append(candidate)
    return found


def promoted(task: Task, rollout: Rollout, reasoning_of: Callable[[str], str]) -> Trace | None:
    """A rollout that passed the checker as a trace of source ``policy``; None where it didn't pass, holds a malformed
    call, or makes no call.

    Single user turns only: a rollout does not keep what later user turns said and revealed.

    Args:
        reasoning_of: the text before the calls of an assistant message, e.g. from the tool format's parser.
    """
    if rollout.status != "ok" or rollout.outcome is None or not rollout.outcome.success:
        return None
    if any(turn.call_errors or turn.user_turn for turn in rollout.turns):
        return None
    builder = TraceBuilder()
    names = [tool["name"] for tool in task.tools]
    for turn in rollout.turns:
        if turn.calls:
            pieces = [ReasoningSegment(*piece) for piece in split_reasoning(reasoning_of(turn.text), names)]
            builder.assistant(pieces, turn.calls, turn.observations, 0)
    return builder.build(task.id, "policy", True)


def new_solutions(known: Sequence[Trace], candidates: Sequence[Trace]) -> list[Trace]:
    """The candidates whose calls differ from every known trace's and from each other's, in order."""

    def calls(turns: Sequence[TraceTurn]) -> str:
        return repr(
            [
                [(call.name, sorted(call.arguments.items(), key=lambda item: item[0])) for call in turn.calls]
                for turn in turns
            ]
        )

    seen = {calls(trace.turns) for trace in known}
    fresh = []
    for trace in candidates:
        if calls(trace.turns) not in seen:
            seen.add(calls(trace.turns))
            fresh.append(trace)
    return fresh
