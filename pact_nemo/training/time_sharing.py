"""Trainer and engines on the same GPUs, one after the other: moves memory as :mod:`pact_nemo.runtime.turns` allows.

Every method is collective. Where nothing is shared (``rollout.server.time_sharing``) none of them does anything.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pact_nemo.policy.offload import HostMemory, Moved, Offload, trainer_memory
from pact_nemo.policy.policy import MegatronPolicy
from pact_nemo.runtime.collective import on_rank_zero, raise_together
from pact_nemo.runtime.turns import Move, Turns
from pact_nemo.tracking.terminal import RunProgress
from pact_nemo.training.generation import Generator

#: what a move counts as; others: wake
_PHASE = {
    Move.RELEASE: "release",
    Move.RESTORE: "restore",
    Move.SLEEP: "sleep",
    Move.DROP: "sleep",
    Move.END: "sleep",
}


class TimeSharing:
    """Who has the memory, on every rank the same.

    Args:
        generator: its engines; asked on rank 0.
        progress: shows what is moved.
        on: whether they share the trainer's GPUs.

    Attributes:
        state: whose turn it is.
    """

    def __init__(self, generator: Generator, progress: RunProgress, *, on: bool):
        self.on = on
        self.state = Turns()
        self._generator, self._progress = generator, progress
        self._policy: MegatronPolicy | None = None
        self._memory: Offload | None = None
        self._host = HostMemory()
        self._record: dict[str, float] = defaultdict(float)

    def before_policy(self) -> None:
        """Have the engines asleep, with their weights, while a policy is built."""
        if self.on:
            self._do(Move.SLEEP)

    def built(self, policy: MegatronPolicy) -> None:
        """The policy is there, and it is the trainer's turn."""
        self._policy = policy
        if self.on:
            self.state = self.state.after(Move.RESTORE)

    def trainer(self, *, drop: bool = False, end: bool = False) -> None:
        """Have the trainer's memory on the device, and the engines asleep.

        Args:
            drop: a refit comes before the engines are asked again, so they need not keep their weights.
            end: the engines are not asked again. They are ended, which takes no answer from them.
        """
        for move in self.state.to_trainer(drop=drop, end=end) if self.on else ():
            self._do(move)

    def engines(self) -> None:
        """Have the engines awake, and the trainer's memory on the host.

        Raises:
            ServerLost: too few of them wake; see :meth:`pact_nemo.serving.fleet.Fleet.wake`.
        """
        for move in self.state.to_engines(load=False) if self.on else ():
            self._do(move)

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Weights are loaded within: the engines have room for them there, and are awake afterwards.

        Raises:
            ServerLost: as :meth:`engines` does.
        """
        if not self.on:
            yield
            return
        moves = self.state.to_engines(load=True)
        at = moves.index(Move.LOAD)
        for move in moves[:at]:
            self._do(move)
        yield
        self.state = self.state.after(Move.LOAD)
        for move in moves[at + 1 :]:
            self._do(move)

    @property
    def seconds(self) -> float:
        """Of all moves since the last :meth:`taken`."""
        return sum(value for key, value in self._record.items() if key.startswith("time/"))

    def taken(self) -> dict[str, float]:
        """Since the last call: ``time/release``, ``restore``, ``sleep`` and ``wake``; bytes that this rank copied
        between device and host, ``moved/copied``, and gave back or took without a copy, ``moved/dropped``.
        """
        found, self._record = dict(self._record), defaultdict(float)
        return found

    def _do(self, move: Move) -> None:
        after = self.state.after(move)  # refused before anything is moved
        phase, start = _PHASE.get(move, "wake"), time.perf_counter()
        with self._progress.phase(phase, brief=True):
            if move is Move.RELEASE:
                self._together(self._release)
            elif move is Move.RESTORE:
                self._together(self._restore)
            elif move is Move.END:
                self._together(self._generator.close)  # the engines of a node are its first rank's
            elif phase == "sleep":
                on_rank_zero(lambda: self._generator.sleep(drop=move is Move.DROP))
            else:
                part = {Move.MAKE_ROOM: "weights", Move.WAKE_CACHE: "kv_cache"}.get(move)
                on_rank_zero(lambda: self._generator.wake(part))
        self.state = after
        self._record[f"time/{phase}"] += time.perf_counter() - start

    def _together(self, move: Callable[[], Moved | None]) -> None:
        """On every rank; none goes on before all have done it."""
        error: Exception | None = None
        try:
            if (moved := move()) is not None:
                self._record["moved/copied"] += moved.copied
                self._record["moved/dropped"] += moved.dropped
        except Exception as raised:
            error = raised
        raise_together(error)

    def _release(self) -> Moved:
        assert self._policy is not None
        # of now: the first update and a loaded checkpoint make moments
        self._memory = trainer_memory(self._policy.wrapped, self._policy.optimizer, weights=True, host=self._host)
        return self._memory.release()

    def _restore(self) -> Moved:
        assert self._memory is not None
        moved = self._memory.restore()
        self._memory = None
        return moved
