"""The door for a logger: what a tracker is, and the recorder that feeds ``metrics.jsonl`` and every tracker.

``metrics.jsonl`` is the run's own record: a failure there ends the run. A tracker shows the same numbers elsewhere: a
failure there never does. All of it runs on rank 0 only.
"""

from __future__ import annotations

import logging
import os
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

import numpy as np

from pact_nemo.errors import Interrupted
from pact_nemo.tracking.jsonl import MetricsLog

log = logging.getLogger(__name__)

Record = dict[str, Any]  #: one line of metrics.jsonl: ``stage``, ``step`` and numbers, None where nothing was divided
PATIENCE = 3  #: calls in a row that a tracker may fail before it is switched off
_SECRET = re.compile(r"(KEY|TOKEN|PASSWORD|SECRET)$")


@dataclass(frozen=True)
class ResumePoint:
    """Where a resumed run goes on.

    Attributes:
        warmup, rl: finished steps of each stage.
        records: every record up to there, in the order they were logged. Nothing else may stay drawn.
        scores: of the evaluations up to there, by name, as :meth:`Tracker.evaluation` gets them.
    """

    warmup: int
    rl: int
    records: Sequence[Record]
    scores: Mapping[str, dict[str, float]]


@dataclass(frozen=True)
class RunFacts:
    """What a tracker is told when the run opens.

    Attributes:
        name: of the run folder, unique below ``run.root``.
        folder: the run folder; a tracker may keep files of its own there.
        config: the resolved settings, nested, as in ``config.yaml``.
        resume: None for a new run.
        say: puts a line into the terminal and ``run.log``.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    resume: ResumePoint | None
    say: Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """How the run ended: ``kind`` is "finished", "interrupted" (a signal; resumable) or "failed"; ``error`` names the
    exception's type, None when finished.
    """

    kind: str
    error: str | None = None


@dataclass
class NoSettings:
    """Of a tracker that has nothing to set."""


class Tracker:
    """Shows a run's numbers somewhere. Subclass it; ``open`` and ``log`` are all that a tracker must have.

    Any method may raise: the run goes on (:class:`Trackers` has the rule). Methods are called from one thread.

    Args:
        settings: an instance of the class's ``Settings``, made from ``tracking.trackers.<name>``.
    """

    Settings: ClassVar[type] = NoSettings  #: a dataclass; its fields are checked when the configuration is read

    def __init__(self, settings: Any):
        self.settings = settings

    @classmethod
    def check(cls, settings: Any) -> None:
        """Called before anything is started. Raises ConfigError where the tracker can't work here (a package, a key or
        a setting is missing), with the remedy. Imports nothing heavy.
        """

    def open(self, run: RunFacts) -> None:
        """The run begins or goes on. On resume: take away what was drawn after ``run.resume``, draw what is missing."""
        raise NotImplementedError

    def log(self, record: Record) -> None:
        """One finished step. ``record["stage"]`` is "warmup" or "rl", and each stage counts ``step`` from 1.
        :func:`scalars` gives what can be drawn.
        """
        raise NotImplementedError

    def evaluation(self, name: str, scores: dict[str, float]) -> None:
        """One held-out evaluation: ``name`` is "base", "before" or "after"; keys are ``eval/<name>/score`` and so on.
        Denominators are those of :class:`pact_nemo.monitoring.held_out_scores.Score`.
        """

    def close(self, outcome: Outcome) -> None:
        """The run ends, however it does. Called once for each ``open`` that returned."""


def scalars(record: Record) -> dict[str, float]:
    """What a curve can be drawn of: the record's numbers without ``step``. Keys of the warm-up stage begin with
    ``warmup/``, because each stage has a step axis of its own.
    """
    prefix = "warmup/" if record["stage"] == "warmup" else ""
    return {prefix + key: value for key, value in record.items() if isinstance(value, int | float) and key != "step"}


def flat_score(name: str, score: Mapping[str, Any]) -> dict[str, float]:
    """A ``Score.to_dict()`` as plain numbers: ``eval/<name>/score``, ``…/metrics/<metric>``, ``…/<category>/score``."""
    flat = {f"eval/{name}/{key}": value for key, value in score.items() if isinstance(value, int | float)}
    flat |= {f"eval/{name}/metrics/{key}": value for key, value in score.get("metrics", {}).items()}
    return flat | {f"eval/{name}/{key}/score": row["score"] for key, row in score.get("categories", {}).items()}


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """A tracker that draws from the global generators (a run id, the wait before a retry) changes no number of the
    run.
    """
    import torch  # slow to import, and readers of metrics don't need it

    ours, numpys, torchs = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(ours)
        np.random.set_state(numpys)
        torch.set_rng_state(torchs)


def _shown(error: BaseException) -> str:
    """Type and first line of an error, without what the environment holds as keys and passwords."""
    text = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]:.300}"
    for name, value in os.environ.items():
        if _SECRET.search(name) and len(value) >= 6:
            text = text.replace(value, f"${name}")
    return text


@dataclass
class _Fed:
    """A tracker and what became of its calls."""

    tracker: Tracker
    opened: bool = False
    off: bool = False
    failures: int = 0
    in_a_row: int = field(default=0)


class Trackers:
    """Writes each record to ``metrics.jsonl``, then hands it to every tracker; rank 0 only, a context manager.

    A tracker whose ``open`` fails is off for this run. One that fails later loses that record and is called again at
    the next; after ``PATIENCE`` failures in a row it is off. The first failure is said, and so is the switching off;
    all are counted. A resumed run opens every tracker anew.

    Args:
        journal: the run's own record, open.
        trackers: by the name that messages have for them.
        run: what ``open`` is called with.
    """

    def __init__(self, journal: MetricsLog, trackers: Mapping[str, Tracker], run: RunFacts):
        self._journal, self._run = journal, run
        self._fed = {name: _Fed(tracker) for name, tracker in trackers.items()}

    @property
    def failures(self) -> dict[str, int]:
        """Failed calls by tracker; only those that failed at all."""
        return {name: fed.failures for name, fed in self._fed.items() if fed.failures}

    def append(self, record: Record) -> None:
        """Record one finished step.

        Raises:
            NumericsError: a value is NaN or Inf; nothing was written.
            OSError: ``metrics.jsonl`` can't be written.
        """
        self._journal.append(record)
        self._each("log", lambda tracker: tracker.log(dict(record)))

    def evaluation(self, name: str, score: Mapping[str, Any]) -> None:
        """Tell the trackers a held-out score (a ``Score.to_dict()``); the run keeps it in ``summary.json``."""
        self._each("evaluation", lambda tracker: tracker.evaluation(name, flat_score(name, score)))

    def _each(self, what: str, call: Callable[[Tracker], None]) -> None:
        for name, fed in self._fed.items():
            if fed.opened and not fed.off:
                self._try(name, fed, what, call)

    def _try(self, name: str, fed: _Fed, what: str, call: Callable[[Tracker], None]) -> bool:
        try:
            with _same_random_numbers():
                call(fed.tracker)
        except (Exception, SystemExit) as error:  # a library's sys.exit ends no run either
            log.info("tracker %s failed in %s", name, what, exc_info=True)
            fed.failures, fed.in_a_row = fed.failures + 1, fed.in_a_row + 1
            fed.off = fed.off or what == "open" or fed.in_a_row >= PATIENCE
            if fed.failures == 1 or (fed.off and what != "close"):
                end = "it is off until a resume" if fed.off else "it is tried again"
                self._run.say(f"warning: tracker {name} failed in {what} ({_shown(error)}); the run goes on, {end}")
            return False
        fed.in_a_row = 0
        return True

    def __enter__(self) -> Trackers:
        self._journal.__enter__()
        for name, fed in self._fed.items():
            fed.opened = self._try(name, fed, "open", lambda tracker: tracker.open(self._run))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._journal.__exit__(kind, error, trace)
        ended = "finished" if kind is None else "interrupted" if issubclass(kind, Interrupted) else "failed"
        outcome = Outcome(ended, kind.__name__ if kind is not None else None)
        for name, fed in self._fed.items():
            if fed.opened:
                self._try(name, fed, "close", lambda tracker: tracker.close(outcome))
            if fed.failures > 1:
                self._run.say(f"warning: {fed.failures} calls of tracker {name} failed")
