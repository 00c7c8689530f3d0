"""Reads back what the built-in trackers have written: the curves of the one run that a user would see."""

from __future__ import annotations

from pathlib import Path

from tests.workers.wandb_files import offline_runs

Curve = list[tuple[int, float]]


def tensorboard_curves(folder: Path) -> dict[str, Curve]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def wandb_curves(folder: Path) -> dict[str, Curve]:
    """Of the one W&B run that ``wandb sync`` would make of the folder."""
    runs = offline_runs(folder)
    (rows,) = [run.history for run in runs.values()]
    assert [row["_step"] for row in rows] == list(range(1, len(rows) + 1))
    curves: dict[str, Curve] = {}
    for row in rows:
        for key, value in row.items():
            if not key.startswith("_") and not key.endswith("step"):
                curves.setdefault(key, []).append((row["warmup/step" if key.startswith("warmup/") else "step"], value))
    return curves


def mlflow_curves(folder: Path) -> dict[str, Curve]:
    """Of the one MLflow run that is not in the trash."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    keys = [key for key in run.data.metrics if not key.startswith("eval/")]
    history = {key: client.get_metric_history(run.info.run_id, key) for key in keys}
    return {key: sorted((point.step, point.value) for point in points) for key, points in history.items()}
