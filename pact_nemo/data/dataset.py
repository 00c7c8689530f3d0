"""Training and held-out tasks with their traces as tokens: the data of a run, fixed before its first step."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from statistics import mean

from pact_nemo.chat.template import ChatFormat
from pact_nemo.config.schema import Config
from pact_nemo.data.task_traces import TaskTraces, find_traces, with_reference_calls
from pact_nemo.data.tasks import load_tasks, prompt_length, prompts_after, prompts_of_step, traced_in_steps
from pact_nemo.environments.base import Environment, Task, ToolCall
from pact_nemo.errors import ConfigError, DataError, ToolCallError
from pact_nemo.methods.registry import method_class
from pact_nemo.objective.components import CALL, OTHER
from pact_nemo.objective.gate import uniform
from pact_nemo.planning.from_config import model_shape
from pact_nemo.runtime.quarantine import Quarantine
from pact_nemo.runtime.words import count_of
from pact_nemo.traces.closings import with_closings
from pact_nemo.traces.controls import other_trace
from pact_nemo.traces.schema import Trace
from pact_nemo.traces.spans import TraceTokens, fit_trace

log = logging.getLogger(__name__)
LITTLE_USE = 0.2  #: share of RL's prompts that use a trace below which the run says so


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

    @cached_property
    def _calls(self) -> dict[str, list[ToolCall]]:
        return {name: [call for turn in trace.turns for call in turn.calls] for name, trace in self.traces.items()}

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

    def prompts_of_step(self, config: Config, step: int) -> list[Task]:
        """The prompts of a 0-based step of RL: :func:`prompts_of_step` of all training tasks; or with
        ``traces.share``, of those with a trace and of the others, each in an order of its own, and mixed. The step
        alone says how many of each (:func:`traced_in_steps`).

        Raises:
            ConfigError: there are fewer tasks than the batch needs, or no prompt of the run is one with a trace.
        """
        size, seed, share = config.trainer.batch_size, config.run.seed, config.traces.share
        if share is None:
            return prompts_of_step(self.train, step, size, seed)
        chosen: list[Task] = []
        traced = traced_in_steps(share, size, max(config.trainer.steps or 0, step + 1))
        if share > 0 and not any(traced):
            raise ConfigError(
                f"traces.share={share} of a batch of {size} is no prompt in {len(traced)} steps: raise one of them"
            )
        for part, counts in (("traced", traced), ("bare", [size - count for count in traced])):
            needed = max(counts)  # of the whole run, so that it is refused in its first step
            tasks = [task for task in self.train if (task.id in self.trace_tokens) == (part == "traced")]
            if needed > len(tasks):
                what = "with" if part == "traced" else "without"
                raise ConfigError(
                    f"traces.share={share} needs {needed} training tasks {what} a trace in a batch of {size}; there are"
                    f" {len(tasks)}: change it or trainer.batch_size"
                )
            chosen += prompts_after(tasks, counts[: step + 1], f"{seed}:{part}")
        random.Random(f"{seed}:{step}:mixed").shuffle(chosen)  # mini-batches are alike
        return chosen

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
        room, calls = self.rooms[task_id], self._calls
        return other_trace(self.trace_tokens, self._groups, task_id, room, calls=calls, seed=seed, step=step)


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
        ConfigError: no task is left on one side of the split, or a session opens with another prompt than its task's.
        DataError: a task or trace file row is malformed (file, line and field named) and ``run.bad_rows`` is strict, or
            a prompt is too long and ``tasks.overlong`` is stop.
    """
    quarantine = quarantine if quarantine is not None else Quarantine(config.run.bad_rows)
    train, held_out, dropped = load_tasks(config, environment, chat, quarantine)
    dropped |= {"trace_missing": 0, "trace_cut": 0, "trace_too_long": 0, "trace_rejected": 0, "trace_unreadable": 0}
    measured = held_out[: config.diagnostics.trace_tasks] if config.diagnostics.trace_every else []
    # without it, what environments of this package open with is their tasks' own
    getattr(environment, "check_openings", lambda tasks: None)([*train, *measured])
    found = find_traces(config, environment, train, measured, quarantine)
    dropped |= found.dropped
    traces = {task_id: several[0] for task_id, several in found.sources.items()}
    train = [with_reference_calls(task, found.references.get(task.id)) for task in train]
    dataset = Dataset(train, held_out, traces, {}, dropped, trace_results=found.results, control=config.traces.control)
    positions = model_shape(config).positions  # reads and checks the model's folder
    dataset.rooms = {task.id: _room(config, positions, chat, task) for task in [*train, *measured]}
    _add_tokens(config, chat, dataset, found)
    dropped["rows_quarantined"] = len(quarantine)
    extra = sum(map(len, dataset.alternatives.values()))
    more = f" and {extra} alternatives" if extra else ""
    note(
        f"{count_of(len(train), 'training task')}, {len(dataset.trace_tokens)} with a verified trace{more},"
        f" {count_of(len(held_out), f'{config.tasks.scored} task')}; left out: {dropped}"
    )
    if measured:
        encoded = [
            (task, _tokens_of(config, chat, dataset, found.unseen[task.id]))
            for task in measured
            if task.id in found.unseen
        ]
        dataset.held_out_traces = [(task, tokens) for task, tokens in encoded if tokens]
        note(
            f"{len(dataset.held_out_traces)} of {len(measured)} {config.tasks.scored} tasks have a trace; its"
            " likelihood is measured"
        )
    if config.traces.share is not None and config.trainer.steps:
        dataset.prompts_of_step(config, 0)
    for task_id in dataset.trace_tokens:  # each of them has one, whatever the step
        dataset.control_for(task_id, config.run.seed, 0)
    _check_shares(config, dataset, note)
    return dataset


def _tokens_of(config: Config, chat: ChatFormat, dataset: Dataset, trace: Trace) -> TraceTokens | None:
    """A trace as tokens within its room; None where template or tool format can't write it."""
    label = CALL if config.traces.teach_end_of_turn else OTHER
    switch = CALL if config.traces.teach_switch else OTHER
    components = frozenset(config.traces.components)
    trace = with_closings(trace, config.traces.closing)
    try:
        return fit_trace(trace, chat, dataset.rooms[trace.task_id], config.traces.overlong, components, label, switch)
    except (DataError, ToolCallError) as error:
        log.warning("trace of %s left out: %s", trace.task_id, error)
        return None


def _add_tokens(config: Config, chat: ChatFormat, dataset: Dataset, found: TaskTraces) -> None:
    """Give the dataset the tokens of its traces; those that can't be used are taken out and counted."""
    dropped = dataset.dropped
    for task_id, several in found.sources.items():
        encoded = [_tokens_of(config, chat, dataset, trace) for trace in several]
        main = encoded[0]
        dropped["trace_unreadable"] += main is None
        if main is None:
            del dataset.traces[task_id]
            continue
        dropped["trace_cut"] += main.cut
        dropped["trace_too_long"] += not len(main)
        if len(main):
            dataset.trace_tokens[task_id] = main
            further = [tokens for tokens in encoded[1:] if tokens is not None and not tokens.cut]
            if further:
                dataset.alternatives[task_id] = further


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
    if dataset.trace_tokens and dataset.without_trace and config.trainer.steps and _rl_uses_traces(config):
        note(_uses_of_traces(config, dataset))


def _rl_uses_traces(config: Config) -> bool:
    """Whether RL does anything with a trace: a method that conditions on it may have both its uses switched off."""
    method, objective = method_class(config.method), config.objective
    return method.uses_traces and (not method.conditions_on_trace or objective.trace_rl or objective.sft_coef > 0)


def _uses_of_traces(config: Config, dataset: Dataset) -> str:
    """For how many of RL's prompts the traces are used, where not every task has one."""
    share, size, objective = config.traces.share, config.trainer.batch_size, config.objective
    traced = share if share is not None else len(dataset.trace_tokens) / len(dataset.train)
    gated = method_class(config.method).conditions_on_trace
    last = objective.schedule.anchor_end
    anchored = 0.0 if not gated else mean([objective.anchor_prob, objective.anchor_prob if last is None else last])
    count = (config.trainer.steps or 0) * size
    by = "the tasks that have one" + (f" and an anchored share of {anchored:g}" if gated else "")
    text = f"about {traced * (1 - anchored) * count:,.0f} of RL's {count:,} prompts use a trace, by {by}"
    few = traced * (1 - anchored) < LITTLE_USE and share is None and anchored < 1
    return f"warning: {text}; traces.share=0.5 takes such tasks oftener" if few else text


def _room(config: Config, positions: int, chat: ChatFormat, task: Task) -> int:
    """Tokens that a trace of this task may have, with a model of so many ``positions``."""
    prompt = prompt_length(chat, task)
    sequence = min(prompt + config.rollout.sampling.max_response_tokens, config.rollout.server.max_model_len)
    boundary = len(chat.boundary_ids())  # stands between trace and rollout
    return max(min(config.traces.max_tokens, positions - sequence - boundary), 0)


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
