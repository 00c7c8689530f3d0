"""Seconds by phase of one step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pact_nemo.tracking.terminal import RunProgress


class Stopwatch:
    """Seconds by phase of one step, ``times["time/<phase>"]``; the phase is also what the terminal shows meanwhile."""

    def __init__(self, progress: RunProgress) -> None:
        self.times: dict[str, float] = {}
        self._progress = progress
        self._start = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str, apart: Callable[[], float] = lambda: 0.0) -> Iterator[None]:
        """Time a phase. ``apart``: seconds so far that have names of their own; what they grow by meanwhile is none of
        the phase's.
        """
        start, before = time.perf_counter(), apart()
        try:
            with self._progress.phase(phase, brief=True):
                yield
        finally:
            key = f"time/{phase}"
            self.times[key] = self.times.get(key, 0.0) + time.perf_counter() - start - (apart() - before)

    def total(self) -> float:
        """Seconds since the step began."""
        return time.perf_counter() - self._start
