"""Episodes that are played without a model: given calls, given closing words."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from pact_nemo.environments.base import Environment, Outcome, Session, Task, ToolCall
from pact_nemo.environments.sessions import start_scripted
from pact_nemo.errors import EnvironmentFailure, ToolCallError
from pact_nemo.traces.augment import CLOSING, closings
from pact_nemo.traces.schema import Trace

#: a trace, and what is said after its last call and at the end of each user turn behind it
Expert = tuple[Trace, tuple[str, ...]]


@dataclass(frozen=True)
class Script:
    """What is done in an episode.

    Attributes:
        calls: per user turn, per assistant turn, its calls.
        closing: what is said at the end of the last user turn that has calls.
        earlier: what is said at the end of those before; where one is missing, ``closing``.
        behind: what is said at the end of the user turns behind it, the last for ever; empty: ``closing``.
        later: what the user says in each user turn after the request, where a model plays the user otherwise.
    """

    calls: tuple[tuple[tuple[ToolCall, ...], ...], ...]
    closing: str = CLOSING
    earlier: tuple[str, ...] = ()
    behind: tuple[str, ...] = ()
    later: tuple[tuple[dict[str, str], ...], ...] = ()

    @classmethod
    def of_trace(cls, trace: Trace, answers: Sequence[str], task: Task) -> Script:
        """``answers``: what is said after the trace's last call, and at the end of each user turn behind it."""
        last = max(turn.user_turn for turn in trace.turns)
        turns: list[list[tuple[ToolCall, ...]]] = [[] for _ in range(1 + last)]
        for turn in trace.turns:
            if turn.calls:
                turns[turn.user_turn].append(turn.calls)
        said = tuple(itertools.islice(closings(trace, answers, task), last + max(len(answers), 1)))
        return cls(tuple(map(tuple, turns)), said[last], said[:last], said[last + 1 :], trace.later_user_turns)

    def said(self, user_turn: int) -> str:
        """What closes a user turn."""
        said = (*self.earlier, *[self.closing] * (len(self.calls) - len(self.earlier)), *self.behind)
        return said[min(user_turn, len(said) - 1)] if said else self.closing

    @classmethod
    def of_reference(cls, task: Task) -> Script:
        """The task's reference calls, one a turn, then its reference answer."""
        return cls(
            tuple(tuple((call,) for call in calls) for calls in task.reference_calls),
            task.reference_answer or CLOSING,
        )


NOTHING = Script(())


@dataclass(frozen=True)
class Play:
    """What an episode gave.

    Attributes:
        calls: that were made, in order.
        observations: of each of them.
        outcome: the verdict; None where the episode failed.
        failure: why it failed; None where it did not.
    """

    calls: tuple[ToolCall, ...]
    observations: tuple[str, ...]
    outcome: Outcome | None
    failure: str | None = None

    @property
    def score(self) -> float:
        """Of the verdict; 0 without one."""
        return self.outcome.score if self.outcome is not None else 0.0

    @property
    def success(self) -> bool:
        return self.outcome is not None and self.outcome.success


class Playing:
    """An episode under way, one assistant turn at a time.

    Raises:
        EnvironmentFailure: (on opening) the environment can't start it.
    """

    def __init__(self, environment: Environment, task: Task, script: Script):
        self.session: Session = start_scripted(environment, task, script.later)
        self._script = script
        self._turns = [(index, calls) for index, turn in enumerate(script.calls) for calls in turn]
        self._user_turn = 0
        self._calls: list[ToolCall] = []
        self._seen: list[str] = []
        self._failure: str | None = None

    def step(self) -> bool:
        """Make the next assistant turn's calls; False where there is none, or the episode failed."""
        if not self._turns or self._failure is not None:
            return False
        user_turn, calls = self._turns.pop(0)
        try:
            while self._user_turn < user_turn:
                if self.session.next_user_turn(self._script.said(self._user_turn)) is None:
                    self._failure = f"there are calls of user turn {user_turn + 1}, and the task ends before"
                    return False
                self._user_turn += 1
            self._calls += calls
            self._seen += self.session.execute(list(calls))
        except (ToolCallError, EnvironmentFailure) as error:
            self._failure = str(error)
        return bool(self._turns)

    def finish(self) -> Play:
        """Say the closing words, hear the verdict, close."""
        outcome = None
        try:
            while self._failure is None and self.session.next_user_turn(self._script.said(self._user_turn)) is not None:
                self._user_turn += 1
            outcome = self.session.outcome() if self._failure is None else None
        except (ToolCallError, EnvironmentFailure) as error:
            self._failure = str(error)
        finally:
            self.session.close()
        return Play(tuple(self._calls), tuple(self._seen), outcome, self._failure)


def play(environment: Environment, task: Task, script: Script) -> Play:
    """A whole episode. Never raises for what tools do."""
    try:
        playing = Playing(environment, task, script)
    except EnvironmentFailure as error:
        return Play((), (), None, str(error))
    while playing.step():
        pass
    return playing.finish()
