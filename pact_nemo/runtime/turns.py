"""Whose turn it is on GPUs that the trainer and its engines share: a state machine without I/O. What was done is told
to it (:mod:`pact_nemo.training.time_sharing`).

                 --- release -->        --- wake ------------------------------------->
    TRAINER                      NOBODY                                                 ENGINES
                 <-- restore ---        --- make room --> LOADING --- load, wake cache ->
                                        <----------------- sleep, or sleep and drop -----

Both sides are never there together: each way from one to the other leads over NOBODY. Engines that fell asleep without
their weights wake only through LOADING. END, the engines' last move, leads to NOBODY from wherever they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum


class Turn(StrEnum):
    """Who has the memory."""

    TRAINER = "trainer"  #: weights, optimizer and gradients are on the device; the engines sleep
    NOBODY = "nobody"  #: the trainer's are on the host, and the engines sleep
    LOADING = "loading"  #: the engines have memory for their weights, and no cache yet
    ENGINES = "engines"  #: the engines are awake


class Move(StrEnum):
    """What can be done."""

    RELEASE = "release"  #: the trainer's memory to the host
    RESTORE = "restore"  #: and back
    SLEEP = "sleep"  #: the engines keep their weights on the host
    DROP = "drop"  #: the engines sleep without their weights: others come before they wake
    WAKE = "wake"  #: with the weights that they kept
    MAKE_ROOM = "make room"  #: memory for weights that come now
    LOAD = "load"  #: weights
    WAKE_CACHE = "wake cache"  #: memory for keys and values
    END = "end"  #: the engines are ended: nobody asks them again


_ALLOWED: dict[Move, tuple[tuple[Turn, ...], Turn]] = {
    Move.RELEASE: ((Turn.TRAINER,), Turn.NOBODY),
    Move.RESTORE: ((Turn.NOBODY,), Turn.TRAINER),
    Move.SLEEP: ((Turn.ENGINES,), Turn.NOBODY),
    Move.DROP: ((Turn.ENGINES, Turn.LOADING), Turn.NOBODY),
    Move.WAKE: ((Turn.NOBODY,), Turn.ENGINES),
    Move.MAKE_ROOM: ((Turn.NOBODY,), Turn.LOADING),
    Move.WAKE_CACHE: ((Turn.LOADING,), Turn.ENGINES),
}


@dataclass(frozen=True)
class Turns:
    """Where things stand. A run starts with its engines, before there is a trainer.

    Attributes:
        weights: the engines have weights that they may answer with, or have them on the host.
    """

    turn: Turn = Turn.ENGINES
    weights: bool = True

    @property
    def answers(self) -> bool:
        """Whether the engines may be asked."""
        return self.turn is Turn.ENGINES and self.weights

    def after(self, move: Move) -> Turns:
        """The state once ``move`` is done.

        Raises:
            RuntimeError: it can't be done now; nothing may be moved.
        """
        if move is Move.END:
            return Turns(Turn.TRAINER if self.turn is Turn.TRAINER else Turn.NOBODY, weights=False)
        if move is Move.LOAD and self.turn in (Turn.LOADING, Turn.ENGINES):
            return replace(self, weights=True)
        allowed, then = _ALLOWED.get(move, ((), self.turn))
        if self.turn not in allowed or (move in (Move.WAKE, Move.WAKE_CACHE) and not self.weights):
            without = "" if self.weights else ", and the engines have no weights"
            raise RuntimeError(f"{move}: it is the turn of {self.turn}{without}")
        return Turns(then, self.weights and move not in (Move.DROP, Move.MAKE_ROOM))

    def to_trainer(self, *, drop: bool = False, end: bool = False) -> tuple[Move, ...]:
        """The moves until the trainer may compute.

        Args:
            drop: weights are loaded before the engines are asked again, so they keep none.
            end: the engines are not asked again.
        """
        if end:
            return (Move.END,) if self.turn is Turn.TRAINER else (Move.END, Move.RESTORE)
        if self.turn is Turn.TRAINER:
            return ()
        if self.turn is Turn.NOBODY:
            return (Move.RESTORE,)
        return (Move.DROP if drop or self.turn is Turn.LOADING else Move.SLEEP, Move.RESTORE)

    def to_engines(self, *, load: bool) -> tuple[Move, ...]:
        """The moves until the engines may be asked.

        Args:
            load: with weights that are loaded on the way.

        Raises:
            RuntimeError: they sleep without weights, and none are to be loaded.
        """
        if self.turn is Turn.ENGINES:
            return (Move.LOAD,) if load else ()
        if self.turn is Turn.LOADING:
            return (Move.LOAD, Move.WAKE_CACHE)
        if not (load or self.weights):
            raise RuntimeError("the engines sleep without weights; refit them before they are asked")
        first = (Move.RELEASE,) if self.turn is Turn.TRAINER else ()
        return (*first, *((Move.MAKE_ROOM, Move.LOAD, Move.WAKE_CACHE) if load else (Move.WAKE,)))
