#!/usr/bin/env python
"""Methods x seeds on one benchmark with the same tasks, rollouts and budget: one run per subprocess, resumable, and a table of what came out.

    python tools/compare.py --methods pact grpo matchtir --seeds 1 2 3 --out docs/results.md
    python tools/compare.py --methods pact chord luffy --seeds 1 2 3 -- trainer.steps=20     # the same overrides for every run
    python tools/compare.py --collect runs --out results.md --picture curves.svg            # runs that exist already; starts nothing

A method is the first word of a file ``conf/<method>_<benchmark>-<preset>.yaml``. A finished run is not run again; one that was cut is resumed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from pact_nemo.errors import ConfigError, PactError  # noqa: E402
from pact_nemo.files import write_text_atomic  # noqa: E402
from pact_nemo.terminal import command  # noqa: E402
from pact_nemo.training.config import load_config, to_dict  # noqa: E402
from pact_nemo.training.report.comparison import differences, flat, total_seconds  # noqa: E402
from pact_nemo.training.report.data import Run, load_run  # noqa: E402
from pact_nemo.training.report.picture import comparison_svg  # noqa: E402
from pact_nemo.training.report.stats import deviation, mean, paired_bootstrap, passed  # noqa: E402

SCORE = "after"


def config_of(method: str, benchmark: str, preset: str) -> Path:
    path = REPOSITORY / "conf" / f"{method}_{benchmark}-{preset}.yaml"
    if not path.is_file():
        known = sorted(p.name.split("_" + benchmark)[0] for p in path.parent.glob(f"*_{benchmark}-{preset}.yaml"))
        raise ConfigError(f"no settings file {path.name}; methods with one: {', '.join(known)}")
    return path


def finished(root: Path) -> Path | None:
    """The run folder under ``root`` that has a summary, or None."""
    return next((path.parent for path in sorted(root.glob("*/summary.json")) if not path.parent.is_symlink()), None)


def run_one(config: Path, benchmark: str, seed: int, root: Path, overrides: list[str]) -> Path:
    """Run to the end, or go on where it was cut. Raises PactError with the end of its log when it fails."""
    done = finished(root)
    if done is not None:
        wanted = flat(to_dict(load_config([config], [f"run.seed={seed}", *overrides])))
        different = [key for key, value in flat(load_run(done, episodes=False).config).items() if key in wanted and wanted[key] != value]
        different = [key for key in different if not key.startswith("run.")]
        if different:
            raise ConfigError(f"{done} was run with other settings ({', '.join(different)}); give --root another folder, or delete it")
        return done
    recipe = str(REPOSITORY / "recipes" / f"pact_{benchmark}.py")
    cut = [path.parent for path in sorted(root.glob("*/checkpoints/latest")) if not path.parent.parent.is_symlink()]
    words = ["--resume", str(cut[-1].parent)] if cut else ["--config", str(config), f"run.seed={seed}", f"run.root={root}", *overrides]
    root.mkdir(parents=True, exist_ok=True)
    log = root / "log.txt"
    with open(log, "a", encoding="utf-8") as out:
        code = subprocess.call([sys.executable, recipe, *words], stdout=out, stderr=subprocess.STDOUT, cwd=REPOSITORY)
    done = finished(root)
    if code != 0 or done is None:
        end = "\n".join(log.read_text(encoding="utf-8").split("\n")[-8:])
        raise PactError(f"{config.name}, seed {seed}: exit code {code}; end of {log}:\n{end}")
    return done


def by_task(runs: list[Run]) -> dict[str, list[float]]:
    """Score of every held-out task, a value per run."""
    scores: dict[str, list[float]] = defaultdict(list)
    for run in runs:
        for row in run.episodes.get(SCORE, []):
            outcome = row.get("outcome") or {}
            scores[row["task_id"]].append(float(outcome.get("score", passed(row))))
    return scores


def table(methods: dict[str, list[Run]], baseline: str, command: str) -> str:
    """Markdown: a row per method, a row per run."""
    lines = [
        f"| method | seeds | as published | after warm-up | after | change | spread (std) | against {baseline} | seconds | tokens trained |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    reference = by_task(methods[baseline]) if baseline in methods else {}
    for method, runs in methods.items():
        ends = [run.scores[SCORE]["score"] for run in runs]
        spread = deviation(ends)
        cells = [method, str(len(runs))]
        for stage in ("base", "before"):
            values = [run.scores[stage]["score"] for run in runs if stage in run.scores]
            cells.append(f"{mean(values):.3f}" if values else "–")
        starts = [run.scores["before"]["score"] for run in runs if "before" in run.scores]
        change = f"{mean(ends) - mean(starts):+.3f}" if len(starts) == len(ends) else "–"
        cells += [f"**{mean(ends):.3f}**", change, f"{spread:.3f}" if spread is not None else "–"]
        if method == baseline or not reference:
            cells.append("–")
        else:
            low, high = paired_bootstrap(by_task(runs), reference)
            difference = mean(ends) - mean([run.scores[SCORE]["score"] for run in methods[baseline]])
            cells.append(f"{difference:+.3f} [{low:+.3f}, {high:+.3f}]")
        cells.append(f"{mean([total_seconds(run.summary['seconds']) for run in runs]):,.0f}")
        cells.append(f"{mean([run.summary['tokens']['trained'] for run in runs]):,.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| method | seed | as published | after warm-up | after |", "|---|---|---|---|---|"]
    for method, runs in methods.items():
        for run in sorted(runs, key=lambda r: int(r.seed)):
            stages = [run.scores[stage]["score"] if stage in run.scores else None for stage in ("base", "before", SCORE)]
            lines.append(f"| {method} | {run.seed} | " + " | ".join(f"{v:.3f}" if v is not None else "–" for v in stages) + " |")
    for method, runs in methods.items():
        if unlike := differences(runs):
            lines += ["", f"**The runs of {method} differ in their settings**: {', '.join(key for key, _ in unlike)}."]
    first = next(iter(methods.values()))[0]
    count = first.scores[SCORE]["n"]
    versions = first.summary["versions"]
    lines += [
        "",
        f"{count} held-out tasks a run, greedy decoding, the benchmark's own checker. In brackets: 95 % interval of the difference over",
        "tasks (paired bootstrap, 10,000 draws; a task's score is its mean over seeds). Seconds and tokens are means over the runs.",
        ", ".join(f"{name} {versions[name]}" for name in ("machine", "python", "torch", "megatron-core") if name in versions) + ".",
        f"Made by `{command}`.",
        "",
    ]
    return "\n".join(lines)


def collect(folder: Path) -> dict[str, list[Run]]:
    """Finished runs anywhere below a folder, by method, each method's by seed."""
    methods: dict[str, list[Run]] = defaultdict(list)
    for path in sorted(folder.rglob("summary.json")):
        if not any(parent.is_symlink() for parent in (path.parent, *path.parent.parents)):
            run = load_run(path.parent)
            if SCORE in run.scores:
                methods[run.method].append(run)
    if not methods:
        raise PactError(f"{folder}: no finished run with a score after training")
    return {name: sorted(methods[name], key=lambda run: int(run.seed)) for name in sorted(methods, key=lambda name: (name != "pact", name))}


def main() -> int:
    words = sys.argv[1:]
    overrides = words[words.index("--") + 1 :] if "--" in words else []
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["pact", "grpo"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--benchmark", default="bfcl", choices=["bfcl", "ftrl", "toolhop"])
    parser.add_argument("--preset", default="smollm2_135m-cpu", help="rest of the settings files' names")
    parser.add_argument("--root", type=Path, default=Path("runs/compare"))
    parser.add_argument("--baseline", default="grpo", help="the method that the others are compared with")
    parser.add_argument("--collect", type=Path, metavar="FOLDER", help="only make the table, of the runs below this folder")
    parser.add_argument("--picture", type=Path, metavar="SVG", help="also draw scores and learning curves")
    parser.add_argument("--out", type=Path, help="markdown file; the part between its two 'table' comments is replaced, a new file is made")
    options = parser.parse_args(words[: words.index("--")] if "--" in words else words)
    try:
        if options.collect is not None:
            methods = collect(options.collect)
        else:
            pairs = [(method, seed) for seed in options.seeds for method in options.methods]  # seed by seed: a cut comparison is still paired
            configs = {method: config_of(method, options.benchmark, options.preset) for method in options.methods}
            methods = {method: [] for method in options.methods}
            started = time.monotonic()
            for index, (method, seed) in enumerate(pairs):
                print(f"[{time.monotonic() - started:6.0f} s] run {index + 1}/{len(pairs)}: {method}, seed {seed}", flush=True)
                folder = run_one(configs[method], options.benchmark, seed, options.root / f"{method}-seed{seed}", overrides)
                methods[method].append(load_run(folder))
        if options.picture is not None:
            write_text_atomic(options.picture, comparison_svg([run for runs in methods.values() for run in runs]))
            print(f"picture: {options.picture}")
        text = table(methods, options.baseline, "python tools/compare.py " + " ".join(words))
    except PactError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(text)
    if options.out is not None:
        write_text_atomic(options.out, replaced(options.out, text))
        print(f"written: {options.out}")
    return 0


def replaced(path: Path, text: str) -> str:
    """The file with its table replaced, or a new file."""
    begin, end = "<!-- table -->", "<!-- /table -->"
    if not path.is_file():
        return f"# Comparison\n\n{begin}\n{text}{end}\n"
    whole = path.read_text(encoding="utf-8")
    if begin not in whole or end not in whole:
        raise ConfigError(f"{path} exists and has no {begin} … {end}; name another file or add the two comments")
    return whole[: whole.index(begin)] + f"{begin}\n{text}{end}" + whole[whole.index(end) + len(end) :]


if __name__ == "__main__":
    command(main)
