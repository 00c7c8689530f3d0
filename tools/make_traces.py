#!/usr/bin/env python
"""Expert traces for any environment: a teacher behind an OpenAI-compatible endpoint, or what the environment has, which
is reference calls that are executed (BFCL) or recorded sub-answers (FTRL, ToolHop).

    python tools/make_traces.py --out traces.jsonl environment=toolhop tasks.path=ToolHop.json --recorded
    TEACHER_API_KEY=... python tools/make_traces.py --out traces.jsonl --teacher http://127.0.0.1:8000/v1 \\
        --model NAME --attempts 4 \\
        environment=ftrl tasks.path=ftrl_train.parquet
    python tools/make_traces.py --out more.jsonl --extend traces.jsonl --augment argument_order --promote \\
        runs/latest environment=...
    python tools/make_traces.py --show traces.jsonl --limit 3

Each task is tried up to ``--attempts`` times; what passes the benchmark's own check and the filters is kept. Every
attempt is appended to ``OUT.attempts.jsonl`` at once, so that a run that was cut goes on where it stopped.
``OUT.quality.json`` says what was kept and dropped, and why.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

from pact_nemo import checkout

checkout.enter(__file__)

from rich.console import Console
from rich.text import Text

from pact_nemo.chat.thoughts import thoughts_and_visible
from pact_nemo.chat.tool_formats import tool_format
from pact_nemo.config.load import load_config
from pact_nemo.config.schema import Config
from pact_nemo.data.tasks import build_environment, refuse_evaluation_only
from pact_nemo.environments.base import Environment, Task
from pact_nemo.environments.calls import shown
from pact_nemo.environments.registry import environment_spec
from pact_nemo.errors import ConfigError, DataError, PactError, ServerError
from pact_nemo.rollouts.store import read_rollouts
from pact_nemo.rollouts.types import Rollout
from pact_nemo.runtime.files import write_json_atomic
from pact_nemo.runtime.terminal import command
from pact_nemo.serving.chat_endpoint import chat_endpoint
from pact_nemo.traces.annotate import Style
from pact_nemo.traces.augment import KINDS, new_solutions, promoted, replay, variants
from pact_nemo.traces.filters import turns_without_reasoning, why_not
from pact_nemo.traces.llm_annotate import ModelAnnotator
from pact_nemo.traces.schema import Trace, read_traces, write_traces
from pact_nemo.traces.segments import split_reasoning
from pact_nemo.traces.teacher import teacher_trace
from pact_nemo.traces.without_teacher import expert_trace
from pact_nemo.tracking.terminal import RunProgress

Attempt = Callable[[Task], Trace | None]
NAMED = 100  #: tasks that the quality report names, at most
COLOURS = {"reasoning": "cyan", "call": "bold green", "observation": "yellow", "user": "magenta"}


def verdict(trace: Trace | None, task: Task) -> str:
    """``kept``, or why not."""
    if trace is None:
        return "no_solution"
    return why_not(trace, task) or "kept"


class Journal:
    """The attempts made so far, one JSON line each; a torn last line (the run was cut) is dropped."""

    def __init__(self, path: Path):
        self._path, self._lock = path, threading.Lock()
        self.kept: dict[str, Trace] = {}
        self.tries: Counter[str] = Counter()
        self.reasons: dict[str, list[str]] = defaultdict(list)
        if path.is_file():
            lines = path.read_text(encoding="utf-8").split("\n")
            for number, line in enumerate(lines[:-1], start=1):
                row = json.loads(line)
                self._note(
                    row["task_id"],
                    row["verdict"],
                    Trace.from_dict(row["trace"], file=str(path), line=number) if row["trace"] else None,
                )
            if lines[-1]:
                path.write_text("\n".join(lines[:-1]) + "\n" if len(lines) > 1 else "", encoding="utf-8")

    def _note(self, task_id: str, reason: str, trace: Trace | None) -> None:
        self.tries[task_id] += 1
        self.reasons[task_id].append(reason)
        if reason == "kept" and trace is not None:
            self.kept[task_id] = trace

    def add(self, task_id: str, reason: str, trace: Trace | None) -> None:
        row = {
            "task_id": task_id,
            "verdict": reason,
            "trace": trace.to_dict() if trace is not None and reason == "kept" else None,
        }
        with self._lock:
            with open(self._path, "a", encoding="utf-8") as out:
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
            self._note(task_id, reason, trace)


def quality(
    tasks: list[Task], journal: Journal, tokens: Counter[str], annotator: ModelAnnotator | None
) -> dict[str, Any]:
    """What came of it: over tasks, and over attempts by reason."""
    categories: dict[str, Counter[str]] = defaultdict(Counter)
    for task in tasks:
        categories[task.category]["tasks"] += 1
        categories[task.category]["kept"] += task.id in journal.kept
    bare = {
        task.id: count
        for task in tasks
        if task.id in journal.kept and (count := turns_without_reasoning(journal.kept[task.id]))
    }
    return {
        "tasks": len(tasks),
        "kept": sum(task.id in journal.kept for task in tasks),
        "attempts": dict(Counter(reason for task in tasks for reason in journal.reasons[task.id])),
        "coverage": {
            name: {**count, "share": count["kept"] / count["tasks"]} for name, count in sorted(categories.items())
        },
        "calls_without_reasoning": {"traces": len(bare), "turns": sum(bare.values()), "tasks": sorted(bare)[:NAMED]},
        "tokens": dict(tokens),
        "annotator": (
            None if annotator is None else {"turns": annotator.turns, "fallbacks_to_rules": annotator.fallbacks}
        ),
    }


def make(config: Config, options: argparse.Namespace) -> dict[str, Any]:
    environment = build_environment(config)
    tokens: Counter[str] = Counter()
    annotator: ModelAnnotator | None = None
    try:
        tasks = environment.tasks()[: options.limit]
        refuse_evaluation_only(config, tasks)
        attempt: Attempt
        if options.teacher is not None:

            def used(prompt: int, completion: int) -> None:
                tokens["prompt"] += prompt
                tokens["completion"] += completion

            key = os.environ.get("TEACHER_API_KEY", "none")
            complete = chat_endpoint(options.teacher, options.model, key, options.timeout, options.temperature, used)
            annotator = ModelAnnotator(complete) if options.annotate else None

            def attempt(task: Task) -> Trace | None:
                return teacher_trace(environment, task, complete, options.max_turns, annotator or split_reasoning)

        else:
            attempt = without_teacher(config, environment)
        journal = Journal(Path(f"{options.out}.attempts.jsonl"))
        run_attempts(tasks, journal, attempt, options.attempts if options.teacher else 1, options.concurrency)
    finally:
        environment.close()
    write_traces(options.out, [journal.kept[task.id] for task in tasks if task.id in journal.kept])
    found = quality(tasks, journal, tokens, annotator)
    write_json_atomic(f"{options.out}.quality.json", found)
    return found


def extend(config: Config, options: argparse.Namespace) -> dict[str, Any]:
    """A trace file with more traces per task: verified variants of what it has, and solutions of the policy's own
    rollouts.
    """
    environment = build_environment(config)
    counts: Counter[str] = Counter()
    try:
        tasks = {task.id: task for task in environment.tasks()}
        known: dict[str, list[Trace]] = defaultdict(list)
        for trace in read_traces(options.extend) if options.extend is not None else []:
            known[trace.task_id].append(trace)
        counts["read"] = sum(map(len, known.values()))
        if options.promote is not None:
            found: dict[str, list[Trace]] = defaultdict(list)
            for rollout in rollouts_of(options.promote):
                if rollout.task_id in tasks:
                    task = tasks[rollout.task_id]
                    solution = promoted(task, rollout, reasoning_of(config, task))
                    if solution is not None and verdict(solution, task) == "kept":
                        found[task.id].append(solution)
            for task_id, candidates in found.items():
                fresh = new_solutions(known[task_id], candidates)
                played = [(trace, replay(environment, tasks[task_id], trace)) for trace in fresh]
                checked = [trace for trace, result in played if result is not None and result.outcome.success]
                known[task_id] += checked[: config.traces.variants]
                counts["promoted"] += len(checked[: config.traces.variants])
                counts["promoted_but_failed_replay"] += len(fresh) - len(checked)
        for task_id, traces in known.items():
            if options.augment and task_id in tasks and traces:
                made = variants(
                    environment,
                    tasks[task_id],
                    traces[0],
                    options.augment,
                    config.traces.variants,
                    config.tasks.split_seed,
                )
                traces += made
                counts.update(trace.source.rpartition("+")[2] for trace in made)
    finally:
        environment.close()
    written = [trace for traces in known.values() for trace in traces]
    write_traces(options.out, written)
    return {"tasks": len(known), "traces": len(written), **counts}


def reasoning_of(config: Config, task: Task) -> Callable[[str], str]:
    """The text before the calls of an assistant message, in the tool format of the config: its thought, and what else
    it says, without markers.
    """
    parse = tool_format(config.model.tool_format).parse
    return lambda text: "\n\n".join(part for part in thoughts_and_visible(parse(text, task.tools).reasoning) if part)


def rollouts_of(run: Path) -> list[Rollout]:
    """Every dumped training rollout of a run, in order of steps."""
    files = sorted((run / "rollouts").glob("step_*.jsonl"))
    if not files:
        raise DataError(
            "no dumped rollouts (rollouts/step_*.jsonl); was the run made with trainer.dump_rollouts=false?",
            file=str(run),
        )
    return [rollout for path in files for rollout in read_rollouts(path)]


def without_teacher(config: Config, environment: Environment) -> Attempt:
    """An attempt from what the environment has. Raises ConfigError where it has nothing."""
    style, per_turn = cast(Style, config.traces.style), cast(Any, config.traces.calls_per_turn)
    kind = environment_spec(config.environment).expert_traces
    if kind == "none":
        raise ConfigError(f"environment={config.environment} has no expert traces of its own; give --teacher URL")
    return lambda task: expert_trace(kind, environment, task, style, per_turn)


def run_attempts(tasks: list[Task], journal: Journal, attempt: Attempt, attempts: int, concurrency: int) -> None:
    """Every task without a kept trace, until one is kept or its attempts are used up. A teacher that is away counts as
    no attempt.
    """
    open_tasks = [task for task in tasks if task.id not in journal.kept and journal.tries[task.id] < attempts]
    failure: list[ServerError] = []
    with RunProgress(total_steps=1) as progress, progress.phase("traces", total=len(open_tasks)) as phase:

        def solve(task: Task) -> None:
            while not failure and task.id not in journal.kept and journal.tries[task.id] < attempts:
                try:
                    trace = attempt(task)
                except ServerError as error:
                    failure.append(error)
                    return
                journal.add(task.id, verdict(trace, task), trace)
            phase.advance(note=f"{len(journal.kept)} kept")

        with ThreadPoolExecutor(concurrency) as threads:
            list(threads.map(solve, open_tasks))
    if failure:
        raise ServerError(f"{failure[0]}; what was made so far is in the attempts file, start again to go on")


def show(path: Path, limit: int | None) -> None:
    """Traces with their components coloured."""
    console = Console(highlight=False)
    for trace in read_traces(path)[:limit]:
        console.rule(f"{trace.task_id} · {trace.source} · {'verified' if trace.verified else 'NOT verified'}")
        for turn in trace.turns:
            for segment in turn.segments:
                console.print(
                    Text(f"[{segment.type}] ", style="dim") + Text(segment.text.strip(), style=COLOURS["reasoning"])
                )
            for call, observation in zip(turn.calls, turn.observations, strict=True):
                console.print(Text(shown(call), style=COLOURS["call"]))
                console.print(Text(observation, style=COLOURS["observation"]))
            if turn.said or turn.closing_message:
                console.print(Text(f"assistant: {turn.said or turn.closing_message}", style="dim"))
            for message in turn.user_messages_after:
                console.print(Text(f"{message['role']}: {message['content']}", style=COLOURS["user"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("traces.jsonl"))
    parser.add_argument("--config", action="append", metavar="YAML", help="settings files as for the recipes")
    parser.add_argument(
        "--teacher",
        metavar="URL",
        help="OpenAI-compatible base URL, e.g. http://127.0.0.1:8000/v1; the key is in TEACHER_API_KEY",
    )
    parser.add_argument("--model", default="default", help="the teacher's name at that endpoint")
    parser.add_argument(
        "--recorded",
        action="store_true",
        help="no teacher: what the environment has, recorded sub-answers (FTRL, ToolHop) or ground truth (BFCL)",
    )
    parser.add_argument("--extend", type=Path, metavar="TRACES", help="start from these traces and add more to them")
    parser.add_argument(
        "--augment",
        action="append",
        choices=KINDS,
        default=[],
        help="(repeatable) add variants that execution verified",
    )
    parser.add_argument("--promote", type=Path, metavar="RUN", help="add the solutions that a run's own rollouts found")
    parser.add_argument(
        "--annotate", action="store_true", help="let the teacher type its reasoning's paragraphs; rules where it can't"
    )
    parser.add_argument("--attempts", type=int, default=4)
    parser.add_argument("--max-turns", type=int, default=10, help="assistant turns per user turn")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds per answer")
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--limit", type=int, help="only the first tasks (or traces to show)")
    parser.add_argument(
        "--show", type=Path, metavar="TRACES", help="print traces, components coloured, and do nothing else"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="any setting, e.g. environment=ftrl tasks.path=rows.parquet",
    )
    options = parser.parse_intermixed_args()
    try:
        if options.show is not None:
            show(options.show, options.limit)
            return 0
        more = bool(options.promote is not None or (options.extend is not None and options.augment))
        if (options.teacher is not None) + options.recorded + more != 1:
            parser.error("where are traces from? --teacher URL, --recorded, or --extend with --augment or --promote")
        config = load_config(options.config, options.overrides)
        found = extend(config, options) if more else make(config, options)
    except PactError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    command(main)
