"""Seconds by phase of one step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from pact_nemo.tracking.terminal import RunProgress


class Stopwatch:
    """Seconds by phase of one step, ``times["time/<phase>"]``; the phase is also what the terminal shows meanwhile."""

    def __init__(self, progress: RunProgress) -> None:
        self.times: dict[str, float] = {}
        self._progress = progress
        self._start = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            with self._progress.phase(phase, brief=True):
                yield
        finally:
            key = f"time/{phase}"
            self.times[key] = self.times.get(key, 0.0) + time.perf_counter() - start

    def total(self) -> float:
        """Seconds since the step began."""
        return time.perf_counter() - self._start
