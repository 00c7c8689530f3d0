"""Annealing of the component-aware SFT term: m_n(s) of eq. 9-11 and every row of the paper's tables 4 and 6."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np

from pact_nemo.objective.components import CALL, REASONING

TOP_LEVEL = 4  #: L4, the longest reasoning prefix
REASONING_SCHEDULES = ("none", "fixed", "token", "segment", "whole_trace_token")
CALL_SCHEDULES = ("none", "fixed", "token", "scale")


class Clock(Protocol):
    """How far annealing has come. A schedule reads it, the training loop tells it what happened, and a checkpoint keeps
    it.
    """

    adapts: ClassVar[bool]  #: progress depends on what was observed, not on the step alone

    def progress(self, step: int) -> float:
        """Progress at a step (counted from 0), in [0, 1]."""

    def observe(self, success: float | None, gap: float | None) -> None:
        """Take in one step's success rate and mean privilege gap in nats per token; either may be absent."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, JSON-ready. ``kind`` names the clock."""

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state`. Raises ValueError when it is another kind of clock's."""


def check_kind(state: dict[str, Any], kind: str) -> None:
    """Raises ValueError when a clock's state is not of this kind."""
    if state.get("kind") != kind:
        raise ValueError(f"annealing went by the {state.get('kind')!r} clock so far, not by {kind!r}")


@dataclass
class StepClock:
    """Progress min(s/S, 1): annealing goes by the step.

    Attributes:
        horizon: S in steps.
        given: somebody set the horizon. False: it is the length of the run, and :meth:`load` goes on with the horizon
            of the checkpoint. A run that is made longer so brings nothing back that was annealed away.

    Raises:
        ValueError: a horizon below 1.
    """

    horizon: int
    given: bool = True
    kind: ClassVar[str] = "fixed"
    adapts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.horizon < 1:
            raise ValueError(f"horizon is {self.horizon}; annealing needs at least one step")

    def progress(self, step: int) -> float:
        return min(step / self.horizon, 1.0)

    def observe(self, success: float | None, gap: float | None) -> None:
        """Nothing: only the step counts."""

    def state(self) -> dict[str, Any]:
        return {"kind": self.kind, "horizon": self.horizon}

    def load(self, state: dict[str, Any]) -> None:
        check_kind(state, self.kind)
        if not self.given:
            self.horizon = int(state["horizon"])


@dataclass(frozen=True)
class AnnealState:
    """How far annealing has come: ``progress`` = min(s/S, 1). What shrinks with it is a function of this number alone.

    Raises:
        ValueError: progress outside [0, 1].
    """

    progress: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.progress <= 1.0:
            raise ValueError(f"annealing progress {self.progress} is not in [0, 1]")

    @property
    def level(self) -> int:
        """Reasoning prefix level: L4, L3, L2, L1, L0 in five equal stretches, [0, 1/5) to [4/5, 1].

        k/5 has one nearest double and five times it is k again, so that the boundaries are exact.
        """
        return TOP_LEVEL - min(TOP_LEVEL, int((TOP_LEVEL + 1) * self.progress))

    def scale(self, start: float, end: float) -> float:
        """lambda_a(s) = start - (start - end) progress (eq. 11)."""
        return start - (start - end) * self.progress

    def kept(self, count: int) -> int:
        """ceil((1 - progress) count): tokens that a token schedule keeps of ``count``."""
        # (1 - 0.7) * 10 is 3.0000000000000004 in floating point; the slack is far below 1/S for any S
        return math.ceil((1.0 - self.progress) * count - 1e-9)


@dataclass(frozen=True)
class TraceSchedule:
    """Which trace tokens are taught at step s, and how strongly. What is annealed is linear in the progress that
    ``clock`` tells.

    With :class:`StepClock` that is min(s/S, 1), the paper's schedule; the attributes below are written for it.

    Attributes:
        reasoning: ``none`` teaches no reasoning; ``fixed`` all of it up to ``fixed_level`` at every step; ``segment``
            the prefix level annealed L4 -> L0 in five equal stretches (the paper's choice); ``token`` the first ceil((1
            - s/S) n) of each turn's n reasoning tokens; ``whole_trace_token`` the first ceil((1 - s/S) n) of the n
              reasoning and call tokens of the whole trace.
        call: ``none``; ``fixed`` weight ``call_start`` at every step; ``scale`` lambda_a(s) of eq. 11 (the paper's
            choice; calls are never shortened); ``token`` the first ceil((1 - s/S) n) of each turn's n call tokens at
            weight ``call_start``. With ``whole_trace_token`` the cut is the whole trace's and this only says the weight
            (``token`` like ``fixed``).
        reasoning_scale: weight of an active reasoning token.
        fixed_level: of ``reasoning=fixed``.
        call_start, call_end: lambda_start and lambda_end.
        clock: tells the progress at a step.

    Raises:
        ValueError: an unknown schedule name, a negative weight or a level outside 0..4.
    """

    reasoning: str = "segment"
    call: str = "scale"
    reasoning_scale: float = 1.0
    fixed_level: int = TOP_LEVEL
    call_start: float = 0.8
    call_end: float = 0.2
    clock: Clock = field(kw_only=True)

    def __post_init__(self) -> None:
        if self.reasoning not in REASONING_SCHEDULES:
            raise ValueError(f"reasoning schedule {self.reasoning!r} is none of {', '.join(REASONING_SCHEDULES)}")
        if self.call not in CALL_SCHEDULES:
            raise ValueError(f"call schedule {self.call!r} is none of {', '.join(CALL_SCHEDULES)}")
        if min(self.reasoning_scale, self.call_start, self.call_end) < 0.0:
            raise ValueError(
                "a negative weight would unteach the trace: reasoning_scale, call_start and call_end must be >= 0"
            )
        if not 0 <= self.fixed_level <= TOP_LEVEL:
            raise ValueError(f"fixed_level is {self.fixed_level}; levels are 0 to {TOP_LEVEL}")

    def state(self, step: int) -> AnnealState:
        """Annealing state at a step (counted from 0)."""
        return AnnealState(self.clock.progress(step))

    def level(self, step: int) -> int:
        """Active prefix level; -1 when no reasoning is taught. Token schedules have no level and report
        ``TOP_LEVEL``.
        """
        if self.reasoning == "none":
            return -1
        if self.reasoning == "fixed":
            return self.fixed_level
        return self.state(step).level if self.reasoning == "segment" else TOP_LEVEL

    def call_weight(self, step: int) -> float:
        """lambda_a(s) (eq. 11), or the constant of the other schedules."""
        if self.call == "none":
            return 0.0
        return self.state(step).scale(self.call_start, self.call_end) if self.call == "scale" else self.call_start

    def weights(self, component: np.ndarray, level: np.ndarray, turn: np.ndarray, step: int) -> np.ndarray:
        """m_n(s) of each trace token.

        Args:
            component: [H] 0 other, 1 observation, 2 call, 3 reasoning.
            level: [H] lowest prefix level that contains a reasoning token; -1 = in none (previews of the literal call).
            turn: [H] trace turn of each token.

        Returns:
            [H] float64; 0 for everything that is neither active reasoning nor an active call.

        Raises:
            ValueError: the three differ in shape.
        """
        if not component.shape == level.shape == turn.shape:
            raise ValueError(f"component {component.shape}, level {level.shape} and turn {turn.shape} differ in shape")
        state = self.state(step)
        reasoning = (component == REASONING) & (level >= 0) & (level <= self.level(step))
        call = (component == CALL) & (self.call != "none")
        if self.reasoning == "whole_trace_token":
            prefix = _leading(reasoning | call, np.zeros_like(turn), state)
            reasoning, call = reasoning & prefix, call & prefix
        else:
            if self.reasoning == "token":
                reasoning = _leading(reasoning, turn, state)
            if self.call == "token":
                call = _leading(call, turn, state)
        return self.reasoning_scale * reasoning + self.call_weight(step) * call


def _leading(mask: np.ndarray, groups: np.ndarray, state: AnnealState) -> np.ndarray:
    """[H] True on the first ``state.kept(n)`` of the n masked tokens of each group."""
    out = np.zeros(len(mask), dtype=bool)
    for group in np.unique(groups[mask]):
        index = np.flatnonzero(mask & (groups == group))
        out[index[: state.kept(len(index))]] = True
    return out
