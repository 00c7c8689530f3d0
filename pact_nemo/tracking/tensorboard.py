"""TensorBoard event files in ``tensorboard/`` of the run folder."""

from __future__ import annotations

import importlib.util
import shutil
from typing import Any

from pact_nemo.errors import ConfigError
from pact_nemo.tracking.base import Outcome, Record, RunFacts, Tracker, scalars

FOLDER = "tensorboard"


class TensorBoardTracker(Tracker):
    """Draws every number of every step. A resumed run's files are written anew from the kept records, because
    TensorBoard's own ``purge_step`` knows one step count only, and here each stage has its own.
    """

    @classmethod
    def check(cls, settings: Any) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise ConfigError(
                "tracking.trackers.tensorboard: the package tensorboard is not installed; pip install tensorboard, or"
                " set tracking.trackers.tensorboard=null"
            )

    def open(self, run: RunFacts) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        if run.resume is not None:
            shutil.rmtree(run.folder / FOLDER, ignore_errors=True)
        self._board = SummaryWriter(str(run.folder / FOLDER))
        for record in run.resume.records if run.resume is not None else ():
            self.log(record)

    def log(self, record: Record) -> None:
        for key, value in scalars(record).items():
            self._board.add_scalar(key, value, record["step"])

    def close(self, outcome: Outcome) -> None:
        self._board.close()


TRACKER = TensorBoardTracker
