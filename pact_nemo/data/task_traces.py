"""The expert traces of tasks: read from a file or made, replayed, and multiplied."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeVar, cast

from pact_nemo.config.schema import Config
from pact_nemo.data.conversations import conversations_of, import_traces
from pact_nemo.environments.base import Environment, Task, ToolCall
from pact_nemo.environments.registry import environment_spec
from pact_nemo.runtime.collective import on_rank_zero
from pact_nemo.runtime.quarantine import Quarantine
from pact_nemo.traces.annotate import Style
from pact_nemo.traces.augment import Kind, replay, variants
from pact_nemo.traces.filters import why_not
from pact_nemo.traces.schema import Trace, read_traces
from pact_nemo.traces.verification import new_errors
from pact_nemo.traces.without_teacher import expert_trace

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass
class TaskTraces:
    """Verified traces before they are tokens.

    Attributes:
        sources: training task id -> its traces, the main one first.
        unseen: held-out task id -> a trace that is measured and never trained on.
        references: training task id -> the trace whose calls the task takes as reference calls, where it has none of
            its own. Those that ``traces.max_tasks`` keeps from SFT and conditioning are among them; those that failed
            ``traces.quality``'s replay are not.
        results: training task id -> (score, calls) of its trace when it was replayed; empty unless ``traces.quality``.
        dropped: what was left out, by reason.
    """

    sources: dict[str, list[Trace]]
    unseen: dict[str, Trace]
    references: dict[str, Trace] = field(default_factory=dict)
    results: dict[str, tuple[float, int]] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)


def find_traces(
    config: Config, environment: Environment, train: list[Task], measured: list[Task], quarantine: Quarantine
) -> TaskTraces:
    """The traces of the training tasks, and of the held-out tasks that are ``measured``. Collective.

    Raises:
        DataError: a row of ``traces.path`` is malformed (file, line and field named) and ``run.bad_rows`` is strict.
    """
    dropped: dict[str, int] = {}
    told = conversations_of(config, quarantine)
    if config.traces.path is not None:
        if told is not None:
            sources, rejected = on_rank_zero(lambda: import_traces(config, environment, told, [*train, *measured]))
        else:
            sources, rejected = _read_traces(config.traces.path, train, quarantine, measured)
        dropped["trace_rejected"] = rejected.total()
        dropped |= {f"trace_rejected_{reason}": count for reason, count in sorted(rejected.items())}
    else:
        sources = on_rank_zero(lambda: _make_traces(config, environment, [*train, *measured]))
    unseen = {task.id: sources.pop(task.id)[0] for task in measured if task.id in sources}
    dropped["trace_missing"] = len(train) - len(sources)
    everything = dict(sources)  # the reward of a task's calls is no use of its trace, so max_tasks doesn't end it
    if config.traces.max_tasks is not None:  # both sides of the split are in an order that split_seed drew
        chosen = [task.id for task in train if task.id in sources][: config.traces.max_tasks]
        dropped["trace_not_asked_for"] = len(sources) - len(chosen)
        sources = {task_id: sources[task_id] for task_id in chosen}
    found = TaskTraces(sources, unseen, dropped=dropped)
    if config.traces.quality:
        asked = [task for task in train if task.id in sources or not any(task.reference_calls)]
        everything = on_rank_zero(lambda: _replay_all(config, environment, asked, everything))
        sound = {task_id: everything[task_id] for task_id in sources if task_id in everything}
        dropped["trace_replay_failed"] = sum(map(len, sources.values())) - sum(map(len, sound.values()))
        found.sources = sound
        # what a kept trace is worth: it passes the checker, so its score is the best there is
        found.results = {
            task_id: (1.0, sum(len(turn.calls) for turn in kept[0].turns)) for task_id, kept in sound.items()
        }
    found.references = {task_id: several[0] for task_id, several in everything.items()}
    if config.traces.augment:
        found.sources = on_rank_zero(lambda: _augment_all(config, environment, train, found.sources))
    return found


def _read_traces(
    path: str, train: list[Task], quarantine: Quarantine, measured: list[Task]
) -> tuple[dict[str, list[Trace]], Counter[str]]:
    """Traces of the training tasks and of the held-out tasks that are ``measured``, and how many of the training tasks'
    must not be used, by reason (:func:`~pact_nemo.traces.filters.why_not`)."""
    tasks = {task.id: task for task in [*train, *measured]}
    held_out = {task.id for task in measured}
    found: dict[str, list[Trace]] = {}
    rejected: Counter[str] = Counter()
    for trace in read_traces(Path(path), quarantine):
        if trace.task_id in tasks:
            reason = why_not(trace, tasks[trace.task_id])
            if reason is None:
                found.setdefault(trace.task_id, []).append(trace)
            elif trace.task_id not in held_out:
                log.warning("a trace of %s is not used: %s", trace.task_id, reason)
                rejected[reason] += 1
    return found, rejected


def _in_threads(config: Config, work: Callable[[Task], T], tasks: list[Task]) -> list[T]:
    """Tools in the sandbox are waited for, so several tasks at a time are quicker; others run in this process."""
    if not environment_spec(config.environment).uses_sandbox:
        return [work(task) for task in tasks]
    with ThreadPoolExecutor(config.sandbox.workers) as threads:
        return list(threads.map(work, tasks))


def _make_traces(config: Config, environment: Environment, tasks: list[Task]) -> dict[str, list[Trace]]:
    """From what the environment has; a search for the calls of recorded sub-answers takes calls by the dozen."""
    style, per_turn = cast(Style, config.traces.style), cast(Literal["one", "all"], config.traces.calls_per_turn)
    kind = environment_spec(config.environment).expert_traces

    def make(task: Task) -> Trace | None:
        trace = expert_trace(kind, environment, task, style, per_turn)
        return trace if trace is not None and why_not(trace, task) is None else None

    return {trace.task_id: [trace] for trace in _in_threads(config, make, tasks) if trace is not None}


def _replay_all(
    config: Config, environment: Environment, train: list[Task], sources: dict[str, list[Trace]]
) -> dict[str, list[Trace]]:
    """The traces that, executed anew, pass the checker and bring no error that they didn't have."""

    def sound(task: Task) -> list[Trace]:
        kept = []
        for trace in sources[task.id]:
            result = replay(environment, task, trace)
            if (
                result is not None
                and result.outcome.success
                and not new_errors([turn.observations for turn in trace.turns], result.observations)
            ):
                kept.append(trace)
        return kept

    tasks = [task for task in train if task.id in sources]
    return {task.id: kept for task, kept in zip(tasks, _in_threads(config, sound, tasks), strict=True) if kept}


def _augment_all(
    config: Config, environment: Environment, train: list[Task], sources: dict[str, list[Trace]]
) -> dict[str, list[Trace]]:
    kinds = [cast(Kind, kind) for kind in config.traces.augment]
    tasks = [task for task in train if task.id in sources]

    def more(task: Task) -> list[Trace]:
        return variants(environment, task, sources[task.id][0], kinds, config.traces.variants, config.tasks.split_seed)

    return {
        task.id: [*sources[task.id], *made] for task, made in zip(tasks, _in_threads(config, more, tasks), strict=True)
    }


def with_reference_calls(task: Task, trace: Trace | None) -> Task:
    """A task with the calls of its trace as reference calls, where it has none of its own: the matching reward's (eq.
    24). Each call keeps its user turn.
    """
    if trace is None or any(task.reference_calls):
        return task
    calls: list[list[ToolCall]] = [[] for _ in (task.user_turns if not task.any_turn else (0,))]
    for turn in trace.turns:
        calls[0 if task.any_turn else min(turn.user_turn, len(calls) - 1)] += turn.calls
    return replace(task, reference_calls=tuple(map(tuple, calls)))
