"""Tasks, their split, their traces and the order they are visited in: everything about data that is fixed before the first step."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from pact_nemo.chat.template import ChatFormat
from pact_nemo.environments.base import Task
from pact_nemo.environments.bfcl import BFCLEnvironment
from pact_nemo.environments.splits import split
from pact_nemo.errors import ConfigError
from pact_nemo.traces.annotate import Style
from pact_nemo.traces.bfcl import make_trace
from pact_nemo.traces.filters import reject_reason
from pact_nemo.traces.schema import Trace, read_traces
from pact_nemo.traces.spans import CALL, OTHER, TraceTokens, encode_trace, truncate_at_turn
from pact_nemo.training.config import Config

log = logging.getLogger(__name__)


@dataclass
class Dataset:
    """Training and held-out tasks, and the verified traces of the training tasks.

    Attributes:
        dropped: task counts left out, by reason.
        traces: task id -> trace, training tasks only.
        trace_tokens: task id -> h* as tokens of this model.
    """

    train: list[Task]
    held_out: list[Task]
    traces: dict[str, Trace]
    trace_tokens: dict[str, TraceTokens]
    dropped: dict[str, int]


def build_environment(config: Config) -> BFCLEnvironment:
    tasks = config.tasks
    return BFCLEnvironment(
        categories=list(tasks.categories),
        window=cast(Literal["full", "turn"], tasks.window),
        max_tools=tasks.max_tools,
        max_calls=tasks.max_calls,
        grounded_only=tasks.grounded_only,
        max_user_chars=tasks.max_user_chars,
        max_observation_chars=tasks.max_observation_chars,
        seed=tasks.split_seed,
    )


def build_dataset(config: Config, environment: BFCLEnvironment, chat: ChatFormat, note: Callable[[str], None] = log.info) -> Dataset:
    """Load tasks, split them by scenario group, and make or read the training traces.

    Raises:
        ConfigError: no task is left on one side of the split.
        DataError: a trace file row is malformed (file, line and field named).
    """
    dropped = {"prompt_too_long": 0, "trace_missing": 0, "trace_cut": 0}
    tasks = []
    for task in environment.tasks():
        if len(chat.prompt_ids(list(task.user_turns[0]), list(task.tools))) > config.tasks.max_prompt_tokens:
            dropped["prompt_too_long"] += 1
        else:
            tasks.append(task)
    train, held_out = split(tasks, held_out=config.tasks.held_out, seed=config.tasks.split_seed)
    shuffler = random.Random(config.tasks.split_seed)
    train, held_out = sorted(train, key=lambda t: t.id), sorted(held_out, key=lambda t: t.id)
    shuffler.shuffle(train)
    shuffler.shuffle(held_out)
    train, held_out = train[: config.tasks.max_train], held_out[: config.tasks.max_eval]
    for name, side in (("training", train), ("held-out", held_out)):
        if not side:
            raise ConfigError(f"no {name} task is left: loosen tasks.* (dropped so far: {dropped}) or change tasks.held_out")

    traces: dict[str, Trace] = {}
    style, per_turn = cast(Style, config.traces.style), cast(Literal["one", "all"], config.traces.calls_per_turn)
    if config.traces.path is not None:
        tools = {task.id: task.tools for task in train}
        for trace in read_traces(Path(config.traces.path)):
            if trace.task_id in tools and trace.verified and reject_reason(trace, tools[trace.task_id]) is None:
                traces[trace.task_id] = trace
    else:
        for task in train:
            made = make_trace(environment, task, style=style, calls_per_turn=per_turn)
            if made is not None:
                traces[task.id] = made
    dropped["trace_missing"] = len(train) - len(traces)
    trace_tokens = {}
    for task_id, trace in traces.items():
        encoded = encode_trace(trace, chat, frozenset(config.traces.components), end_of_turn=CALL if config.traces.teach_end_of_turn else OTHER)
        shortened = truncate_at_turn(encoded, config.traces.max_tokens)
        dropped["trace_cut"] += len(shortened) < len(encoded)
        if len(shortened):
            trace_tokens[task_id] = shortened
    note(f"{len(train)} training tasks with {len(traces)} verified traces, {len(held_out)} held-out tasks; left out: {dropped}")
    return Dataset(train, held_out, traces, trace_tokens, dropped)


def prompts_of_step(train: list[Task], step: int, batch_size: int, seed: int | str) -> list[Task]:
    """The prompts of 0-based ``step``: consecutive slices of a new permutation per epoch. A function of its arguments only, so that a
    resumed run visits the same prompts; a batch may straddle two epochs but repeats no prompt unless the set is smaller than a batch."""
    chosen = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, index = divmod(position, len(train))
        order = list(range(len(train)))
        random.Random(f"{seed}:{epoch}").shuffle(order)
        chosen.append(train[order[index]])
    return chosen
