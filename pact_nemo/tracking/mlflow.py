"""MLflow. Where it is and who we are come from ``MLFLOW_TRACKING_URI``, ``…_USERNAME``, ``…_PASSWORD``, ``…_TOKEN``;
only the address can be a setting as well.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar
from urllib.parse import urlparse

from pact_nemo.config.ranges import Ranges
from pact_nemo.errors import ConfigError
from pact_nemo.runtime.files import write_json_atomic
from pact_nemo.tracking.base import Outcome, Record, RunFacts, Tracker, scalars

STATE = "mlflow_run.json"  #: in the run folder: which MLflow run this is
STATUS = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
BATCH = 500  #: metrics or parameters in one request; MLflow takes 1000 and 100
Point = tuple[str, int, float]  #: key, step, value


@dataclass
class MlflowSettings:
    """``tracking.trackers.mlflow``."""

    uri: str | None = None  #: http(s)://… of a server, or sqlite:///… of a file; None = MLFLOW_TRACKING_URI
    experiment: str = "pact_nemo"
    timeout_s: int = 10  #: seconds that a request may take
    retries: int = 2  #: times that a failed request is sent again

    ranges: ClassVar[Ranges] = {"timeout_s": ">= 1", "retries": ">= 0"}


def _uri(settings: MlflowSettings) -> str | None:
    return settings.uri or os.environ.get("MLFLOW_TRACKING_URI")


class MlflowTracker(Tracker):
    """One MLflow run per training run, as long as nothing has to be taken back.

    A resume compares what MLflow holds with the kept records and logs what is missing. MLflow can't delete points:
    where it holds others, or one twice, the run is deleted (MLflow's trash keeps it) and a new one gets every kept
    record.
    """

    Settings: ClassVar[type] = MlflowSettings

    @classmethod
    def check(cls, settings: MlflowSettings) -> None:
        key = "tracking.trackers.mlflow"
        if importlib.util.find_spec("mlflow") is None:
            raise ConfigError(
                f"{key}: the package mlflow is not installed; pip install mlflow-skinny, or set {key}=null"
            )
        uri = _uri(settings)
        if uri is None:
            raise ConfigError(
                f"{key}: where to log to? set {key}.uri or the variable MLFLOW_TRACKING_URI, e.g. sqlite:////data/mlflow.db"
            )
        if settings.uri is not None and urlparse(settings.uri).password:
            raise ConfigError(
                f"{key}.uri holds a password, and settings are written into config.yaml and report; use the variables"
                " MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        if uri.startswith("sqlite:") and importlib.util.find_spec("sqlalchemy") is None:
            raise ConfigError(
                f"{key}.uri={uri}: the package sqlalchemy is not installed; pip install sqlalchemy alembic"
            )
        if urlparse(uri).scheme in ("", "file") and os.environ.get("MLFLOW_ALLOW_FILE_STORE") != "true":
            raise ConfigError(
                f"{key}.uri={uri}: MLflow has given up its store of plain files; use sqlite:///…, a server, or set the"
                " variable MLFLOW_ALLOW_FILE_STORE=true"
            )

    def open(self, run: RunFacts) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(self.settings.timeout_s))
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", str(self.settings.retries))
        from mlflow.tracking import MlflowClient  # seconds to import

        self._client = MlflowClient(tracking_uri=_uri(self.settings))
        wanted = set(_kept(run))
        old = _read_state(run)
        held = self._held(old) if old is not None else None
        if old is not None and held is not None and len(held) == len(set(held)) and set(held) <= wanted:
            self._id = old
            self._client.update_run(self._id, status="RUNNING")
            self._tag_changes(run)
            wanted -= set(held)
        else:
            self._id = self._new_run(run)
            if held is not None:
                self._client.delete_run(old)
                run.say(
                    f"MLflow can't take points back: run {old} is deleted, and the curves go on, whole, as {self._id}"
                )
        self._send(sorted(wanted, key=lambda point: (point[1], point[0])))

    def log(self, record: Record) -> None:
        self._send([(_key(name), record["step"], float(value)) for name, value in scalars(record).items()])

    def evaluation(self, name: str, scores: dict[str, float]) -> None:
        self._send([(_key(key), 0, float(value)) for key, value in scores.items()])

    def close(self, outcome: Outcome) -> None:
        self._client.set_terminated(self._id, status=STATUS[outcome.kind])

    def _held(self, run_id: str) -> list[Point] | None:
        """Every point that MLflow has of a run, repeated ones too; None: it has no such run (any more)."""
        from mlflow.exceptions import MlflowException

        try:
            found = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        if found.info.lifecycle_stage != "active":
            return None
        histories = (self._client.get_metric_history(run_id, key) for key in found.data.metrics)
        return [(point.key, point.step, point.value) for history in histories for point in history]

    def _new_run(self, run: RunFacts) -> str:
        from mlflow.entities import Param

        found = self._client.get_experiment_by_name(self.settings.experiment)
        experiment = found.experiment_id if found else self._client.create_experiment(self.settings.experiment)
        run_id = self._client.create_run(experiment, run_name=run.name).info.run_id
        write_json_atomic(run.folder / STATE, {"run_id": run_id})
        params = [Param(key, value) for key, value in _flat(run.config)]
        for start in range(0, len(params), 100):
            self._client.log_batch(run_id, params=params[start : start + 100])
        return run_id

    def _tag_changes(self, run: RunFacts) -> None:
        """Parameters can't change in MLflow: a setting that a resume changed is a tag ``config/<key>``."""
        params = self._client.get_run(self._id).data.params
        for key, value in _flat(run.config):
            if params.get(key) != value:
                self._client.set_tag(self._id, f"config/{key}", value)

    def _send(self, points: list[Point]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(key, value, now, step) for key, step, value in points]
        for start in range(0, len(metrics), BATCH):
            self._client.log_batch(self._id, metrics=metrics[start : start + BATCH])


def _key(name: str) -> str:
    """A name in the letters that MLflow takes."""
    return re.sub(r"[^\w\-. :/]", "_", name)


def _flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Settings as ``section.key`` and text; a parameter's value has at most 500 characters here."""
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield _key(f"{prefix}{key}"), str(value)[:500]


def _kept(run: RunFacts) -> Iterator[Point]:
    if run.resume is None:
        return
    for record in run.resume.records:
        for name, value in scalars(record).items():
            yield _key(name), record["step"], float(value)
    for scores in run.resume.scores.values():
        for key, value in scores.items():
            yield _key(key), 0, float(value)


def _read_state(run: RunFacts) -> str | None:
    if run.resume is None:
        return None
    try:
        return str(json.loads((run.folder / STATE).read_text(encoding="utf-8"))["run_id"])
    except FileNotFoundError:
        return None


TRACKER = MlflowTracker
