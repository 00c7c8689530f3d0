"""A plan of runs: starting policies that methods share, arms, seeds and a budget, read from a YAML file.

    name: starting_point
    question: Who is above more SFT, and from which skill on?
    prediction: written down before the first run
    seeds: [1, 2, 3]
    hours: 6                       # no run is started after that many hours of runs
    set: [tasks.max_eval=96]       # settings of every run
    starts:                        # made once, with start_seed, and used by model.path
      sft12: {method: sft, set: [warmup.steps=12]}
    arms:
      pact: {method: pact}
      pact_slow: {method: pact, set: [optimizer.lr=3e-5]}
    grid:
      - {starts: [sft12], arms: [pact, pact_slow]}

Of an agent of your own, ``benchmark: own``, and ``set`` names tools, tasks and traces: examples/shop/plan.yaml.
``published`` is a start that every plan has: the preset's own model as it came, with the preset's warm-up.
"""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pact_nemo.config.load import load_config
from pact_nemo.config.schema import Config
from pact_nemo.errors import ConfigError
from pact_nemo.report.comparison import total_seconds
from pact_nemo.report.data import load_run
from tools.comparisons.results import SCORE, Result, by_task, read_result, read_results, result_of, write_result
from tools.comparisons.runner import Settings, config_of, finished, run_one, weights_of

PUBLISHED = "published"
#: of a finished run folder, what only another run would need
WEIGHTS = ("checkpoints", "exports", "reference", "hf")


@dataclass
class Arm:
    """A method and what differs from its settings file."""

    method: str = "pact"
    set: list[str] = field(default_factory=list)


@dataclass
class Block:
    """Every arm from every start."""

    starts: list[str] = field(default_factory=lambda: [PUBLISHED])
    arms: list[str] = field(default_factory=list)
    seeds: list[int] | None = None  #: None = the plan's


@dataclass
class Plan:
    """See the head of this file."""

    name: str = ""
    question: str = ""
    prediction: str = ""
    benchmark: str = "bfcl"
    preset: str = "smollm2_135m-cpu"
    baseline: str = ""  #: the arm that the others are compared with
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    hours: float | None = None
    set: list[str] = field(default_factory=list)
    starts: dict[str, Arm] = field(default_factory=dict)
    start_seed: int = 0  #: of the starts: none of the arms', so that no arm meets a start's batches again
    arms: dict[str, Arm] = field(default_factory=dict)
    grid: list[Block] = field(default_factory=list)


@dataclass(frozen=True)
class Cell:
    """One run of a plan; ``start`` and ``arm`` are names."""

    start: str
    arm: str
    seed: int

    @property
    def id(self) -> str:
        return f"{self.start}-{self.arm}-seed{self.seed}"


def load_plan(path: str | Path) -> Plan:
    """Read a plan and check every run's settings, so that none is refused after hours of others.

    Raises:
        ConfigError: the file, a name or a setting in it is wrong; names file and key.
    """
    try:
        plan = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Plan), OmegaConf.load(path)))
    except (OSError, OmegaConfBaseException, ValueError, TypeError) as error:
        raise ConfigError(
            f"{path}: {str(error).splitlines()[0]} (key '{getattr(error, 'full_key', None) or ''}')"
        ) from error
    assert isinstance(plan, Plan)
    for key, names in (("name", [plan.name]), ("starts", [*plan.starts]), ("arms", [*plan.arms])):
        for name in names:
            if not re.fullmatch(r"[A-Za-z0-9_.]+", name):
                raise ConfigError(
                    f"{path}: {key}: {name!r} must be letters, digits, '_' and '.', for folders are named by it"
                )
    if PUBLISHED in plan.starts:
        raise ConfigError(f"{path}: starts.{PUBLISHED} is the model as it came; give that start another name")
    if both := sorted(plan.starts.keys() & plan.arms.keys()):
        raise ConfigError(f"{path}: {', '.join(both)}: a start and an arm have this name; give one of them another")
    if not plan.grid or not plan.seeds:
        raise ConfigError(f"{path}: grid and seeds must say at least one run")
    for index, block in enumerate(plan.grid):
        for kind, names, known in (
            ("start", block.starts, [PUBLISHED, *plan.starts]),
            ("arm", block.arms, [*plan.arms]),
        ):
            unknown = [name for name in names if name not in known]
            if unknown or not names:
                raise ConfigError(f"{path}: grid[{index}].{kind}s: {unknown or names}; known: {', '.join(known)}")
    if plan.baseline and plan.baseline not in plan.arms:
        raise ConfigError(f"{path}: baseline={plan.baseline} is no arm; arms: {', '.join(plan.arms)}")
    for name, arm in [*plan.starts.items(), *plan.arms.items()]:
        try:
            _check_files(load_config([config_of(arm.method, plan.benchmark, plan.preset)], [*plan.set, *arm.set]))
        except ConfigError as error:
            raise ConfigError(f"{path}: {name}: {error}") from error
    return plan


def _check_files(config: Config) -> None:
    """Raises ConfigError where a file of tasks or traces isn't there: an arm's turn may come hours later."""
    files = {
        "tasks.path": config.tasks.path,
        "tasks.eval_path": config.tasks.eval_path,
        "traces.path": config.traces.path,
    }
    for key, path in files.items():
        if path is not None and not Path(path).exists():
            raise ConfigError(f"{key}={path}: no such file in {Path.cwd()}; give its path from there, or the whole one")


def cells(plan: Plan) -> Iterator[Cell]:
    """Every run once, seed by seed: a plan that is cut off is still paired."""
    seen = set()
    for seed in sorted(
        {seed for block in plan.grid for seed in block.seeds or plan.seeds}, key=[*plan.seeds, *_extra(plan)].index
    ):
        for block in plan.grid:
            for start in block.starts:
                for arm in block.arms:
                    cell = Cell(start, arm, seed)
                    if seed in (block.seeds or plan.seeds) and cell not in seen:
                        seen.add(cell)
                        yield cell


def _extra(plan: Plan) -> list[int]:
    return [seed for block in plan.grid for seed in block.seeds or () if seed not in plan.seeds]


def start_words(start: str, folder: Path | None) -> list[str]:
    """What a run is told to begin from a start, whose warm-up it had; ``folder`` None: the rest without its place."""
    place = [f"model.path={folder}"] if folder is not None else []
    return [] if start == PUBLISHED else [*place, "warmup.steps=0", "evaluation.before=false"]


def run_plan(
    plan: Plan,
    root: Path,
    results: Path,
    *,
    keep_weights: bool = False,
    jobs: int = 1,
    note: Callable[[str], None] = print,
) -> list[Result]:
    """Run what has no result yet, and write each result when it is there.

    Args:
        root: run folders are made below it; weights and checkpoints of finished runs are deleted, but those of starts.
        results: folder of the results, a JSON file a run.
        jobs: runs at once; the next one in line starts when one has ended.

    Returns:
        all results of the plan that there are.

    Raises:
        ConfigError: a run was made with other settings.
        PactError: a run failed; no further run is started, and those that are finished have their results.
    """
    if results.is_dir():
        check_kept(plan, results)
    todo = [cell for cell in cells(plan) if not (results / f"{cell.id}.json").is_file()]
    work = _Work(plan, root, results, keep_weights, note, len(todo))
    with ThreadPoolExecutor(jobs) as pool:
        runs = [pool.submit(work.run, number, cell) for number, cell in enumerate(todo, 1)]
    for run in runs:
        run.result()
    return read_results(results)


def _arm_of(plan: Plan, cell: Cell) -> Arm:
    return plan.starts[cell.arm] if cell.start == PUBLISHED and cell.arm in plan.starts else plan.arms[cell.arm]


def _config(plan: Plan, cell: Cell) -> Path:
    return config_of(_arm_of(plan, cell).method, plan.benchmark, plan.preset)


def _words(plan: Plan, cell: Cell, folder: Path | None = None) -> list[str]:
    """What a cell's run is told besides its method's settings file; ``folder``: the weights of its start."""
    return [*plan.set, *start_words(cell.start, folder), *_arm_of(plan, cell).set]


def _settings(plan: Plan, cell: Cell) -> str:
    return Settings.of(_config(plan, cell), cell.seed, _words(plan, cell)).digest


def check_kept(plan: Plan, results: Path) -> None:
    """Raises ConfigError where a result was made with other settings than the plan has now."""
    starts = [Cell(PUBLISHED, name, plan.start_seed) for name in plan.starts]
    for cell in [*starts, *cells(plan)]:
        file = results / f"{cell.id}.json"
        if not file.is_file():
            continue
        kept = read_result(file)
        same = kept.settings == _settings(plan, cell) if kept.settings else kept.words == _words(plan, cell)
        if not same or kept.method != _arm_of(plan, cell).method:
            arms = " and those of its arms" if cell in starts else ""
            raise ConfigError(
                f"{file} was made with other settings ({' '.join(kept.words)}); delete it{arms}, or name another"
                " folder with --results"
            )


class _Work:
    """The runs of a plan that have no result yet, for threads that take one after another."""

    def __init__(
        self, plan: Plan, root: Path, results: Path, keep_weights: bool, note: Callable[[str], None], count: int
    ):
        self._plan, self._root, self._results = plan, root, results
        self._keep_weights, self._note, self._count = keep_weights, note, count
        self._began = time.monotonic()
        self._spent = sum(result.seconds for result in read_results(results)) if results.is_dir() else 0.0
        self._starts: dict[str, Path] = {}  # the starting policies that were looked at
        self._over = False  # a run failed, or the budget is spent: none begins any more
        self._lock = threading.Lock()

    def run(self, number: int, cell: Cell) -> None:
        """Run one cell, unless another one failed or the budget is spent."""
        try:
            self._run(number, cell)
        except BaseException:
            self._over = True
            raise

    def _run(self, number: int, cell: Cell) -> None:
        plan = self._plan
        with self._lock:  # a starting policy is made once, and runs that need it wait
            if not self._over and plan.hours is not None and self._spent > plan.hours * 3600:
                self._over = True
                self._note(
                    f"{self._spent / 3600:.1f} of {plan.hours} hours are spent: {self._count - number + 1} runs are"
                    " left; raise hours to make them"
                )
            if self._over:
                return
            if cell.start != PUBLISHED and cell.start not in self._starts:
                self._starts[cell.start], seconds = _start(plan, cell.start, self._root, self._results, self._note)
                self._spent += seconds
        self._note(f"[{time.monotonic() - self._began:6.0f} s] run {number}/{self._count}: {cell.id}")
        folder = self._starts.get(cell.start)
        run = run_one(_config(plan, cell), cell.seed, self._root / cell.id, _words(plan, cell, folder))
        spent = _keep(plan, cell, run, self._results, weights_of(folder) if folder is not None else "")
        with self._lock:
            self._spent += spent
        if not self._keep_weights:
            for name in WEIGHTS:
                shutil.rmtree(run / name, ignore_errors=True)


def _start(plan: Plan, name: str, root: Path, results: Path, note: Callable[[str], None]) -> tuple[Path, float]:
    """The HF folder of a starting policy, made if it isn't there, and the seconds that this took now.

    Raises:
        ConfigError: it is not the policy that the results were made from.
    """
    place, cell = root / "starts" / name, Cell(PUBLISHED, name, plan.start_seed)
    new = finished(place) is None
    if new:
        note(f"starting policy {name}")
    run = run_one(_config(plan, cell), cell.seed, place, _words(plan, cell))
    weights = weights_of(run / "hf")
    for other in read_results(results) if results.is_dir() else ():
        if other.start == name and (other.weights or weights) != weights:
            raise ConfigError(
                f"{results}/{name}-{other.arm}-seed{other.seed}.json began from another starting policy than {run};"
                " delete it, or name another folder with --results"
            )
    if (file := results / f"{cell.id}.json").is_file():
        kept, scores = read_result(file), by_task(load_run(run).episodes.get(SCORE, []))
        if (kept.weights or weights) != weights or kept.scores.get(SCORE, {}) != scores:
            raise ConfigError(
                f"{run} is another starting policy than the one of {file}: its arms' results can't be compared. Delete"
                " that file and those of its arms, or name another folder with --results"
            )
    seconds = _keep(plan, cell, run, results, weights)
    for part in ("checkpoints", "exports", "reference"):
        shutil.rmtree(run / part, ignore_errors=True)
    return (run / "hf").resolve(), seconds if new else 0.0


def _keep(plan: Plan, cell: Cell, run: Path, results: Path, weights: str) -> float:
    found = load_run(run)
    facts: dict[str, Any] = {
        "plan": plan.name,
        "start": cell.start,
        "arm": cell.arm,
        "words": _words(plan, cell),
        "settings": _settings(plan, cell),
        "weights": weights,
    }
    write_result(results / f"{cell.id}.json", result_of(found, facts))
    return total_seconds(found.summary["seconds"])
