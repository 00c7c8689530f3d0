"""What the tests of trackers share: records, and one process of a run that draws them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pact_nemo.tracking.base import Record
from pact_nemo.tracking.registry import open_trackers

SCORE = {
    "score": 0.5,
    "n": 4,
    "call_reward": None,
    "failed": 0,
    "categories": {"base": {"score": 0.25, "n": 2}},
    "metrics": {"calls": 3.0},
}
#: settings of each built-in tracker with which it needs no network; ``{folder}`` is the run folder
LOCAL: dict[str, dict[str, Any]] = {
    "tensorboard": {},
    "wandb": {"mode": "offline", "project": "tests", "tags": ["a"]},
    "mlflow": {"uri": "sqlite:///{folder}/mlflow.db", "experiment": "tests"},
}


def settings_in(folder: Path, name: str) -> dict[str, Any]:
    return {k: v.format(folder=folder) if isinstance(v, str) else v for k, v in LOCAL[name].items()}


def record(kind: str, step: int, loss: float | None = None) -> Record:
    return {"step": step, "stage": kind, "loss/total": step / 8 if loss is None else loss, "latent/gap": None}


def rl(first: int, last: int, loss: float | None = None) -> list[Record]:
    return [record("rl", step, loss) for step in range(first, last + 1)]


def fill(
    folder: Path,
    trackers: dict[str, Any],
    records: list[Record],
    *,
    resume_from: tuple[int, int] | None = None,
    scores: dict[str, Any] | None = None,
    said: list[str] | None = None,
) -> None:
    """One process of a run."""
    config = {"run": {"name": "x"}, "tracking": {"trackers": trackers}}
    lines = said if said is not None else []
    with open_trackers(folder, config, resume_from=resume_from, scores=scores or {}, say=lines.append) as recorder:
        for row in records:
            recorder.append(row)


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
