#!/usr/bin/env python
"""Methods x seeds on one benchmark with the same tasks, rollouts and budget: one run per subprocess, resumable, and a
table of what came out.

    python tools/compare.py --methods pact grpo matchtir --seeds 1 2 3 --out docs/results.md
    # the same overrides for every run
    python tools/compare.py --methods pact chord luffy --seeds 1 2 3 -- trainer.steps=20
    # runs that exist already; starts nothing
    python tools/compare.py --collect runs --out results.md --picture curves.svg

    # a grid with shared starting policies and a budget
    python tools/compare.py --plan conf/plans/starting_point.yaml

    # an agent of your own
    python tools/compare.py --benchmark own --methods pact grpo sft --baseline sft -- agent.tools=shop.py:Shop \\
        tasks.path=tasks.jsonl traces.path=traces.jsonl

A method is the first word of a file ``conf/<method>_<benchmark>-<preset>.yaml``. A finished run is not run again; one
that was cut is resumed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

from pact_nemo import checkout

checkout.enter(__file__)

from pact_nemo.errors import ConfigError, PactError
from pact_nemo.report.comparison import differences, total_seconds
from pact_nemo.report.data import Run, load_run
from pact_nemo.report.picture import comparison_svg
from pact_nemo.report.stats import deviation, difference, mean
from pact_nemo.runtime.files import write_text_atomic
from pact_nemo.runtime.terminal import command
from tools.comparisons import plan as plans
from tools.comparisons import results as kept
from tools.comparisons.picture import starts_svg
from tools.comparisons.results import SCORE
from tools.comparisons.results import by_task as task_scores
from tools.comparisons.runner import check_words, config_of, passing_signals_on, run_one
from tools.comparisons.running import run_plan

REPOSITORY = checkout.ROOT
#: settings that say what a score is of, and under which limits
ALIKE = ("model.", "tasks.", "environment", "evaluation.", "rollout.sampling.max_", "rollout.server.max_model_len")
METHODS, SEEDS, BASELINE = ("pact", "grpo"), (1, 2, 3), "grpo"


def by_seed(runs: list[Run]) -> dict[int, dict[str, float]]:
    """Score after training by seed and held-out task."""
    return {int(run.seed): task_scores(run.episodes.get(SCORE, [])) for run in runs}


def table(methods: dict[str, list[Run]], baseline: str, command: str) -> str:
    """Markdown: a row per method, a row per run."""
    lines = [
        (
            f"| method | seeds | as published | after warm-up | after | change | spread (std) | against {baseline} |"
            " seconds | tokens trained |"
        ),
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    reference = by_seed(methods.get(baseline, []))
    for method, runs in methods.items():
        ends = [run.scores[SCORE]["score"] for run in runs]
        spread = deviation(ends)
        cells = [method, str(len(runs))]
        for stage in ("base", "before"):
            values = [run.scores[stage]["score"] for run in runs if stage in run.scores]
            cells.append(f"{mean(values):.3f}" if values else "–")
        starts = [run.scores[name]["score"] for run in runs if (name := run.start()) is not None]
        change = f"{mean(ends) - mean(starts):+.3f}" if len(starts) == len(ends) else "–"
        cells += [f"**{mean(ends):.3f}**", change, f"{spread:.3f}" if spread is not None else "–"]
        cells.append(str((difference(by_seed(runs), reference) if method != baseline else None) or "–"))
        cells.append(f"{mean([total_seconds(run.summary['seconds']) for run in runs]):,.0f}")
        cells.append(f"{mean([run.summary['tokens']['trained'] for run in runs]):,.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| method | seed | as published | after warm-up | after |", "|---|---|---|---|---|"]
    for method, runs in methods.items():
        for run in sorted(runs, key=lambda r: int(r.seed)):
            stages = [
                run.scores[stage]["score"] if stage in run.scores else None for stage in ("base", "before", SCORE)
            ]
            lines.append(
                f"| {method} | {run.seed} | " + " | ".join(f"{v:.3f}" if v is not None else "–" for v in stages) + " |"
            )
    for method, runs in methods.items():
        if unlike := differences(runs):
            lines += ["", f"**The runs of {method} differ in their settings**: {', '.join(key for key, _ in unlike)}."]
    every = [run for runs in methods.values() for run in runs]
    apart = [key for key, _ in differences(every) if key.startswith(ALIKE)]
    if apart:
        lines += ["", f"**The methods were evaluated differently**: {', '.join(apart)}."]
    if told := remarks(every):
        lines += ["", *told]
    versions = every[0].summary["versions"]
    lines += [
        "",
        f"{what_was_played(every)} In brackets: 95 % interval of the difference over",
        "the tasks and seeds that both have: the wider of a paired bootstrap (10,000 draws) and of a t interval over"
        " the seeds; fewer than three seeds have none. Seconds and tokens are means over the runs.",
        ", ".join(
            f"{name} {versions[name]}" for name in ("machine", "python", "torch", "megatron-core") if name in versions
        )
        + ".",
        f"Made by `{command}`.",
        "",
    ]
    return "\n".join(lines)


def what_was_played(runs: list[Run]) -> str:
    """Episodes, tasks and decoding of the scores, in words."""

    def several(values: set[str]) -> str:
        return " or ".join(sorted(values))

    tasks = sorted({len(task_scores(run.episodes.get(SCORE, []))) for run in runs})
    counts = " to ".join(map(str, tasks if len(tasks) < 2 else (tasks[0], tasks[-1])))
    heat = {float(run.setting("evaluation.temperature") or 0) for run in runs}
    samples = {str(run.setting("evaluation.samples") or 1) for run in runs}
    decoding = several({"greedy decoding" if value == 0 else f"temperature {value:g}" for value in heat})
    each = "" if samples == {"1"} else f" {several(samples)} episodes each,"
    names = several({run.scored_tasks for run in runs})
    return f"{counts} {names} tasks a run,{each} {decoding}, the environment's own verdict."


def remarks(runs: list[Run]) -> list[str]:
    """What a reader has to know of the scores: episodes that failed, and runs that were scored on other tasks."""
    found = [
        kept.failed_remark(f"{failed} of {run.scores[SCORE]['n']}", f"{run.method}, seed {run.seed}")
        for run in runs
        if (failed := run.scores[SCORE].get("failed"))
    ]
    played = [set(task_scores(run.episodes.get(SCORE, []))) for run in runs]
    if any(tasks != played[0] for tasks in played):
        common = len(set.intersection(*played))
        found.append(f"**The runs were scored on different tasks**; {common} are common to all.")
    return found


def collect(folder: Path) -> dict[str, list[Run]]:
    """Finished runs anywhere below a folder, by method, each method's by seed."""
    methods: dict[str, list[Run]] = defaultdict(list)
    for path in sorted(folder.rglob("summary.json")):
        if not any(parent.is_symlink() for parent in (path.parent, *path.parent.parents)):
            run = load_run(path.parent)
            if SCORE in run.scores:
                for other in methods[run.method]:
                    if other.seed == run.seed:
                        raise PactError(
                            f"{other.folder} and {run.folder} are both {run.method} with seed {run.seed}: they are no"
                            " two seeds; take one of them away"
                        )
                methods[run.method].append(run)
    if not methods:
        raise PactError(f"{folder}: no finished run with a score after training")
    return {
        name: sorted(methods[name], key=lambda run: int(run.seed))
        for name in sorted(methods, key=lambda name: (name != "pact", name))
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", help=f"default: {' '.join(METHODS)}")
    parser.add_argument("--seeds", nargs="+", type=int, help=f"default: {' '.join(map(str, SEEDS))}")
    parser.add_argument("--benchmark", default="bfcl", help="second word of the settings files' names")
    parser.add_argument("--preset", default="smollm2_135m-cpu", help="rest of the settings files' names")
    parser.add_argument("--root", type=Path, default=Path("runs/compare"))
    parser.add_argument("--baseline", help=f"the method that the others are compared with; default: {BASELINE}")
    parser.add_argument(
        "--collect", type=Path, metavar="FOLDER", help="only make the table, of the runs below this folder"
    )
    parser.add_argument(
        "--plan", type=Path, metavar="YAML", help="run a plan; a result is kept in --results for each run, as JSON"
    )
    parser.add_argument(
        "--results", type=Path, help="with --plan; default: docs/evidence/NAME, where NAME is the plan's"
    )
    parser.add_argument(
        "--only-table",
        action="store_true",
        help="with --plan: start nothing, make the table of the results that there are",
    )
    parser.add_argument(
        "--keep-weights", action="store_true", help="with --plan: keep checkpoints and weights of finished runs"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="with --plan: runs at once, for a machine that has room for several"
    )
    parser.add_argument("--picture", type=Path, metavar="SVG", help="also draw scores and learning curves")
    parser.add_argument(
        "--out",
        type=Path,
        help="markdown file; the part between its two 'table' comments, or 'table NAME' of a plan's name, is replaced;"
        " a new file is made",
    )
    return parser


def run_methods(options: argparse.Namespace, overrides: list[str]) -> dict[str, list[Run]]:
    """Run every method with every seed, seed by seed, so that a cut comparison is still paired."""
    check_words(overrides, ("run.seed", "run.root"))
    names = dict.fromkeys(options.methods or METHODS)  # one that is named twice is no second run
    pairs = [(method, seed) for seed in dict.fromkeys(options.seeds or SEEDS) for method in names]
    configs = {method: config_of(method, options.benchmark, options.preset) for method in names}
    methods: dict[str, list[Run]] = {method: [] for method in names}
    started = time.monotonic()
    for index, (method, seed) in enumerate(pairs):
        seconds = time.monotonic() - started
        print(f"[{seconds:6.0f} s] run {index + 1}/{len(pairs)}: {method}, seed {seed}", flush=True)
        folder = run_one(configs[method], seed, options.root / f"{method}-seed{seed}", overrides)
        methods[method].append(load_run(folder))
    return methods


def check_options(options: argparse.Namespace, overrides: list[str]) -> None:
    """Raises ConfigError where an option or a word would be read by nothing."""
    given = [name for name in ("methods", "seeds") if getattr(options, name)]
    plan, collects = options.plan is not None, options.collect is not None
    unread = []
    if plan and collects:
        unread.append("--collect: --plan makes its own table")
    elif plan:
        unread += [f"--{name}: the plan says it" for name in [*given, *(["baseline"] if options.baseline else [])]]
        unread += [f"{' '.join(overrides)}: settings stand in the plan, under 'set'"] if overrides else []
    elif collects:
        unread += [f"--{name}: --collect takes the runs that there are" for name in given]
        unread += [f"{' '.join(overrides)}: --collect starts no run"] if overrides else []
    if options.only_table and not plan:
        unread.append("--only-table: it is read with --plan")
    if unread:
        raise ConfigError("; ".join(unread) + "; leave it out")
    names = options.methods or METHODS
    if options.baseline and not plan and not collects and options.baseline not in names:
        raise ConfigError(f"--baseline={options.baseline} is none of --methods {' '.join(names)}")


def main() -> int:
    words = sys.argv[1:]
    overrides = words[words.index("--") + 1 :] if "--" in words else []
    options = _parser().parse_args(words[: words.index("--")] if "--" in words else words)
    try:
        check_options(options, overrides)
        if options.plan is not None:
            return of_plan(options)
        methods = collect(options.collect) if options.collect is not None else run_methods(options, overrides)
        if options.baseline and options.baseline not in methods:
            raise ConfigError(f"--baseline={options.baseline} has no run; there are: {', '.join(methods)}")
        if options.picture is not None:
            write_text_atomic(options.picture, comparison_svg([run for runs in methods.values() for run in runs]))
            print(f"picture: {options.picture}")
        text = table(methods, options.baseline or BASELINE, "python tools/compare.py " + " ".join(words))
    except PactError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(text)
    if options.out is not None:
        write_text_atomic(options.out, replaced(options.out, text))
        print(f"written: {options.out}")
    return 0


def of_plan(options: argparse.Namespace) -> int:
    """Run a plan, or show what it brought so far."""
    if options.jobs < 1:
        raise PactError(f"--jobs={options.jobs}: give at least 1")
    plan = plans.load_plan(options.plan)
    folder = options.results or REPOSITORY / "docs" / "evidence" / plan.name
    if not options.only_table:
        run_plan(
            plan,
            options.root / plan.name,
            folder,
            keep_weights=options.keep_weights,
            jobs=options.jobs,
            note=partial(print, flush=True),
        )
    results, others = plans.results_of(plan, folder)
    if not results:
        raise PactError(f"{folder} holds no result yet; leave --only-table out to make some")
    text = kept.table(results, plan.baseline)
    if others:
        print(f"not of this plan, and in no table: {', '.join(others)}", file=sys.stderr)
    print(text)
    if options.out is not None:
        write_text_atomic(options.out, replaced(options.out, text, plan.name))
        print(f"written: {options.out}")
    if options.picture is not None:
        write_text_atomic(options.picture, starts_svg(results))
        print(f"picture: {options.picture}")
    return 0


def replaced(path: Path, text: str, name: str = "") -> str:
    """The file with its table replaced, or a new file.

    Args:
        name: of a plan: its table may have comments of its own, so that a page holds those of several plans.

    Raises:
        ConfigError: the file has no such place.
    """
    if not path.is_file():
        return f"# Comparison\n\n<!-- table -->\n{text}<!-- /table -->\n"
    whole = path.read_text(encoding="utf-8")
    end = "<!-- /table -->"
    for begin in ([f"<!-- table {name} -->"] if name else []) + ["<!-- table -->"]:
        before, found, rest = whole.partition(begin)
        if found and end in rest:
            return f"{before}{begin}\n{text}{end}{rest.partition(end)[2]}"
    raise ConfigError(f"{path} exists and has no <!-- table --> … {end}; name another file or add the two comments")


def run_until_told() -> int:
    with passing_signals_on():
        return main()


if __name__ == "__main__":
    command(run_until_told)
