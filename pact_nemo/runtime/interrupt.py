"""Leaving in order: SIGTERM (a scheduler's notice), SIGHUP (the terminal is gone) or Ctrl-C ends the run at the next
safe point, with a checkpoint of the last finished step.

Generation is broken off at once (nothing of the step has changed the weights yet); an update under way is finished. A
second Ctrl-C stops without a checkpoint.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

from pact_nemo.errors import Interrupted

EXIT_CODE = 75  #: of a run that was asked to stop and has a checkpoint: EX_TEMPFAIL, try again later
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


class StopRequest:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self._signal: int | None = None

    def __bool__(self) -> bool:
        return self._signal is not None

    @property
    def name(self) -> str:
        return signal.Signals(self._signal).name if self._signal is not None else "another rank's signal"

    def raise_if_set(self) -> None:
        """Raises Interrupted; for code that only this rank runs."""
        if self:
            raise Interrupted(f"{self.name}: stopping")

    def agreed(self) -> bool:
        """Whether any rank was asked to; collective, so that all ranks leave at the same point."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return bool(self)
        asked = torch.tensor([int(bool(self))])  # on the CPU, where gloo is, too
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return bool(asked.item())

    def _take(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Take the signals over for the length of a run, and give them back. (In a thread other than the main one nothing
    can be taken over.)
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    taken = [
        number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
    ]  # `nohup` ignores it
    before = {number: signal.signal(number, request._take) for number in taken}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
