"""What stays of a run when its folder is gone: one JSON file with its settings, scores by task and curves; and the
tables and pictures of many.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from pact_nemo.errors import DataError
from pact_nemo.report.comparison import total_seconds
from pact_nemo.report.data import Run
from pact_nemo.report.stats import deviation, difference, episode_score, mean
from pact_nemo.runtime import strict_json
from pact_nemo.runtime.files import write_json_atomic

SCORE = "after"
#: curves that are kept, of those that a run has
CURVES = (
    "reward/mean",
    "reward/success",
    "groups/zero_advantage",
    "rollout/truncated",
    "rollout/truncated_turn_tokens",
    "rollout/truncated_turns",
    "rollout/malformed_calls",
    "anneal/call_weight",
    "anneal/prefix_level",
    "anneal/progress",
    "gate/anchored",
    "latent/gap",
    "latent/gap_success",
    "latent/gap_failure",
    "latent/trace_reasoning",
    "latent/trace_call",
    "policy/entropy",
    "policy/kl_ref",
    "policy/grad_norm",
    "policy/moved",
    "signal/rl_product",
    "signal/rl_norm",
    "signal/sft_product",
    "signal/sft_norm",
    "held_out/trace_reasoning",
    "held_out/trace_call",
    "held_out/score",
)


@dataclass
class Result:
    """One finished run.

    Attributes:
        start, arm: names of the plan.
        words: settings that the run was told besides its method's settings file; a path of weights is left out.
        scores: stage -> task id -> score in [0, 1], the mean of its episodes; stages as in ``summary.json``.
        limits: stage -> limit that cut an episode -> episodes.
        curves: key of ``metrics.jsonl`` -> value of each RL step; None where a step has none.
        seconds: of the whole run.
        peak_memory_bytes: of trainer and server; files from before it was kept have none.
        settings, weights: digests of what the run resolved and of the weights that it began from; of a start, of those
            that it left. Older files have none.
        failed: stage -> episodes that failed through no fault of the policy; older files don't say.
        warmup: the same curves of each step of the warm-up, which is all of SFT; none in older files.
        taken_from: the file of another plan whose run this is; empty where this plan ran it.
    """

    plan: str
    start: str
    arm: str
    method: str
    seed: int
    words: list[str]
    scores: dict[str, dict[str, float]]
    limits: dict[str, dict[str, int]]
    curves: dict[str, list[float | None]]
    seconds: float
    tokens: dict[str, int]
    versions: dict[str, str] = field(default_factory=dict)
    peak_memory_bytes: dict[str, int] = field(default_factory=dict)
    warmup: dict[str, list[float | None]] = field(default_factory=dict)
    settings: str = ""
    weights: str = ""
    failed: dict[str, int] = field(default_factory=dict)
    taken_from: str = ""

    def score(self, stage: str = SCORE) -> float | None:
        """Mean over tasks; None where the stage was not played."""
        return mean(list(self.scores[stage].values())) if self.scores.get(stage) else None


def by_task(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Score of every task of an evaluation, the mean of its episodes."""
    found: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        found[row["task_id"]].append(episode_score(row))
    return {task: mean(values) for task, values in sorted(found.items())}


def result_of(run: Run, facts: dict[str, Any]) -> Result:
    """What is kept of a finished run; ``facts``: plan, start, arm and words."""
    limits: dict[str, dict[str, int]] = {}
    for stage, rows in run.episodes.items():
        counts: dict[str, int] = defaultdict(int)
        for row in rows:
            if row.get("limit"):
                counts[str(row["limit"])] += 1
        limits[stage] = dict(sorted(counts.items()))
    return Result(
        **facts,
        method=run.method,
        seed=int(run.seed),
        scores={stage: by_task(rows) for stage, rows in run.episodes.items()},
        limits=limits,
        curves=curves_of(run.rl),
        warmup=curves_of(run.warmup),
        seconds=round(total_seconds(run.summary["seconds"]), 1),
        tokens={name: int(count) for name, count in run.summary["tokens"].items()},
        versions={
            name: run.summary["versions"][name]
            for name in ("commit", "machine", "python", "torch", "megatron-core")
            if name in run.summary["versions"]
        },
        peak_memory_bytes=run.summary["peak_memory_bytes"],
        failed={stage: sum(row["status"] == "failed" for row in rows) for stage, rows in run.episodes.items()},
    )


def curves_of(records: list[dict[str, Any]]) -> dict[str, list[float | None]]:
    """The kept curves of a stage's records."""
    return {
        key: [record.get(key) for record in records]
        for key in CURVES
        if any(record.get(key) is not None for record in records)
    }


def write_result(path: Path, result: Result) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(path, asdict(result))


def read_results(folder: Path) -> list[Result]:
    """All results of a folder, by file name.

    Raises:
        DataError: a file is not one; names it.
    """
    return [read_result(path) for path in sorted(folder.glob("*.json"))]


def read_result(path: Path) -> Result:
    """One result. Raises DataError where the file is none."""
    names = {item.name for item in fields(Result)}
    needed = {item.name for item in fields(Result) if item.default_factory is MISSING and item.default is MISSING}
    try:
        value = strict_json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"no result: {error}; delete it, and it is made again", file=str(path)) from error
    if not isinstance(value, dict) or not needed <= value.keys() <= names:
        raise DataError("no result of this version; delete it, and it is made again", file=str(path))
    return Result(**value)


def groups(results: Sequence[Result]) -> dict[tuple[str, str], list[Result]]:
    """Results by (start, arm), each group by seed; starts in the order of their own score."""
    found: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for result in sorted(results, key=lambda result: result.seed):
        found[result.start, result.arm].append(result)
    return dict(found)


def scores_by_seed(results: Sequence[Result]) -> dict[int, dict[str, float]]:
    """Score after training by seed and held-out task."""
    return {result.seed: result.scores[SCORE] for result in results if result.scores.get(SCORE)}


def _settings(run: Result) -> str:
    """The words of a run, of each key the last, which is the one that counts; without those that every start needs."""
    words = {word.partition("=")[0]: word for word in run.words}
    return " ".join(word for word in words.values() if word not in ("warmup.steps=0", "evaluation.before=false"))


def _against(ours: dict[int, dict[str, float]], theirs: dict[int, dict[str, float]]) -> str:
    """The difference of two arms; with the seeds and the number of tasks that it is over, where the arms have others
    too: it is not the difference of their means then.
    """
    found = difference(ours, theirs)
    if found is None:
        return "–"
    both = sorted(ours.keys() & theirs.keys())
    over = []
    if ours.keys() != theirs.keys():
        over.append(("seed " if len(both) == 1 else "seeds ") + ", ".join(map(str, both)))
    if any(len(side[seed]) > found.tasks for side in (ours, theirs) for seed in both):
        over.append(f"{found.tasks} common tasks")
    return f"{found} ({'; '.join(over)})" if over else str(found)


def failed_remark(count: str, run: str) -> str:
    """What a table says of a run whose held-out episodes failed."""
    return f"**{count} episodes of {run}, failed** through no fault of the policy and count 0."


def table(results: Sequence[Result], baseline: str) -> str:
    """Markdown: a row per start and arm; then a row per run."""
    found = groups(results)
    begins = {arm: runs[0].score() for (start, arm), runs in found.items() if start == "published"}
    against = f"against {baseline}" if baseline else "against –"
    lines = [
        (
            f"| start | its score | arm | seeds | after | spread (std) | {against} | cut in a message | never closed |"
            " seconds |"
        ),
        "|" + "---|" * 10,
    ]
    order = sorted(found, key=lambda key: (begins.get(key[0]) or 0.0, key[0], key[1]))
    for start, arm in order:
        runs = [run for run in found[start, arm] if run.score() is not None]
        if not runs:
            continue
        ends = [run.score() or 0.0 for run in runs]
        spread = deviation(ends)
        reference = found.get((start, baseline), []) if arm != baseline else []
        cut = [sum(run.limits.get(SCORE, {}).get(limit, 0) for run in runs) for limit in ("turn_tokens", "turns")]
        begin = begins.get(start)
        cells = [start, f"{begin:.3f}" if begin is not None else "–", arm, str(len(runs)), f"**{mean(ends):.3f}**"]
        cells += [
            f"{spread:.3f}" if spread is not None else "–",
            _against(scores_by_seed(runs), scores_by_seed(reference)),
            str(cut[0]),
            str(cut[1]),
            f"{mean([run.seconds for run in runs]):,.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| start | arm | method | seed | after | settings |", "|---|---|---|---|---|---|"]
    for start, arm in order:
        for run in found[start, arm]:
            score = run.score()
            shown = f"{score:.3f}" if score is not None else "–"
            lines.append(f"| {start} | {arm} | {run.method} | {run.seed} | {shown} | `{_settings(run)}` |")
    lost = [
        failed_remark(str(count), f"{run.start}, {run.arm}, seed {run.seed}")
        for key in order
        for run in found[key]
        if (count := run.failed.get(SCORE, 0))
    ]
    return "\n".join([*lines, *([""] if lost else []), *lost]) + "\n"
