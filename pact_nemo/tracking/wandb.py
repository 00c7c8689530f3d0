"""Weights & Biases. Keys come from ``WANDB_API_KEY`` or the netrc file, never from a setting."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import netrc
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast
from urllib.parse import urlparse

from pact_nemo.config.ranges import Ranges
from pact_nemo.errors import ConfigError
from pact_nemo.runtime.files import write_json_atomic
from pact_nemo.tracking.base import Outcome, Record, RunFacts, Tracker, scalars

STATE = "wandb_run.json"  #: in the run folder: which W&B run this is, and what it was given
SUPERSEDED = "wandb-superseded"  #: in the run folder: offline runs whose points a resume took back
MODES = ("online", "offline")
EXIT_CODES = {"finished": 0, "interrupted": 75, "failed": 1}


@dataclass
class WandbSettings:
    """``tracking.trackers.wandb``."""

    project: str = "pact_nemo"
    entity: str | None = None  #: user or team; None = the default of the account
    group: str | None = None  #: runs that are shown together, e.g. the seeds of one method
    tags: list[str] = field(default_factory=list)
    mode: str | None = None  #: "online" or "offline" (files only, for ``wandb sync``); None = WANDB_MODE, else online
    init_timeout_s: float = 60.0  #: seconds that the start may take
    finish_timeout_s: float = 60.0  #: seconds that the upload may take at the end; the rest stays on disk

    ranges: ClassVar[Ranges] = {"init_timeout_s": "> 0", "finish_timeout_s": "> 0"}


def _mode(settings: WandbSettings) -> str:
    return settings.mode or os.environ.get("WANDB_MODE") or "online"


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class WandbTracker(Tracker):
    """One W&B run per training run, as long as nothing has to be taken back.

    W&B has no call that deletes points of a history. So a resume goes on with the same W&B run only where that run
    was closed properly and holds nothing but kept records. Otherwise a new W&B run gets every kept record, and the old
    one is named as superseded.
    """

    Settings: ClassVar[type] = WandbSettings

    @classmethod
    def check(cls, settings: WandbSettings) -> None:
        key = "tracking.trackers.wandb"
        if importlib.util.find_spec("wandb") is None:
            raise ConfigError(f"{key}: the package wandb is not installed; pip install wandb, or set {key}=null")
        mode = _mode(settings)
        if mode not in MODES:
            raise ConfigError(f"{key}.mode={mode} (or WANDB_MODE): must be one of {', '.join(MODES)}")
        if mode == "online" and not _has_key():  # wandb would ask on the terminal, and the run would wait there
            raise ConfigError(
                f"{key}: no key for W&B; set the variable WANDB_API_KEY, run 'wandb login', or set {key}.mode=offline"
            )

    def open(self, run: RunFacts) -> None:
        import wandb  # seconds to import

        self._state = run.folder / STATE
        records = run.resume.records if run.resume is not None else ()
        old = self._read_state() if run.resume is not None else None
        self._id, self._count, self._digest = secrets.token_hex(6), 0, hashlib.sha256()
        if old is not None and _goes_on(old, records):
            self._id = old["id"]
        elif old is not None:
            _set_aside(run, old["id"], self._id)
        settings = self.settings
        self._run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            group=settings.group,
            tags=settings.tags or None,
            name=run.name,
            id=self._id,
            dir=str(run.folder),
            config=run.config,
            mode=cast(Any, _mode(settings)),
            resume="allow",
            settings=wandb.Settings(
                init_timeout=settings.init_timeout_s,
                finish_timeout=settings.finish_timeout_s,
                finish_timeout_raises=True,
                console="off",  # the terminal and run.log are the run's own
                silent=True,
            ),
        )
        self._defined: set[str] = set()
        self._whole = True
        there = old["records"] if old is not None and self._id == old["id"] else 0
        for record in records:
            self._counted(record)
        if there < len(records):
            self._write_state(closed=False)
        for number, record in enumerate(records[there:], there + 1):
            self._draw(record, number)
        for name, scores in (run.resume.scores if run.resume is not None else {}).items():
            self.evaluation(name, scores)

    def log(self, record: Record) -> None:
        self._counted(record)
        self._write_state(closed=False)  # before the points: a kill between the two draws nothing twice
        self._draw(record, self._count)

    def _draw(self, record: Record, number: int) -> None:
        """Log a record as W&B's own step ``number``, which only ever grows within a run."""
        axis = "warmup/step" if record["stage"] == "warmup" else "step"
        values = scalars(record)
        try:
            for key in sorted({axis, *values} - self._defined):
                if key == axis:
                    self._run.define_metric(key, hidden=True)
                else:
                    self._run.define_metric(key, step_metric=axis)
                self._defined.add(key)
            self._run.log(values | {axis: record["step"]}, step=number)
        except BaseException:
            self._whole = False  # a resume can't know what is missing, and draws it all anew
            raise

    def evaluation(self, name: str, scores: dict[str, float]) -> None:
        self._run.summary.update(scores)

    def close(self, outcome: Outcome) -> None:
        self._run.summary["outcome"] = outcome.kind
        self._run.finish(exit_code=EXIT_CODES[outcome.kind])
        self._write_state(closed=self._whole)

    def _counted(self, record: Record) -> None:
        """Count a record as drawn."""
        self._count += 1
        self._digest.update(json.dumps(record).encode())

    def _read_state(self) -> dict[str, Any] | None:
        try:
            state = json.loads(self._state.read_text(encoding="utf-8"))
            return {name: state[name] for name in ("id", "records", "digest", "closed")}
        except FileNotFoundError:
            return None

    def _write_state(self, *, closed: bool) -> None:
        content = {"id": self._id, "records": self._count, "digest": self._digest.hexdigest(), "closed": closed}
        write_json_atomic(self._state, content)


def _goes_on(old: dict[str, Any], records: Sequence[Record]) -> bool:
    """Whether a W&B run was closed with nothing in it but the first of the kept records."""
    digest = hashlib.sha256()
    for record in records[: old["records"]]:
        digest.update(json.dumps(record).encode())
    return bool(old["closed"]) and old["records"] <= len(records) and digest.hexdigest() == old["digest"]


def _set_aside(run: RunFacts, old: str, new: str) -> None:
    """Say that a W&B run is superseded, and move its offline folders to where ``wandb sync`` doesn't look."""
    for folder in sorted((run.folder / "wandb").glob(f"offline-run-*-{old}*")):
        (run.folder / SUPERSEDED).mkdir(exist_ok=True)
        folder.rename(run.folder / SUPERSEDED / folder.name)
    run.say(
        f"W&B can't take points back: run {old} holds some that this resume repeats. The curves go on, whole, as run"
        f" {new}; delete {old} in W&B"
    )


TRACKER = WandbTracker
