"""The few statistics of the report: intervals, paired changes, spread over seeds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

FEWEST_SEEDS = 3  #: below which a difference of two methods has no interval


def wilson(successes: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % Wilson score interval of a share of ``n`` independent tasks, as (low, high) in [0, 1]; (0, 1) without any.
    ``successes`` may be a sum of means in [0, 1], which scatter less than passes: the interval is then too wide, never
    too narrow.
    """
    if n <= 0:
        return 0.0, 1.0
    p = successes / n
    centre = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max((centre - spread) / scale, 0.0), min((centre + spread) / scale, 1.0)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def deviation(values: Sequence[float]) -> float | None:
    """Sample standard deviation (denominator n - 1); None for fewer than two values."""
    if len(values) < 2:
        return None
    centre = mean(values)
    return math.sqrt(sum((value - centre) ** 2 for value in values) / (len(values) - 1))


def running_mean(values: Sequence[float | None], window: int) -> list[float | None]:
    """Mean of the last ``window`` values up to each position, absent ones left out; None where all of them are
    absent.
    """
    result: list[float | None] = []
    for index in range(len(values)):
        known = [value for value in values[max(index - window + 1, 0) : index + 1] if value is not None]
        result.append(mean(known) if known else None)
    return result


@dataclass(frozen=True)
class Paired:
    """How the same held-out tasks fared in two evaluations. Of a task that was played several times, its share of
    passes counts: its episodes are no independent tasks. An episode pairs with the one of the same task and sample.

    Attributes:
        gained, lost: tasks that passed the second time alone, the first time alone; or more often, less often.
        kept: tasks that passed both times; or as often, and at least once.
        neither: tasks that never passed.
        no_verdict: tasks each pair of which has an episode that failed through no fault of the policy; these are in
            none of the others.
    """

    gained: int
    lost: int
    kept: int
    neither: int
    no_verdict: int = 0

    @property
    def p_value(self) -> float:
        """Two-sided exact sign test on the tasks that changed; 1 when none did."""
        changed = self.gained + self.lost
        if changed == 0:
            return 1.0
        tail = sum(math.comb(changed, k) for k in range(min(self.gained, self.lost) + 1)) / 2**changed
        return min(2 * tail, 1.0)


def passed(row: dict[str, Any]) -> bool:
    """Official verdict of an episode; one that failed through no fault of the policy has none and counts as not
    passed.
    """
    return bool(row.get("outcome") and row["outcome"]["success"])


def episode_score(row: dict[str, Any]) -> float:
    """The environment's own score of an episode in [0, 1]; pass or fail where an old dump lacks the key, 0 without a
    verdict. A score that is null is refused as the file is read.
    """
    return float((row.get("outcome") or {}).get("score", passed(row)))


def pair(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> Paired:
    """Compare two evaluations task by task; episodes of only one of them are left out."""
    first = {(row["task_id"], row["sample"]): row for row in before}
    passes: dict[str, list[tuple[bool, bool]]] = {}  # per task: of each pair with two verdicts
    for row in after:
        old = first.get((row["task_id"], row["sample"]))
        if old is not None:
            judged = passes.setdefault(row["task_id"], [])
            if old.get("outcome") and row.get("outcome"):
                judged.append((passed(old), passed(row)))
    counts = Counter(_change(pairs) for pairs in passes.values())
    return Paired(**{name: counts[name] for name in ("gained", "lost", "kept", "neither", "no_verdict")})


def _change(pairs: list[tuple[bool, bool]]) -> str:
    """Which field of :class:`Paired` counts a task."""
    then, now = (sum(pair[index] for pair in pairs) for index in (0, 1))
    if not pairs:
        return "no_verdict"
    return "gained" if now > then else "lost" if now < then else "kept" if now else "neither"


def paired_bootstrap(
    scores: dict[str, list[float]], baseline: dict[str, list[float]], *, draws: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of the mean difference of two methods on the same tasks, by resampling tasks and seeds.

    Args:
        scores, baseline: per task, its scores over the runs of a method, in the same order of runs for every task. As
            many runs of both are taken for pairs, the i-th with the i-th; else each side's runs are resampled for
            themselves. A task that a run lacks is left out.
        draws: bootstrap samples, each of as many tasks and as many runs as there are.

    Returns:
        (low, high); (0, 0) where no task is shared. With one run a side the interval is over tasks only.
    """
    runs, others = (max((len(values) for values in side.values()), default=0) for side in (scores, baseline))
    tasks = sorted(
        task for task in scores.keys() & baseline.keys() if len(scores[task]) == runs and len(baseline[task]) == others
    )
    if not tasks:
        return 0.0, 0.0
    random = np.random.default_rng(seed)

    def picked(count: int) -> np.ndarray:  # [draws, count]: how often each is drawn, as a share
        return random.multinomial(count, np.full(count, 1 / count), size=draws) / count

    of_tasks, of_runs = picked(len(tasks)), picked(runs)
    of_others = of_runs if runs == others else picked(others)
    ours = np.einsum("dt,ts,ds->d", of_tasks, np.array([scores[task] for task in tasks]), of_runs, optimize=True)
    theirs = np.einsum("dt,ts,ds->d", of_tasks, np.array([baseline[task] for task in tasks]), of_others, optimize=True)
    low, high = np.percentile(ours - theirs, [2.5, 97.5])
    return float(low), float(high)


@dataclass(frozen=True)
class Difference:
    """Of two methods on the tasks and seeds that both have.

    Attributes:
        mean: of the score, over those tasks and seeds.
        interval: of 95 %, see :func:`difference`; None below three seeds.
        tasks: that all of the runs have.
    """

    mean: float
    interval: tuple[float, float] | None
    tasks: int

    def __str__(self) -> str:
        if self.interval is None:
            return f"{self.mean:+.3f}"
        return f"{self.mean:+.3f} [{self.interval[0]:+.3f}, {self.interval[1]:+.3f}]"


def seeds_interval(differences: Sequence[float]) -> tuple[float, float]:
    """95 % t interval of the mean of at least two seeds' differences, as (low, high)."""
    from scipy.stats import t  # a second to import, and few callers need it

    count, spread = len(differences), deviation(differences)
    if spread is None:
        raise ValueError(f"{count} seeds have no spread: give at least 2")
    half = float(t.ppf(0.975, count - 1)) * spread / math.sqrt(count)
    return mean(differences) - half, mean(differences) + half


def difference(
    ours: dict[int, dict[str, float]], theirs: dict[int, dict[str, float]], *, draws: int = 10_000
) -> Difference | None:
    """Of two methods' scores by seed and task, paired by both; None where they share no seed or no task.

    The interval reaches as far, on each side, as the wider of two: the paired bootstrap over tasks and seeds, and the t
    interval of the seeds' mean differences. Resampling two or three seeds shows too little of how seeds scatter: where
    they do, the bootstrap alone covers the truth in about 75 % of cases at two seeds and 85 % at three, not 95 %. The
    t interval knows nothing of the tasks, which all seeds share. Below three seeds there is none: the t interval of two
    is 12.7 standard errors to each side and tells nothing, and one seed has no spread.

    Args:
        draws: bootstrap samples.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    tasks = set.intersection(*(set(side[seed]) for side in (ours, theirs) for seed in seeds))
    if not tasks:
        return None
    first, second = ({task: [side[seed][task] for seed in seeds] for task in sorted(tasks)} for side in (ours, theirs))
    by_seed = [mean([first[task][i] - second[task][i] for task in first]) for i in range(len(seeds))]
    interval = None
    if len(seeds) >= FEWEST_SEEDS:
        both = (paired_bootstrap(first, second, draws=draws), seeds_interval(by_seed))
        interval = (min(low for low, _ in both), max(high for _, high in both))
    return Difference(mean(by_seed), interval, len(tasks))
