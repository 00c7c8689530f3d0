"""Several runs side by side: one row per run, one per method, and the settings in which they differ."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

from pact_nemo.config.schema import Config
from pact_nemo.report.charts import Axis, Chart, Series, Tick, make_chart, ticks_between
from pact_nemo.report.curves import WINDOW
from pact_nemo.report.data import Run
from pact_nemo.report.stats import deviation, mean, running_mean

WIDTH, LEFT, RIGHT, ROW, AXIS = 360, 78, 14, 26, 24
TONES = 9  #: colours of the page
CURVES = (
    (
        "reward/success",
        "Success of training rollouts",
        f"checker's pass; mean over seeds, as far as all of them go, and over {WINDOW} steps",
    ),
)
_OWN = ("method", "objective.method")  #: settings that runs of a comparison differ in by design, with all of ``run``
_OF_METHOD = "method_config"  #: differs by design between methods, not between the runs of one


@dataclass(frozen=True)
class RunRow:
    name: str
    method: str
    seed: str
    steps: str
    base: float | None
    start: float | None
    end: float | None
    n: int | None
    call_start: float | None
    call_end: float | None
    seconds: float | None
    this: bool

    @property
    def change(self) -> float | None:
        return None if self.start is None or self.end is None else self.end - self.start


@dataclass(frozen=True)
class MethodRow:
    """Over the seeds of a method: mean, sample standard deviation and range of the score after training; the other
    scores are means.
    """

    method: str
    runs: int
    base: float | None
    start: float | None
    end: float
    change: float | None
    deviation: float | None
    low: float
    high: float


@dataclass(frozen=True)
class Dot:
    x: float
    y: float
    label: str
    tone: int


@dataclass(frozen=True)
class DotChart:
    """Score after training of every run, a row per method, the mean as a bar."""

    height: int
    ticks: list[Tick]
    rows: list[tuple[str, float, float]]  #: (method, y, x of the mean)
    dots: list[Dot]


@dataclass(frozen=True)
class Comparison:
    runs: list[RunRow]
    methods: list[MethodRow]
    differences: list[tuple[str, list[str]]]  #: (setting, value per run)
    chart: DotChart | None
    curves: list[Chart]
    warnings: list[str]

    @property
    def has_base(self) -> bool:
        """Whether a run was also evaluated before its warm-up."""
        return any(run.base is not None for run in self.runs)


def _row(run: Run, this: bool) -> RunRow:
    base, start, end = (run.scores.get(name or "", {}) for name in ("base", run.start(), "after"))
    seconds = run.summary.get("seconds")
    return RunRow(
        name=run.name,
        method=run.method,
        seed=str(run.seed),
        steps=str(run.summary.get("steps", len(run.rl))),
        base=base.get("score"),
        start=start.get("score"),
        end=end.get("score"),
        n=end.get("n"),
        call_start=start.get("call_reward"),
        call_end=end.get("call_reward"),
        seconds=total_seconds(seconds) if seconds else None,
        this=this,
    )


#: phases of ``summary.json`` that make up the run; the others are parts of these
DETAIL = ("generation", "server")


def total_seconds(seconds: dict[str, float]) -> float:
    """Seconds of a run: its own total where it says one, else the sum of its phases."""
    return (
        seconds["total"] if "total" in seconds else sum(value for name, value in seconds.items() if name not in DETAIL)
    )


def _methods(rows: list[RunRow]) -> list[MethodRow]:
    groups: dict[str, list[RunRow]] = defaultdict(list)
    for row in rows:
        if row.end is not None:
            groups[row.method].append(row)
    result = []
    for method, members in groups.items():
        ends = [row.end for row in members if row.end is not None]
        bases = [row.base for row in members if row.base is not None]
        starts = [row.start for row in members if row.start is not None]
        changes = [row.change for row in members if row.change is not None]
        result.append(
            MethodRow(
                method=method,
                runs=len(members),
                base=mean(bases) if bases else None,
                start=mean(starts) if starts else None,
                end=mean(ends),
                change=mean(changes) if changes else None,
                deviation=deviation(ends),
                low=min(ends),
                high=max(ends),
            )
        )
    return result


def flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Settings by their dotted keys, as text."""
    if isinstance(value, dict) and value:
        return {key: text for name, inner in value.items() for key, text in flat(inner, f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): str(value)}


def differences(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """(setting, value per run) of the settings in which runs differ, names, seeds and method apart; a method's own
    settings where two runs of one method differ in them. A run that was made before a setting existed had what is now
    its default."""
    found = [flat(run.config) for run in runs]
    defaults = flat(asdict(Config()))
    keys = sorted({key for settings in found for key in settings if not key.startswith("run.") and key not in _OWN})
    table = [(key, [settings.get(key, defaults.get(key, "–")) for settings in found]) for key in keys]

    def differ(key: str, values: list[str]) -> bool:
        if key.split(".")[0] != _OF_METHOD:
            return len(set(values)) > 1
        of_method: dict[str, set[str]] = defaultdict(set)
        for run, value in zip(runs, values, strict=True):
            of_method[run.method].add(value)
        return any(len(seen) > 1 for seen in of_method.values())

    return [(key, values) for key, values in table if differ(key, values)]


def _chart(rows: list[RunRow], methods: list[MethodRow]) -> DotChart | None:
    if not methods:
        return None
    top = max(row.end for row in rows if row.end is not None)
    marks = ticks_between(0.0, max(top, 0.01))

    def place(value: float) -> float:
        return LEFT + value / marks[-1] * (WIDTH - LEFT - RIGHT)

    lines, dots = [], []
    for index, method in enumerate(methods):
        y = ROW * index + ROW / 2
        lines.append((method.method, y, place(method.end)))
        for row in rows:
            if row.method == method.method and row.end is not None:
                dots.append(Dot(place(row.end), y, f"{row.name}: {row.end * 100:.1f} %", index % TONES))
    return DotChart(ROW * len(methods) + AXIS, [Tick(place(mark), f"{mark * 100:g} %") for mark in marks], lines, dots)


def learning_curves(runs: list[Run]) -> list[Chart]:
    """A line per method, the mean over its runs at each RL step up to the last one of its shortest run: where a run is
    missing, the mean would jump. Runs without RL steps are left out.
    """
    methods = list(dict.fromkeys(run.method for run in runs))
    steps = sorted({int(record["step"]) for run in runs for record in run.rl})
    charts = []
    for key, title, note in CURVES if steps else ():
        series = []
        for tone, method in enumerate(methods):
            by_step: dict[int, list[float]] = defaultdict(list)
            of_method = [run.rl for run in runs if run.method == method and run.rl]
            end = min((int(records[-1]["step"]) for records in of_method), default=0)
            for record in (record for records in of_method for record in records):
                if record.get(key) is not None:
                    by_step[int(record["step"])].append(float(record[key]))
            values = [mean(by_step[step]) if by_step[step] else None for step in steps]
            means = running_mean(values, WINDOW)
            cut = [value if step <= end else None for step, value in zip(steps, means, strict=True)]
            series.append(Series(method, cut, tone % TONES))
        chart = make_chart(title, note, steps, series, axis=Axis(bounds=(0.0, None), percent=True))
        if chart is not None:
            charts.append(chart)
    return charts


def pooled(runs: list[Run]) -> list[str]:
    """What a reader has to know of runs that one row holds, as if they were seeds of one setting."""
    of_label: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        of_label[run.method].append(run)
    found = []
    for label, members in of_label.items():
        if unlike := [key for key, _ in differences(members)]:
            found.append(
                f"The runs of {label} differ in {', '.join(unlike)}, and one row holds them all: compare runs of one"
                " setting, or give each setting its own run.label."
            )
        seeds = [str(run.seed) for run in members]
        if shared := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
            found.append(
                f"Runs of {label} share seed {' and '.join(shared)}: their spread isn't one over seeds, and it may be"
                " too small."
            )
    return found


def compare(runs: list[Run]) -> Comparison:
    """``runs[0]`` is the run that the report is about."""
    rows = [_row(run, index == 0) for index, run in enumerate(runs)]
    methods = _methods(rows)
    warnings = pooled(runs)
    if len({row.n for row in rows if row.n is not None}) > 1:
        warnings.append("The runs were evaluated on different numbers of episodes; their scores aren't comparable.")
    unfinished = [row.name for run, row in zip(runs, rows, strict=True) if row.end is None or not run.summary]
    if unfinished:
        warnings.append(f"Not finished, or without a score after training: {', '.join(unfinished)}.")
    return Comparison(rows, methods, differences(runs), _chart(rows, methods), learning_curves(runs), warnings)
