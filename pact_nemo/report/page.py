"""From a run folder to ``report.html``."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from pact_nemo.report.advice import advice, unmeasured
from pact_nemo.report.charts import HEIGHT, LEFT, RIGHT, TOP, WIDTH, reading
from pact_nemo.report.comparison import compare, total_seconds
from pact_nemo.report.curves import rl_curves, warmup_curves
from pact_nemo.report.data import Run, Stage, load_run
from pact_nemo.report.episodes import held_out_cards, training_cards
from pact_nemo.report.stats import pair, wilson
from pact_nemo.report.templates import templates
from pact_nemo.runtime.files import write_text_atomic
from pact_nemo.tracking.terminal import duration

FILE = "report.html"
HERE = Path(__file__).parent
EPISODES = 12  #: for a run folder whose configuration doesn't say ``evaluation.episodes_in_report``


@dataclass(frozen=True)
class Score:
    """One cell of the score table; shares in [0, 1], ``n`` episodes. The interval is over tasks."""

    share: float
    n: int
    low: float
    high: float


def score_of(run: Run, row: dict[str, Any]) -> Score:
    """Of one part of an evaluation; episodes of one task are not independent, so that the interval counts tasks."""
    tasks = run.held_out_tasks(row["n"]) if row["n"] else 0
    low, high = wilson(row["score"] * tasks, tasks)
    return Score(row["score"], row["n"], low, high)


def score_table(run: Run, stages: list[Stage]) -> list[tuple[str, int, list[Score | None]]]:
    """(category, episodes, score per stage), all categories together first; a sole category has one row."""
    scores = run.scores
    names = sorted({name for score in scores.values() for name in score.get("categories") or {}})
    whole = names[0] if len(names) == 1 else "all"
    lines: list[tuple[str, list[dict[str, Any] | None]]] = [(whole, [scores.get(stage.name) for stage in stages])]
    if len(names) > 1:
        lines += [
            (name, [(scores.get(stage.name) or {}).get("categories", {}).get(name) for stage in stages])
            for name in names
        ]
    table = []
    for name, rows in lines:
        cells = [score_of(run, row) if row is not None else None for row in rows]
        table.append((name, max((cell.n for cell in cells if cell is not None), default=0), cells))
    return table


def further_numbers(run: Run, stages: list[Stage]) -> list[tuple[str, list[float | None]]]:
    """(name, value per stage): the call reward, then the benchmark's own further metrics."""
    scores = [run.scores[stage.name] for stage in stages]
    names = sorted({name for score in scores for name in score.get("metrics") or {}})
    rows: list[tuple[str, list[float | None]]] = [
        ("call reward, per tool turn", [score.get("call_reward") for score in scores])
    ]
    return rows + [
        (name.replace("_", " "), [(score.get("metrics") or {}).get(name) for score in scores]) for name in names
    ]


def amount(value: float, unit: str = "") -> str:
    """A count with thin spaces between thousands."""
    return f"{value:,.0f}".replace(",", "\u202f") + (f" {unit}" if unit else "")


def size(value: float) -> str:
    return f"{value / 1024**3:.1f} GiB" if value >= 1024**3 else f"{value / 1024**2:.0f} MiB"


def environment_of(run: Run) -> str | None:
    """What the run was trained on; of an own agent, where its tools come from."""
    found = run.setting("environment")
    command = run.setting("environment_config.mcp.command") or []
    tools = run.setting("environment_config.tools") or " ".join(map(str, command))
    return f"{found}: {tools}" if tools else found


def rollouts_a_step(run: Run) -> str | None:
    """Prompts times rollouts each; None without RL, or in a run of before the settings had these names."""
    prompts, each = run.setting("trainer.batch_size"), run.setting("objective.group_size")
    return f"{amount(int(prompts) * int(each))} ({prompts} x {each})" if run.rl and prompts and each else None


def precision_of(run: Run) -> str | None:
    """What trainer, server and the weights between them had; "auto" is resolved in the summary."""
    found = dict(run.summary.get("precision") or {})
    if found and (fp8 := run.setting("policy.fp8")):
        found["trainer"] += f" with FP8 products ({fp8})"
    return ", ".join(f"{part} {value}" for part, value in found.items()) or None


def facts(run: Run) -> list[tuple[str, str]]:
    """The short list beside the headline; what the run doesn't say is left out."""
    summary = run.summary
    seconds, tokens, memory, tasks = (
        summary.get(key) or {} for key in ("seconds", "tokens", "peak_memory_bytes", "tasks")
    )
    model = run.setting("model.path")
    found: list[tuple[str, str | None]] = [
        ("Method", run.method),
        ("Model", str(model) if model else "embedded small model"),
        ("Environment", environment_of(run)),
        ("Seed", str(run.seed)),
        ("Warm-up steps", amount(len(run.warmup)) if run.warmup else None),
        ("RL steps", str(summary.get("steps", len(run.rl)))),
        ("Rollouts a step", rollouts_a_step(run)),
        ("Precision", precision_of(run)),
        ("Wall time", duration(total_seconds(seconds)) if seconds else None),
        ("Tokens sampled", amount(tokens["policy"]) if tokens.get("policy") else None),
        ("Tokens trained", amount(tokens["trained"]) if tokens.get("trained") else None),
        ("Training tasks", amount(tasks["train"]) if tasks.get("train") else None),
        ("Without a trace", part_of(tasks.get("without_trace"), tasks.get("train"))),
        ("Without reference calls", part_of(tasks.get("without_reference_calls"), tasks.get("train"))),
        ("Left out", left_out(tasks.get("dropped") or {}) or None),
        (
            f"{run.scored_tasks.capitalize()} tasks",
            amount(tasks["held_out"]) if tasks.get("held_out") else None,
        ),
        ("Failed rollouts", counted(summary.get("failed_rollouts"))),
        ("Rollout server", counted(summary.get("server"))),
        ("Peak memory", ", ".join(f"{name} {size(value)}" for name, value in memory.items() if value) or None),
        ("Checkpoint", str(summary["hf_export"]) if summary.get("hf_export") else None),
    ]
    return [(name, value) for name, value in found if value is not None]


_LEFT_OUT = {
    "rows_quarantined": "bad rows (quarantine.jsonl)",
    "prompt_too_long": "overlong prompts",
    "trace_too_long": "overlong traces",
    "trace_cut": "traces cut to their room",
}


def counted(counts: dict[str, int] | None) -> str | None:
    """``name 3, other 1``, the commonest first; None where nothing was counted."""
    return (
        ", ".join(f"{name} {amount(n)}" for name, n in sorted((counts or {}).items(), key=lambda item: -item[1]))
        or None
    )


def part_of(count: int | None, total: int | None) -> str | None:
    """``12 of 130 (9 %)``; None where there is none."""
    return f"{amount(count)} of {amount(total)} ({count / total:.0%})" if count and total else None


def left_out(dropped: dict[str, Any]) -> str:
    """What of its data a run does without, in words."""
    return ", ".join(f"{amount(dropped[key])} {words}" for key, words in _LEFT_OUT.items() if dropped.get(key))


def time_shares(run: Run) -> list[tuple[str, float, float]]:
    """(phase, seconds, share of the run), largest first."""
    seconds = run.summary.get("seconds") or {}
    phases = {name: value for name, value in seconds.items() if name != "total" and value > 0}
    whole = total_seconds(seconds) if seconds else 0.0
    return (
        sorted(((name, value, value / whole) for name, value in phases.items()), key=lambda item: -item[1])
        if whole
        else []
    )


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    environment = templates(HERE)
    environment.filters |= {
        "percent": lambda share: f"{share * 100:.1f} %",
        "points": lambda share: f"{share * 100:+.1f}".replace("-", "−"),
        "reading": reading,
        "duration": duration,
    }
    return environment


def render(run: Run, others: Sequence[Run] = ()) -> str:
    """The page as text."""
    stages = run.stages()
    scored = [stage for stage in stages if stage.name in run.scores]
    start, end = run.start(), "after" if "after" in run.scores else None
    changed = (
        pair(run.episodes[start], run.episodes[end])
        if start in run.episodes and end in run.episodes and start and end
        else None
    )
    wanted = run.setting("evaluation.episodes_in_report")
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("style.css", "script.js"))
    template = _environment().get_template("template.html")
    return template.render(
        run=run,
        scored=scored,
        start=score_of(run, run.scores[start]) if start else None,
        end=score_of(run, run.scores[end]) if end else None,
        stage="RL" if run.has_rl else "SFT",
        several=(run.setting("evaluation.samples") or 1) > 1,
        further=further_numbers(run, scored),
        table=score_table(run, scored),
        changed=changed,
        facts=facts(run),
        advice=advice(run),
        unmeasured=unmeasured(run),
        time_shares=time_shares(run),
        warmup=warmup_curves(run),
        curves=rl_curves(run),
        comparison=compare([run, *others]) if others else None,
        held_out=held_out_cards(run, EPISODES if wanted is None else int(wanted)),
        training=training_cards(run),
        stages=stages,
        versions=run.summary.get("versions") or {},
        box={"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP},
        style=Markup(style),  # noqa: S704 - both are files of this package
        script=Markup(script),  # noqa: S704
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def write_report(run_folder: str | Path, others: Sequence[str | Path] = ()) -> Path:
    """Write ``report.html`` into a run folder and return its path.

    The page needs nothing but itself. Whatever a model, a tool or a file wrote is escaped, and the page's own policy
    forbids requests and any script but the one it was made with.

    Args:
        others: run folders to compare with.

    Raises:
        DataError: a folder is no run folder, or a file in it is malformed.
    """
    run = load_run(run_folder)
    known = {run.folder}
    rest = []
    for folder in others:
        other = load_run(folder, episodes=False)
        if other.folder not in known:
            known.add(other.folder)
            rest.append(other)
    path = run.folder / FILE
    write_text_atomic(path, render(run, rest))
    return path
