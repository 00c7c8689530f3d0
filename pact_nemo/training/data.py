"""Tasks, their split, their traces and the order they are visited in: everything about data that is fixed before the first step."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

from pact_nemo.chat.template import ChatFormat
from pact_nemo.environments.base import Environment, Task
from pact_nemo.environments.bfcl import BFCLEnvironment
from pact_nemo.environments.ftrl import FTRLEnvironment
from pact_nemo.environments.splits import split
from pact_nemo.environments.toolhop import Scenario, ToolHopEnvironment
from pact_nemo.errors import ConfigError
from pact_nemo.sandbox import Limits, Sandbox
from pact_nemo.traces.annotate import Style
from pact_nemo.traces.bfcl import make_trace
from pact_nemo.traces.filters import reject_reason
from pact_nemo.traces.recorded import recorded_trace
from pact_nemo.traces.schema import Trace, read_traces
from pact_nemo.traces.spans import CALL, OTHER, TraceTokens, encode_trace, truncate_at_turn
from pact_nemo.training.config import Config
from pact_nemo.training.distributed import on_rank_zero

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


def build_environment(config: Config) -> Environment:
    """The benchmark that ``tasks.benchmark`` names; its sandbox, where it has one, starts when it is first needed."""
    tasks = config.tasks
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
        )
    assert tasks.path is not None
    limits = Limits(seconds=config.sandbox.seconds, memory_mb=config.sandbox.memory_mb, processes=config.sandbox.processes)
    sandbox = Sandbox(config.sandbox.workers, limits, unconfined=config.sandbox.unconfined)
    if tasks.benchmark == "ftrl":
        return FTRLEnvironment(tasks.path, sandbox, tasks.max_observation_chars)
    return ToolHopEnvironment(tasks.path, sandbox, cast(Scenario, tasks.scenario), tasks.max_observation_chars)


def build_dataset(config: Config, environment: Environment, chat: ChatFormat, note: Callable[[str], None] = log.info) -> Dataset:
    """Load tasks, split them by scenario group, and make or read the training traces.

    Raises:
        ConfigError: no task is left on one side of the split.
        DataError: a task or trace file row is malformed (file, line and field named).
    """
    dropped = {"prompt_too_long": 0, "trace_missing": 0, "trace_cut": 0}

    def short_enough(tasks: list[Task]) -> list[Task]:
        fitting = [task for task in tasks if len(chat.prompt_ids(list(task.user_turns[0]), list(task.tools))) <= config.tasks.max_prompt_tokens]
        dropped["prompt_too_long"] += len(tasks) - len(fitting)
        return fitting

    if config.tasks.eval_path is not None and isinstance(environment, FTRLEnvironment | ToolHopEnvironment):
        held_out = short_enough(replace(environment, path=config.tasks.eval_path).tasks())
        asked = {str(task.user_turns) for task in held_out}
        everything = short_enough(environment.tasks())
        train = [task for task in everything if str(task.user_turns) not in asked]
        dropped["held_out_too"] = len(everything) - len(train)
    else:
        train, held_out = split(short_enough(environment.tasks()), held_out=config.tasks.held_out, seed=config.tasks.split_seed)
    shuffler = random.Random(config.tasks.split_seed)
    train, held_out = sorted(train, key=lambda t: t.id), sorted(held_out, key=lambda t: t.id)
    shuffler.shuffle(train)
    shuffler.shuffle(held_out)
    train, held_out = train[: config.tasks.max_train], held_out[: config.tasks.max_eval]
    for name, side in (("training", train), ("held-out", held_out)):
        if not side:
            raise ConfigError(f"no {name} task is left: loosen tasks.* (dropped so far: {dropped}) or change tasks.held_out")

    if config.traces.path is not None:
        traces = _read_traces(config.traces.path, train)
    else:
        traces = on_rank_zero(lambda: _make_traces(config, environment, train))
    train = [_with_reference_calls(task, traces.get(task.id)) for task in train]
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


def check_positions(config: Config, dataset: Dataset, chat: ChatFormat, positions: int) -> None:
    """Refuse sequences beyond the ``positions`` that the model was trained with: vLLM won't start, and the trainer's RoPE would silently extrapolate.

    Raises:
        ConfigError: names the setting to lower.
    """
    if config.rollout.server.max_model_len > positions:
        raise ConfigError(
            f"rollout.server.max_model_len={config.rollout.server.max_model_len} exceeds the model's {positions} positions "
            f"(max_position_embeddings in its config.json): set rollout.server.max_model_len={positions} or less"
        )
    for task in dataset.train:
        if task.id not in dataset.trace_tokens:
            continue
        prompt = len(chat.prompt_ids(list(task.user_turns[0]), list(task.tools)))
        sequence = min(prompt + config.rollout.sampling.max_response_tokens, config.rollout.server.max_model_len)
        longest = sequence + len(dataset.trace_tokens[task.id])
        if longest > positions:
            raise ConfigError(
                f"task {task.id!r}: prompt, trace and the longest response are {longest} tokens together, the model has {positions} positions: lower "
                "traces.max_tokens, tasks.max_prompt_tokens or rollout.sampling.max_response_tokens"
            )


def _read_traces(path: str, train: list[Task]) -> dict[str, Trace]:
    tools = {task.id: task.tools for task in train}
    usable = (t for t in read_traces(Path(path)) if t.task_id in tools and t.verified and reject_reason(t, tools[t.task_id]) is None)
    return {trace.task_id: trace for trace in usable}


def _make_traces(config: Config, environment: Environment, train: list[Task]) -> dict[str, Trace]:
    """From the ground truth (BFCL), or from recorded sub-answers (FTRL, ToolHop), which takes calls by the dozen and so runs in threads."""
    style, per_turn = cast(Style, config.traces.style), cast(Literal["one", "all"], config.traces.calls_per_turn)

    def recorded(task: Task) -> Trace | None:
        trace = recorded_trace(environment, task, style)
        return trace if trace is not None and reject_reason(trace, task.tools) is None else None

    if config.tasks.benchmark == "bfcl":
        made = [make_trace(environment, task, style=style, calls_per_turn=per_turn) for task in train]
    else:
        with ThreadPoolExecutor(config.sandbox.workers) as threads:
            made = list(threads.map(recorded, train))
    return {trace.task_id: trace for trace in made if trace is not None}


def _with_reference_calls(task: Task, trace: Trace | None) -> Task:
    """Benchmarks without reference calls take the trace's for the matching reward (eq. 24)."""
    if trace is None or any(task.reference_calls):
        return task
    return replace(task, reference_calls=(tuple(call for turn in trace.turns for call in turn.calls),))


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
