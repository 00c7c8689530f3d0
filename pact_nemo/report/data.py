"""Reading a run folder for its report. What a run hasn't written yet is simply absent; what is there but broken is
refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from pact_nemo.errors import DataError
from pact_nemo.report import shapes
from pact_nemo.report.stats import episode_score, mean
from pact_nemo.runtime import strict_json
from pact_nemo.traces.schema import Trace, read_traces
from pact_nemo.tracking.jsonl import read_metrics

Row = dict[str, Any]
_REMEDY = "repair the file or remove it"


@dataclass(frozen=True)
class Stage:
    """One held-out evaluation: ``name`` is its key in ``summary.json`` and the stem of its file, ``label`` what a
    reader sees.
    """

    name: str
    label: str


@dataclass
class Run:
    """A run folder in memory.

    Attributes:
        summary: ``summary.json``; empty while the run hasn't finished.
        config_text: the resolved configuration as YAML.
        warmup, rl: metric records of the two stages, in step order.
        episodes: evaluation rows by stage name.
        traces: expert traces by task id.
    """

    folder: Path
    summary: Row
    config: Row
    config_text: str
    warmup: list[Row]
    rl: list[Row]
    episodes: dict[str, list[Row]] = field(default_factory=dict)
    traces: dict[str, Trace] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def method(self) -> str:
        """What comparisons call it."""
        return str(
            self.summary.get("label")
            or self.summary.get("method")
            or self.setting("method")
            or self.setting("objective.method")
            or "unknown method"
        )

    @property
    def seed(self) -> Any:
        return self.summary.get("seed", self.setting("run.seed"))

    @property
    def scores(self) -> dict[str, Row]:
        """Evaluation results by stage name: the summary's, else (a run that hasn't finished) counted from the
        episodes.
        """
        counted = {name: count_scores(rows) for name, rows in self.episodes.items() if rows}
        return counted | {name: score for name, score in (self.summary.get("eval") or {}).items() if score is not None}

    def setting(self, key: str) -> Any:
        """Value of a dotted configuration key, None when this run's configuration doesn't have it."""
        value: Any = self.config
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                return None
            value = value[part]
        return value

    @property
    def scored_tasks(self) -> str:
        """What the tasks of the scores are called."""
        return "validation" if self.setting("tasks.validation") else "held-out"

    @property
    def has_rl(self) -> bool:
        """Whether RL is part of the run: it has RL steps, or its settings ask for some."""
        return bool(self.rl or self.setting("trainer.steps") or self.setting("trainer.epochs"))

    def stages(self) -> list[Stage]:
        """Evaluations that exist, in the order they happened; ``base`` precedes a warm-up and ``before`` follows it.
        Without RL, ``before`` and ``after`` are of the same weights.
        """
        present = {*self.scores, *self.episodes}
        if "base" in present:
            end = "after RL" if self.has_rl else "at the end"
            labels = {"base": "as published", "before": "after warm-up", "after": end}
        else:
            labels = {"before": "before", "after": "after"}
        labels |= {name: name for name in sorted(present) if name not in labels}
        return [Stage(name, label) for name, label in labels.items() if name in present]

    def held_out_tasks(self, episodes: int) -> int:
        """Independent tasks among evaluation episodes: each was played ``evaluation.samples`` times. At least 1."""
        return max(round(episodes / (self.setting("evaluation.samples") or 1)), 1)

    def start(self) -> str | None:
        """Name of the evaluation that the run's change is counted from: the one that RL started from; without RL, that
        of the model as published. None where it wasn't played.
        """
        name = "before" if self.has_rl else "base"
        return name if name in self.scores else None


def count_scores(rows: list[Row]) -> Row:
    """Mean score of episodes, over all of them and per category, as a summary has it; one that failed counts 0."""
    by_category: dict[str, list[float]] = {}
    for row in rows:
        for name in (row["task"]["category"], *row["task"].get("tags", ())):
            by_category.setdefault(name, []).append(episode_score(row))
    categories = {name: {"score": mean(values), "n": len(values)} for name, values in sorted(by_category.items())}
    score, failed = mean([episode_score(row) for row in rows]), sum(row["status"] == "failed" for row in rows)
    return {"score": score, "n": len(rows), "failed": failed, "categories": categories}


def read_rows(path: Path) -> list[Row]:
    """Episodes of a JSONL file.

    Raises:
        DataError: a line is not an episode; names file, line and field.
    """
    rows = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            rows.append(_value(line, path, shapes.EPISODE, number))
    return rows


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"can't be read: {error}; {_REMEDY}", file=str(path)) from error


def _value(text: str, path: Path, shape: Any, line: int | None = None) -> Row:
    try:
        value = strict_json.loads(text)
    except ValueError as error:
        raise DataError(f"not JSON: {error}; {_REMEDY}", file=str(path), line=line) from error
    wrong = shapes.problem(value, shape)
    if wrong is not None:
        raise DataError(f"{wrong[0]}; {_REMEDY}", file=str(path), line=line, field=wrong[1] or None)
    assert isinstance(value, dict)
    return value


def rollout_files(folder: Path) -> list[Path]:
    """Dumped training steps in step order."""
    return sorted((folder / "rollouts").glob("step_*.jsonl"))


def load_run(folder: str | Path, *, episodes: bool = True) -> Run:
    """Read a run folder.

    Args:
        episodes: also read evaluation episodes and traces; a comparison does without them.

    Raises:
        DataError: not a run folder, or a file in it is malformed.
    """
    path = Path(folder).resolve()
    config_file, summary_file = path / "config.yaml", path / "summary.json"
    if not config_file.is_file():
        raise DataError("not a run folder: it has no config.yaml; give one such as runs/latest", file=str(path))
    text = _text(config_file)
    try:
        config = OmegaConf.to_container(OmegaConf.create(text))
    except Exception as error:  # yaml and OmegaConf raise unrelated families; all mean "not a configuration"
        raise DataError(f"not valid YAML: {error}; {_REMEDY}", file=str(config_file)) from error
    if not isinstance(config, dict):
        raise DataError(f"expected a mapping; {_REMEDY}", file=str(config_file))
    summary: Row = {}
    if summary_file.is_file():
        summary = _value(_text(summary_file), summary_file, shapes.SUMMARY)
    records = read_metrics(path)
    by_stage = {stage: [record for record in records if record["stage"] == stage] for stage in ("warmup", "rl")}
    run = Run(
        path, summary, {str(key): value for key, value in config.items()}, text, by_stage["warmup"], by_stage["rl"]
    )
    if episodes:
        run.episodes = {file.stem: read_rows(file) for file in sorted((path / "eval").glob("*.jsonl"))}
        if (path / "traces.jsonl").is_file():
            run.traces = {trace.task_id: trace for trace in read_traces(path / "traces.jsonl")}
    return run
