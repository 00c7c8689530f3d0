"""One-step-off generation (``trainer.overlap``): the next step's rollouts are sampled while this step's update runs.

They come from the weights of before that update, one version behind the policy that trains on them. pi_old of the
clipped ratio stays the policy that the update starts from; the sampler correction (``rollout.importance=tis``),
min(pi_old / pi_sampler, cap) per token, covers the weights' lag as it covers the sampler's other numerics: the
decoupled objective of asynchronous PPO.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pact_nemo.errors import Interrupted
from pact_nemo.rollouts.store import parse_rollout
from pact_nemo.rollouts.types import Rollout

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """Rollouts of one step, and the seconds that their generation took (None: another process made them, before a
    resume).
    """

    step: int
    rollouts: list[Rollout]
    seconds: float | None


class Ahead:
    """At most one batch in the making or waiting to be taken. Lives on rank 0; on other ranks nothing ever starts."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._batch: Batch | None = None
        self._failure: BaseException | None = None

    def start(self, step: int, sample: Callable[[], list[Rollout]]) -> None:
        """Have ``sample`` called in a thread, for ``step``."""
        self._batch = self._failure = None

        def work() -> None:
            started = time.perf_counter()
            try:
                self._batch = Batch(step, sample(), time.perf_counter() - started)
            except BaseException as error:  # raised by finish, in the thread that waits
                self._failure = error

        # a daemon: when the update fails, nobody waits for episodes that nobody will train on
        self._thread = threading.Thread(target=work, name="ahead", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait until the batch is there. Call before the servers change weights: a batch is of one version.

        Raises what generation raised, but for Interrupted: what was being sampled is dropped, and a resumed run samples
        it from newer weights.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        failure, self._failure = self._failure, None
        if isinstance(failure, Interrupted):
            log.warning("the rollouts that were being sampled ahead are dropped: %s", failure)
        elif failure is not None:
            raise failure

    def take(self, step: int) -> Batch | None:
        """The batch made for ``step``, once; None if there is none."""
        batch, self._batch = self._batch, None
        return batch if batch is not None and batch.step == step else None

    def state(self) -> dict[str, Any] | None:
        """What a checkpoint keeps of a finished batch: its rollouts were sampled from weights that a resumed run no
        longer has.
        """
        return (
            None
            if self._batch is None
            else {"step": self._batch.step, "rollouts": [rollout.to_dict() for rollout in self._batch.rollouts]}
        )

    def load_state(self, state: dict[str, Any] | None, file: str) -> None:
        """Raises DataError, with ``file`` in its message, for a row that is no rollout."""
        if state is not None:
            self._batch = Batch(
                state["step"], [parse_rollout(row, file, i + 1) for i, row in enumerate(state["rollouts"])], None
            )
