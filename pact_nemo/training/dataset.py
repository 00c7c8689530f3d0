"""Tasks, their split, their traces and the order they are visited in: everything about data that is fixed before the
first step.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeVar, cast

from pact_nemo.chat.template import ChatFormat
from pact_nemo.config.schema import Config
from pact_nemo.environments.answers import answer_words
from pact_nemo.environments.base import Environment, Task
from pact_nemo.environments.bfcl.environment import BFCLEnvironment
from pact_nemo.environments.ftrl import FTRLEnvironment
from pact_nemo.environments.splits import split
from pact_nemo.environments.toolhop import Scenario, ToolHopEnvironment
from pact_nemo.errors import ConfigError, DataError, ToolCallError
from pact_nemo.objective.components import CALL, OTHER
from pact_nemo.objective.gate import uniform
from pact_nemo.planning.from_config import model_shape
from pact_nemo.runtime.collective import on_rank_zero
from pact_nemo.runtime.quarantine import Quarantine
from pact_nemo.sandbox import Limits, Sandbox
from pact_nemo.traces.annotate import Style
from pact_nemo.traces.augment import Kind, replay, variants
from pact_nemo.traces.bfcl import make_trace
from pact_nemo.traces.controls import other_trace
from pact_nemo.traces.filters import why_not
from pact_nemo.traces.recorded import recorded_trace
from pact_nemo.traces.schema import Trace, read_traces
from pact_nemo.traces.spans import TraceTokens, fit_trace

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass
class Dataset:
    """Training and held-out tasks, and the verified traces of the training tasks.

    Attributes:
        dropped: task counts left out, by reason.
        traces: task id -> trace, training tasks only.
        trace_tokens: task id -> h* as tokens of this model.
        alternatives: task id -> further traces as tokens, where there are any.
        trace_results: task id -> (score, calls) of the trace when it was replayed; empty unless ``traces.quality``.
        control: ``traces.control``.
        rooms: task id -> tokens that its trace may have, training tasks only.
        held_out_traces: held-out tasks with their traces, for a measurement; empty unless ``diagnostics.trace_every``.
            Nothing is trained on them.
    """

    train: list[Task]
    held_out: list[Task]
    traces: dict[str, Trace]
    trace_tokens: dict[str, TraceTokens]
    dropped: dict[str, int]
    alternatives: dict[str, list[TraceTokens]] = field(default_factory=dict)
    trace_results: dict[str, tuple[float, int]] = field(default_factory=dict)
    control: str | None = None
    rooms: dict[str, int] = field(default_factory=dict)
    held_out_traces: list[tuple[Task, TraceTokens]] = field(default_factory=list)

    @cached_property
    def _groups(self) -> dict[str, str]:
        return {task.id: task.group for task in self.train}

    @property
    def without_trace(self) -> int:
        """Training tasks without a trace that fits: they are trained on under the prompt alone."""
        return sum(task.id not in self.trace_tokens for task in self.train)

    @property
    def without_reference_calls(self) -> int:
        """Training tasks without reference calls: their calls earn no reward (eq. 24)."""
        return sum(not any(task.reference_calls) for task in self.train)

    def warmup_tasks(self, limit: int | None) -> list[Task]:
        """The training tasks that a warm-up learns from: those with a trace, the first ``limit`` of them."""
        return [task for task in self.train if task.id in self.trace_tokens][:limit]

    def trace_for(self, task_id: str, seed: int | str, step: int) -> TraceTokens | None:
        """The trace that a task uses in a step: one of its traces, drawn by its arguments alone; None where there is
        none.
        """
        main = self.trace_tokens.get(task_id)
        if main is None or task_id not in self.alternatives:
            return main
        choices = [main, *self.alternatives[task_id]]
        return choices[int(uniform("trace", seed, step, task_id) * len(choices))]

    def control_for(self, task_id: str, seed: int, step: int) -> TraceTokens | None:
        """What RL is conditioned on in place of the task's own trace; None where it is that trace, or nothing because
        there is none.
        """
        if self.control is None or task_id not in self.trace_tokens:
            return None
        if self.control == "none":
            return TraceTokens()
        return other_trace(self.trace_tokens, self._groups, task_id, self.rooms[task_id], seed=seed, step=step)


def build_environment(config: Config, quarantine: Quarantine | None = None) -> Environment:
    """The benchmark that ``tasks.benchmark`` names; its sandbox, where it has one, starts when it is first needed.

    ``quarantine`` takes the bad rows of its files; None: one of its own, with the policy of ``run.bad_rows``.
    """
    tasks = config.tasks
    quarantine = quarantine if quarantine is not None else Quarantine(config.run.bad_rows)
    if tasks.benchmark == "bfcl":
        return BFCLEnvironment(
            categories=list(tasks.categories),
            window=cast(Literal["full", "turn"], tasks.window),
            max_tools=tasks.max_tools,
            max_calls=tasks.max_calls,
            grounded_only=tasks.grounded_only,
            max_user_chars=tasks.max_user_chars,
            max_observation_chars=tasks.max_observation_chars,
            seed=tasks.split_seed,
            quarantine=quarantine,
        )
    assert tasks.path is not None
    limits = Limits(
        seconds=config.sandbox.seconds, memory_mb=config.sandbox.memory_mb, processes=config.sandbox.processes
    )
    sandbox = Sandbox(config.sandbox.workers, limits, unconfined=config.sandbox.unconfined)
    if tasks.benchmark == "ftrl":
        return FTRLEnvironment(tasks.path, sandbox, tasks.max_observation_chars, tasks.answer_rule == "add", quarantine)
    return ToolHopEnvironment(
        tasks.path, sandbox, cast(Scenario, tasks.scenario), tasks.max_observation_chars, quarantine
    )


def load_tasks(
    config: Config, environment: Environment, chat: ChatFormat, quarantine: Quarantine
) -> tuple[list[Task], list[Task], dict[str, int]]:
    """Training and held-out tasks, split by scenario group, and how many were left out, by reason.

    Raises:
        ConfigError: no task is left on one side of the split.
        DataError: a task row is malformed (file, line and field named) and ``run.bad_rows`` is strict, or a prompt is
            too long and ``tasks.overlong`` is stop.
    """
    dropped = {"prompt_too_long": 0}

    def short_enough(tasks: list[Task]) -> list[Task]:
        fitting = []
        for task in tasks:
            length = quarantine.guard(lambda: _prompt_length(chat, task), _rows_of(task))  # noqa: B023 - called at once
            if length is None:
                continue
            if length <= config.tasks.max_prompt_tokens:
                fitting.append(task)
            elif config.tasks.overlong == "stop":
                raise DataError(
                    f"the prompt of {task.id} has {length} tokens: raise"
                    f" tasks.max_prompt_tokens={config.tasks.max_prompt_tokens}, or leave such tasks out with"
                    " tasks.overlong=drop",
                    file=config.tasks.path,
                )
            else:
                dropped["prompt_too_long"] += 1
        return fitting

    if config.tasks.eval_path is not None and isinstance(environment, FTRLEnvironment | ToolHopEnvironment):
        held_out = short_enough(replace(environment, path=config.tasks.eval_path).tasks())
        train = short_enough(environment.tasks())
    else:
        usable = short_enough(environment.tasks())
        try:
            train, held_out = split(usable, held_out=config.tasks.held_out, seed=config.tasks.split_seed)
        except ConfigError as error:
            raise ConfigError(f"{error}{_quarantined(quarantine)}") from error
    asked = {str(task.user_turns) for task in held_out}
    unseen = [task for task in train if str(task.user_turns) not in asked]
    if len(unseen) < len(train):  # the same request in another row, or in another scenario
        dropped["held_out_too"], train = len(train) - len(unseen), unseen
    if config.objective.outcome == "answer_f1":
        train = [
            task
            for task in train
            if quarantine.guard(lambda: _answerable(config, task), _rows_of(task)) is not None  # noqa: B023
        ]
    train, held_out = limited(config, train, held_out)
    for name, side in (("training", train), ("held-out", held_out)):
        if not side:
            bad = _quarantined(quarantine)
            raise ConfigError(
                f"no {name} task is left: loosen tasks.* (dropped so far: {dropped}) or change tasks.held_out{bad}"
            )
    return train, held_out, dropped


def build_dataset(
    config: Config,
    environment: Environment,
    chat: ChatFormat,
    note: Callable[[str], None] = log.info,
    quarantine: Quarantine | None = None,
) -> Dataset:
    """Load tasks, split them by scenario group, and make or read the training traces.

    A trace is too long beyond ``traces.max_tokens``, or where prompt, trace and the longest response together exceed
    the positions that the model was trained with (its RoPE would silently extrapolate); ``traces.overlong`` says what
    becomes of it, ``tasks.overlong`` of a prompt that is.

    Args:
        quarantine: the one that the environment was built with; takes bad trace rows, and tasks that chat template or
            tool format can't render. None: a new one.

    Raises:
        ConfigError: no task is left on one side of the split.
        DataError: a task or trace file row is malformed (file, line and field named) and ``run.bad_rows`` is strict, or
            a prompt is too long and ``tasks.overlong`` is stop.
    """
    quarantine = quarantine if quarantine is not None else Quarantine(config.run.bad_rows)
    train, held_out, dropped = load_tasks(config, environment, chat, quarantine)
    dropped |= {"trace_missing": 0, "trace_cut": 0, "trace_too_long": 0, "trace_rejected": 0, "trace_unreadable": 0}
    measured = held_out[: config.diagnostics.trace_tasks] if config.diagnostics.trace_every else []
    if config.traces.path is not None:
        sources, rejected = _read_traces(config.traces.path, train, quarantine, measured)
        dropped["trace_rejected"] = rejected.total()
        dropped |= {f"trace_rejected_{reason}": count for reason, count in sorted(rejected.items())}
    else:
        sources = on_rank_zero(lambda: _make_traces(config, environment, [*train, *measured]))
    unseen = {task.id: sources.pop(task.id)[0] for task in measured if task.id in sources}
    dropped["trace_missing"] = len(train) - len(sources)
    if config.traces.max_tasks is not None:  # both sides of the split are in an order that split_seed drew
        chosen = [task.id for task in train if task.id in sources][: config.traces.max_tasks]
        dropped["trace_not_asked_for"] = len(sources) - len(chosen)
        sources = {task_id: sources[task_id] for task_id in chosen}
    results: dict[str, tuple[float, int]] = {}
    if config.traces.quality:
        sound = on_rank_zero(lambda: _replay_all(config, environment, train, sources))
        dropped["trace_replay_failed"] = sum(map(len, sources.values())) - sum(map(len, sound.values()))
        sources = sound
        # what a kept trace is worth: it passes the checker, so its score is the best there is
        results = {
            task_id: (1.0, sum(len(turn.calls) for turn in found[0].turns)) for task_id, found in sources.items()
        }
    if config.traces.augment:
        sources = on_rank_zero(lambda: _augment_all(config, environment, train, sources))
    traces = {task_id: found[0] for task_id, found in sources.items()}
    train = [_with_reference_calls(task, traces.get(task.id)) for task in train]

    rooms = {task.id: _room(config, chat, task) for task in [*train, *measured]}

    def tokens_of(trace: Trace) -> TraceTokens | None:
        label = CALL if config.traces.teach_end_of_turn else OTHER
        switch = CALL if config.traces.teach_switch else OTHER
        try:
            return fit_trace(
                trace,
                chat,
                rooms[trace.task_id],
                config.traces.overlong,
                frozenset(config.traces.components),
                label,
                switch,
            )
        except (DataError, ToolCallError) as error:
            log.warning("trace of %s left out: %s", trace.task_id, error)
            return None

    trace_tokens: dict[str, TraceTokens] = {}
    alternatives: dict[str, list[TraceTokens]] = {}
    for task_id, found in sources.items():
        encoded = [tokens_of(trace) for trace in found]
        dropped["trace_unreadable"] += encoded[0] is None
        if encoded[0] is None:
            del traces[task_id]
            continue
        main = encoded[0]
        dropped["trace_cut"] += main.cut
        dropped["trace_too_long"] += not len(main)
        if len(main):
            trace_tokens[task_id] = main
            further = [tokens for tokens in encoded[1:] if tokens is not None and not tokens.cut]
            if further:
                alternatives[task_id] = further
    dropped["rows_quarantined"] = len(quarantine)
    extra = sum(map(len, alternatives.values()))
    more = f" and {extra} alternatives" if extra else ""
    note(
        f"{len(train)} training tasks with {len(traces)} verified traces{more}, {len(held_out)} held-out tasks; left"
        f" out: {dropped}"
    )
    dataset = Dataset(
        train, held_out, traces, trace_tokens, dropped, alternatives, results, config.traces.control, rooms
    )
    if measured:
        encoded_unseen = [(task, tokens_of(unseen[task.id])) for task in measured if task.id in unseen]
        dataset.held_out_traces = [(task, tokens) for task, tokens in encoded_unseen if tokens]
        note(
            f"{len(dataset.held_out_traces)} of {len(measured)} held-out tasks have a trace; its likelihood is measured"
        )
    for task_id in trace_tokens:  # each of them has one, whatever the step
        dataset.control_for(task_id, config.run.seed, 0)
    _check_shares(config, dataset, note)
    return dataset


def _check_shares(config: Config, dataset: Dataset, note: Callable[[str], None]) -> None:
    """Say which share of the training tasks lacks a trace or reference calls.

    Raises:
        ConfigError: a share is above its limit, or ``traces.path`` gave no trace at all.
    """
    total = len(dataset.train)
    if config.traces.path is not None and not dataset.trace_tokens:
        raise ConfigError(
            f"traces.path={config.traces.path} gives none of the {total} training tasks a trace; left out:"
            f" {dataset.dropped}. A trace's task_id has to be a training task's, e.g. {dataset.train[0].id!r}. Give a"
            " file made for these tasks (tools/make_traces.py), or leave traces.path out"
        )
    for count, what, key in (
        (dataset.without_trace - dataset.dropped.get("trace_not_asked_for", 0), "trace", "max_missing"),
        (dataset.without_reference_calls, "reference calls", "max_unreferenced"),
    ):
        share, limit = count / total, getattr(config.traces, key)
        if limit is not None and share > limit:
            raise ConfigError(
                f"{count} of {total} training tasks ({share:.0%}) have no {what}, more than traces.{key}={limit}"
                f" allows; left out: {dataset.dropped}. Make more traces (tools/make_traces.py), or raise traces.{key}"
            )
        if count:
            note(f"{count} of {total} training tasks ({share:.0%}) have no {what}")


def check_batches(config: Config, train: list[Task], warmup_tasks: list[Task] | None) -> None:
    """Refuse batches that the tasks can't fill, before anything is started.

    Args:
        warmup_tasks: None: not known yet.

    Raises:
        ConfigError: names the batch size and the tasks that there are.
    """
    if config.trainer.steps != 0:
        prompts_of_step(train, 0, config.trainer.batch_size, config.run.seed, "trainer.batch_size")
    if config.warmup.steps and warmup_tasks is not None:
        if not warmup_tasks:
            raise ConfigError(
                "warmup.steps > 0 needs training tasks with traces, and there are none; set warmup.steps=0 or check"
                " traces.path"
            )
        prompts_of_step(warmup_tasks, 0, config.warmup.batch_size, config.run.seed, "warmup.batch_size")


def _quarantined(quarantine: Quarantine) -> str:
    """What an error for want of tasks says of the rows that were left out."""
    return (
        f"; {len(quarantine)} rows are in quarantine, the first one: {quarantine.rows[0].error}"
        if quarantine.rows
        else ""
    )


def limited(config: Config, train: list[Task], held_out: list[Task]) -> tuple[list[Task], list[Task]]:
    """Both sides in the order of ``tasks.split_seed``, the first ``tasks.max_train`` and ``tasks.max_eval`` of them."""
    shuffler = random.Random(config.tasks.split_seed)
    train, held_out = sorted(train, key=lambda t: t.id), sorted(held_out, key=lambda t: t.id)
    shuffler.shuffle(train)
    shuffler.shuffle(held_out)
    return train[: config.tasks.max_train], held_out[: config.tasks.max_eval]


def _prompt_length(chat: ChatFormat, task: Task) -> int:
    try:
        chat.tool_format.check_tools(task.tools)
    except ToolCallError as error:
        raise DataError(f"task {task.id}: {error}", field="tools") from error
    try:
        return len(chat.prompt_ids(list(task.user_turns[0]), list(task.tools)))
    except DataError as error:
        raise DataError(f"task {task.id}: {error}") from error


def _rows_of(task: Task) -> list[list[dict[str, str]]]:
    """What the quarantine keeps of a task."""
    return [list(turn) for turn in task.user_turns]


def _answerable(config: Config, task: Task) -> Task:
    """A training task of ``objective.outcome=answer_f1``.

    Raises:
        DataError: it has no reference answer, or its prompt asks for no ``<answer>``, so that every rollout would get
            0.
    """
    remedy = "objective.outcome=answer_f1 would pay every rollout 0; set objective.outcome=checker, or"
    if task.reference_answer is None or not answer_words(task.reference_answer):
        raise DataError(
            f"task {task.id} has no reference answer: {remedy} give the row one", file=config.tasks.path, field="answer"
        )
    if not any("<answer>" in message["content"] for turn in task.user_turns for message in turn):
        raise DataError(
            f"the prompt of {task.id} asks for no <answer></answer>: {remedy} tasks.answer_rule=add",
            file=config.tasks.path,
        )
    return task


def _room(config: Config, chat: ChatFormat, task: Task) -> int:
    """Tokens that a trace of this task may have."""
    prompt = _prompt_length(chat, task)
    sequence = min(prompt + config.rollout.sampling.max_response_tokens, config.rollout.server.max_model_len)
    return max(min(config.traces.max_tokens, model_shape(config).positions - sequence), 0)


def check_server_length(config: Config) -> None:
    """Refuse a server that is longer than its model: vLLM wouldn't start.

    Raises:
        ConfigError: names the setting to lower.
    """
    positions = model_shape(config).positions
    if config.rollout.server.max_model_len > positions:
        raise ConfigError(
            f"rollout.server.max_model_len={config.rollout.server.max_model_len} exceeds the model's {positions}"
            f" positions (max_position_embeddings in its config.json): set rollout.server.max_model_len={positions} or"
            " less"
        )


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
    """BFCL executes in this process; the others wait for their sandbox, so several tasks at a time are quicker."""
    if config.tasks.benchmark == "bfcl":
        return [work(task) for task in tasks]
    with ThreadPoolExecutor(config.sandbox.workers) as threads:
        return list(threads.map(work, tasks))


def _make_traces(config: Config, environment: Environment, train: list[Task]) -> dict[str, list[Trace]]:
    """From the ground truth (BFCL), or from recorded sub-answers (FTRL, ToolHop), which takes calls by the dozen."""
    style, per_turn = cast(Style, config.traces.style), cast(Literal["one", "all"], config.traces.calls_per_turn)

    def make(task: Task) -> Trace | None:
        if config.tasks.benchmark == "bfcl":
            return make_trace(environment, task, style=style, calls_per_turn=per_turn)
        trace = recorded_trace(environment, task, style)
        return trace if trace is not None and why_not(trace, task) is None else None

    return {trace.task_id: [trace] for trace in _in_threads(config, make, train) if trace is not None}


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
                and not _new_errors([turn.observations for turn in trace.turns], result.observations)
            ):
                kept.append(trace)
        return kept

    tasks = [task for task in train if task.id in sources]
    return {task.id: kept for task, kept in zip(tasks, _in_threads(config, sound, tasks), strict=True) if kept}


def _new_errors(told: Sequence[Sequence[str]], seen: Sequence[Sequence[str]]) -> bool:
    """Whether an observation is an error now that the trace says it isn't. (Texts may differ: they may have been cut to
    another length.)
    """
    pairs = zip((text for turn in told for text in turn), (text for turn in seen for text in turn), strict=True)
    return any(now.startswith("Error") and not then.startswith("Error") for then, now in pairs)


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


def _with_reference_calls(task: Task, trace: Trace | None) -> Task:
    """Benchmarks without reference calls take the trace's for the matching reward (eq. 24)."""
    if trace is None or any(task.reference_calls):
        return task
    return replace(task, reference_calls=(tuple(call for turn in trace.turns for call in turn.calls),))


def prompts_of_step(
    train: list[Task], step: int, batch_size: int, seed: int | str, key: str = "the batch size"
) -> list[Task]:
    """The prompts of 0-based ``step``: consecutive slices of a new permutation per epoch, what doesn't fill a batch
    left out until the next one. A function of its arguments only, so that a resumed run visits the same prompts; no
    batch holds a prompt twice. ``key``: the setting that an error names.

    Raises:
        ConfigError: there are fewer prompts than a batch needs.
    """
    if batch_size > len(train):
        raise ConfigError(
            f"a batch of {batch_size} prompts needs as many training tasks; there are {len(train)}: lower {key}"
        )
    epoch, index = divmod(step, len(train) // batch_size)
    order = list(range(len(train)))
    random.Random(f"{seed}:{epoch}").shuffle(order)
    return [train[i] for i in order[index * batch_size : (index + 1) * batch_size]]
