"""The runs of a plan, one after another or several at once: each has its result as JSON when it is there."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from pact_nemo.errors import ConfigError, DataError
from pact_nemo.report.comparison import total_seconds
from pact_nemo.report.data import load_run
from tools.comparisons.plan import PUBLISHED, Cell, Plan, cells, check_kept, config_for, settings_for, words_for
from tools.comparisons.results import SCORE, Result, by_task, read_result, read_results, result_of, write_result
from tools.comparisons.runner import finished, run_one, weights_of

#: of a finished run folder, what only another run would need
WEIGHTS = ("checkpoints", "exports", "reference", "hf")


def run_plan(
    plan: Plan,
    root: Path,
    results: Path,
    *,
    keep_weights: bool = False,
    jobs: int = 1,
    note: Callable[[str], None] = print,
) -> list[Result]:
    """Run what has no result yet, and write each result when it is there. A run that another plan has made, with its
    results beside this one's, is taken from there.

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


class _Work:
    """The runs of a plan that have no result yet, for threads that take one after another."""

    def __init__(
        self, plan: Plan, root: Path, results: Path, keep_weights: bool, note: Callable[[str], None], count: int
    ):
        self._plan, self._root, self._results = plan, root, results
        self._keep_weights, self._note, self._count = keep_weights, note, count
        self._began = time.monotonic()
        kept = read_results(results) if results.is_dir() else []
        self._spent = sum(result.seconds for result in kept if not result.taken_from)
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
        weights = weights_of(folder) if folder is not None else ""
        if (other := _same_run(plan, cell, self._results, weights)) is not None:
            self._note(f"{cell.id}: the run of {other[0]}")
            _keep_other(plan, cell, *other, self._results)
            return
        run = run_one(config_for(plan, cell), cell.seed, self._root / cell.id, words_for(plan, cell, folder))
        spent = _keep(plan, cell, run, self._results, weights)
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
    run = run_one(config_for(plan, cell), cell.seed, place, words_for(plan, cell))
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
        "words": words_for(plan, cell),
        "settings": settings_for(plan, cell),
        "weights": weights,
    }
    write_result(results / f"{cell.id}.json", result_of(found, facts))
    return total_seconds(found.summary["seconds"])


def _same_run(plan: Plan, cell: Cell, results: Path, weights: str) -> tuple[Path, Result] | None:
    """A run of another plan that had the same settings and seed and began from the same weights, and its file.

    Args:
        results: folder of this plan's results; those of other plans stand beside it.
        weights: digest of the start's weights. A start of which it isn't known is nobody else's.
    """
    published = cell.start == PUBLISHED
    if not weights and not published:
        return None
    mine = (settings_for(plan, cell), weights, published)
    for path in sorted(results.parent.glob("*/*.json")):
        with suppress(DataError):  # a file of something else
            found = read_result(path)
            if path.parent != results and (found.settings, found.weights, found.start == PUBLISHED) == mine:
                return path, found
    return None


def _keep_other(plan: Plan, cell: Cell, path: Path, other: Result, results: Path) -> None:
    """Write another plan's run down as this cell's."""
    source = other.taken_from or f"{path.parent.name}/{path.name}"
    result = replace(
        other, plan=plan.name, start=cell.start, arm=cell.arm, words=words_for(plan, cell), taken_from=source
    )
    write_result(results / f"{cell.id}.json", result)
