"""A run in which no rank gets on any more ends, and says which rank the others wait for.

Collectives of gloo and nccl end by a timeout that names nobody, and a rank that generates for an hour is no hang. So
every rank tells the job's store what its main thread is doing and since when; when no rank has got on for the limit,
all of them print who is missing and leave.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

log = logging.getLogger(__name__)

EXIT_CODE = 76  # EX_PROTOCOL: the ranks don't agree any more
_PERIOD_S = 5.0  #: a rank tells the store what it does this often; more often where the limit is short
_SILENT_PERIODS = 4  #: a rank whose sign of life stays the same for so many periods gives none
_HERE = str(Path(__file__).parents[1])

_last: tuple[float, str] = (time.monotonic(), "start")


def beat(place: str | None = None) -> None:
    """This rank got on: a phase, an episode, a micro-batch. ``place`` is what it does from now on; None = still the
    same. Any thread, no cost.
    """
    global _last
    _last = (time.monotonic(), _last[1] if place is None else place)


class Store(Protocol):
    """What is used of torch's stores."""

    def set(self, key: str, value: str) -> None: ...
    def check(self, keys: list[str]) -> bool: ...
    def get(self, key: str) -> bytes: ...


@dataclass(frozen=True)
class Sign:
    """What one rank says of itself.

    Attributes:
        number: of its signs; one that stays the same is none.
        quiet_s: seconds since its main thread got on.
        place: what the main thread does.
        line: where its code is, ``file:line in function``.
        waiting: it waits in torch.distributed for the others.
    """

    number: int
    quiet_s: float
    place: str
    line: str
    waiting: bool

    def __str__(self) -> str:
        return f"{self.place}, {self.line}, for {self.quiet_s:.0f} s"


def whereabouts(frame: FrameType | None) -> tuple[str, bool]:
    """``file:line in function`` of our own innermost frame (else the innermost of all), and whether the innermost waits
    in torch.distributed.
    """
    waiting, found = False, frame
    if frame is not None:
        waiting = f"{os.sep}torch{os.sep}distributed{os.sep}" in frame.f_code.co_filename
        while found is not None and not found.f_code.co_filename.startswith(_HERE):
            found = found.f_back
    found = found or frame
    if found is None:
        return "unknown", False
    name = found.f_code.co_filename
    short = (
        name[len(os.path.dirname(_HERE)) + 1 :]
        if name.startswith(_HERE)
        else name.rpartition(f"site-packages{os.sep}")[2]
    )
    return f"{short}:{found.f_lineno} in {found.f_code.co_name}", waiting


def verdict(signs: dict[int, Sign | None], silent: set[int], limit_s: float) -> str | None:
    """Who is missing, in words; None while a rank still gets on.

    Args:
        signs: rank -> its newest sign; None: it never gave one.
        silent: ranks whose sign stays the same.
        limit_s: seconds in which a rank has to get on.
    """
    heard = {rank: sign for rank, sign in signs.items() if sign is not None and rank not in silent}
    if any(sign.quiet_s < limit_s for sign in heard.values()):
        return None
    missing = [f"rank {rank} never came" for rank, sign in signs.items() if sign is None]
    missing += [
        f"rank {rank} gives no sign of life (stopped, swapped out, or its machine is gone); it was last seen at"
        f" {sign.place}, {sign.line}"
        for rank, sign in signs.items()
        if sign is not None and rank in silent
    ]
    busy = [
        f"rank {rank} is not waiting for the others but at {sign}" for rank, sign in heard.items() if not sign.waiting
    ]
    found = (
        missing
        or busy
        or [
            "all ranks wait for each other, at different places:"
            f" {'; '.join(f'rank {r}: {s}' for r, s in heard.items())}"
        ]
    )
    waiting = [f"rank {rank}: {sign}" for rank, sign in heard.items() if sign.waiting]
    text = f"no rank got on for {limit_s:g} s (policy.init_timeout_s): {'; '.join(found)}"
    return text + (f". Waiting: {'; '.join(waiting[:4])}{'; …' if len(waiting) > 4 else ''}" if missing or busy else "")


class HangWatch(threading.Thread):
    """Tells the store of this rank, and ends the process when no rank gets on. A daemon that is stopped before the
    interpreter ends: a thread that is inside the store's C++ code at that moment aborts the whole process.

    Args:
        store: of the whole job; used by this thread only.
        rank, world: of this process, and of the job.
        limit_s: see :func:`verdict`.
    """

    def __init__(self, store: Store, rank: int, world: int, limit_s: float):
        super().__init__(name="hang-watch", daemon=True)
        self._store, self._rank, self._world, self._limit_s = store, rank, world, limit_s
        self._period = min(_PERIOD_S, limit_s / (2 * _SILENT_PERIODS))
        self._seen: dict[int, tuple[int, float]] = {}  # rank -> number of its newest sign, when that was first seen
        self._main = threading.main_thread().ident
        self._stopped = threading.Event()
        atexit.register(self.stop)

    def stop(self) -> None:
        """Watch no longer; returns when the thread has left the store, or after a second."""
        self._stopped.set()
        if self.is_alive():
            self.join(1.0)

    def run(self) -> None:
        number = 0
        try:
            while not self._stopped.is_set():
                number += 1
                sign = self._sign(number)
                self._store.set(f"sign/{self._rank}", json.dumps(asdict(sign)))
                if (
                    sign.quiet_s >= self._limit_s - (_SILENT_PERIODS + 1) * self._period
                ):  # look a little earlier: silence takes time to see
                    self._look()
                self._stopped.wait(self._period)
        except Exception as error:  # the store is gone: the job is ending, or will by the collectives' own timeout
            log.info("hang watch of rank %d: %s", self._rank, error)

    def _sign(self, number: int) -> Sign:
        at, place = _last
        line, waiting = whereabouts(sys._current_frames().get(self._main) if self._main is not None else None)
        return Sign(number, time.monotonic() - at, place, line, waiting)

    def _look(self) -> None:
        signs: dict[int, Sign | None] = {rank: self._read(rank) for rank in range(self._world)}
        now, silent = time.monotonic(), set()
        for rank, sign in signs.items():
            number = sign.number if sign is not None else 0
            if self._seen.get(rank, (-1, 0.0))[0] != number:
                self._seen[rank] = (number, now)
            elif now - self._seen[rank][1] >= _SILENT_PERIODS * self._period:
                silent.add(rank)
        problem = verdict(signs, silent, self._limit_s)
        if problem is not None:
            with contextlib.suppress(OSError, ValueError):  # nobody may be there to read it
                print(
                    f"rank {self._rank}: {problem}. This process ends here; what was checkpointed stands: --resume",
                    file=sys.stderr,
                    flush=True,
                )
            time.sleep(
                3 * self._period
            )  # the others see it too, before connections that break tell them something else
            os._exit(EXIT_CODE)  # the main thread can't be woken

    def _read(self, rank: int) -> Sign | None:
        key = f"sign/{rank}"
        if not self._store.check([key]):
            return None
        row: dict[str, Any] = json.loads(self._store.get(key))
        return Sign(**row)
