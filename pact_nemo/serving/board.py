"""Orders to an engine on another node, and what became of them, over the job's store.

While rank 0 generates, all other ranks wait for it in a collective. So an engine's restart can't travel through the
process group: the node's leader has a thread that reads orders here and writes what became of them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from pact_nemo.runtime.hangs import Store


class Do(StrEnum):
    """What can be ordered."""

    START = "start"  #: whatever runs is killed, and a new process started
    STOP = "stop"


@dataclass(frozen=True)
class Order:
    """An order; the numbers of an engine's orders grow."""

    number: int
    do: Do


@dataclass(frozen=True)
class Status:
    """What became of an order.

    Attributes:
        number: of the order.
        url: where the engine answers, once it does.
        failure: why it did not start, or how its process ended.
        start_seconds: from its process' start to its first healthy answer.
        peak_bytes: peak resident size of its processes.
    """

    number: int
    url: str | None = None
    failure: str | None = None
    start_seconds: float | None = None
    peak_bytes: int = 0


class Board:
    """One engine's. Each thread that uses it needs a store of its own: a store answers one question at a time.

    Args:
        store: the job's.
        engine: its number in the job.
    """

    def __init__(self, store: Store, engine: int):
        self._store, self._key = store, f"pact_nemo/engines/{engine}"

    def order(self, order: Order) -> None:
        """Give an order; one that was not begun yet is forgotten."""
        self._store.set(f"{self._key}/order", json.dumps(asdict(order)))

    def ordered(self) -> Order | None:
        """The newest order."""
        row = self._read("order")
        return None if row is None else Order(row["number"], Do(row["do"]))

    def tell(self, status: Status) -> None:
        """Say what became of an order."""
        self._store.set(f"{self._key}/status", json.dumps(asdict(status)))

    def status(self) -> Status | None:
        """What was said last."""
        row = self._read("status")
        return None if row is None else Status(**row)

    def _read(self, what: str) -> dict[str, Any] | None:
        key = f"{self._key}/{what}"
        if not self._store.check([key]):  # get() would wait for it
            return None
        row: dict[str, Any] = json.loads(self._store.get(key))
        return row
