"""Tasks, their split and the order they are visited in: what is fixed before the first step."""

from __future__ import annotations

import random
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

from pact_nemo.chat.template import ChatFormat
from pact_nemo.chat.tool_formats import Pythonic, tool_format
from pact_nemo.config.schema import Config
from pact_nemo.data.conversations import conversations_of, refuse_conversations
from pact_nemo.environments import registry
from pact_nemo.environments.answers import answer_words
from pact_nemo.environments.base import Environment, Task
from pact_nemo.environments.spec import Setup
from pact_nemo.environments.splits import rank, split
from pact_nemo.errors import ConfigError, DataError, ToolCallError
from pact_nemo.methods.registry import method_class
from pact_nemo.runtime.quarantine import Quarantine
from pact_nemo.runtime.words import count_of
from pact_nemo.sandbox import Limits, Sandbox


def build_environment(
    config: Config, quarantine: Quarantine | None = None, path: str | None = None, folder: Path | None = None
) -> Environment:
    """The environment that the setting ``environment`` names; its sandbox, where it has one, starts when it is first
    needed.

    Args:
        quarantine: takes the bad rows of its files; None: one of its own, with the policy of ``run.bad_rows``.
        path: a file of tasks in place of ``tasks.path``.
        folder: where it may keep what a resumed evaluation needs; None: nowhere.

    Raises:
        ConfigError: there is no such environment, or it can't be built.
    """
    limits = Limits(
        seconds=config.sandbox.seconds, memory_mb=config.sandbox.memory_mb, processes=config.sandbox.processes
    )
    quarantine = quarantine if quarantine is not None else Quarantine(config.run.bad_rows)
    setup = Setup(
        settings=config.environment_config,
        path=path if path is not None else config.tasks.path,
        max_observation_chars=config.tasks.max_observation_chars,
        seed=config.tasks.split_seed,
        quarantine=quarantine,
        sandbox=lambda: Sandbox(config.sandbox.workers, limits, unconfined=config.sandbox.unconfined),
        conversations=lambda: conversations_of(config, quarantine),
        refuse_conversations=lambda: refuse_conversations(config),
        python_names=isinstance(tool_format(config.model.tool_format), Pythonic),
        folder=folder,
    )
    return registry.build_environment(config.environment, setup)


def _short_enough(
    config: Config, tasks: list[Task], chat: ChatFormat, quarantine: Quarantine, dropped: dict[str, int]
) -> list[Task]:
    """The tasks whose prompt fits ``tasks.max_prompt_tokens``; the others are counted in ``dropped``."""
    fitting = []
    for task in tasks:
        length = quarantine.parse(lambda: prompt_length(chat, task), _rows_of(task))  # noqa: B023 - called at once
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


def load_tasks(
    config: Config, environment: Environment, chat: ChatFormat, quarantine: Quarantine
) -> tuple[list[Task], list[Task], dict[str, int]]:
    """Training and held-out tasks, split by scenario group, and how many were left out, by reason.

    With ``tasks.validation`` the second list has the validation tasks in place of the held-out ones.

    Raises:
        ConfigError: no task is left on one side of the split.
        DataError: a task row is malformed (file, line and field named) and ``run.bad_rows`` is strict, or a prompt is
            too long and ``tasks.overlong`` is stop.
    """
    dropped = {"prompt_too_long": 0}
    refuse_evaluation_only(config, environment.tasks())

    def short_enough(tasks: list[Task]) -> list[Task]:
        return _short_enough(config, tasks, chat, quarantine, dropped)

    if config.tasks.eval_path is not None:
        other = build_environment(config, quarantine, config.tasks.eval_path)
        try:
            refuse_evaluation_only(config, other.tasks())
            _refuse_one_name(config, environment.tasks(), other.tasks())
            held_out = short_enough(other.tasks())
        finally:
            other.close()
        train = short_enough(environment.tasks())
    else:
        usable = short_enough(environment.tasks())
        try:
            train, held_out = split(usable, held_out=config.tasks.held_out, seed=config.tasks.split_seed)
        except ConfigError as error:
            raise ConfigError(f"{error}{_quarantined(quarantine)}") from error
    train = _unlike(environment, train, held_out, dropped)
    if config.tasks.validation:  # what is evaluated from here on; no held-out task is played or trained on
        try:
            train, held_out = split(train, held_out=config.tasks.validation, seed=config.tasks.split_seed)
        except ConfigError as error:
            raise ConfigError(
                f"tasks.validation={config.tasks.validation} of the groups that are not held out leaves one side"
                f" empty: lower it, or tasks.held_out{_quarantined(quarantine)}"
            ) from error
        train = _unlike(environment, train, held_out, dropped)
    if config.objective.outcome == "answer_f1" and "outcome" in method_class(config.method).reward_settings:
        train = [
            task
            for task in train
            if quarantine.parse(lambda: _answerable(config, task), _rows_of(task)) is not None  # noqa: B023
        ]
    train, held_out = limited(config, train, held_out)
    for name, side in (("training", train), (config.tasks.scored, held_out)):
        if not side:
            bad = _quarantined(quarantine)
            raise ConfigError(
                f"no {name} task is left: loosen tasks.* (dropped so far: {dropped}) or change tasks.held_out{bad}"
            )
    return train, held_out, dropped


def _refuse_one_name(config: Config, train: list[Task], held_out: list[Task]) -> None:
    """Raises DataError where a training task and a held-out one have one id: traces, rollouts and scores go by it."""
    both = {task.id for task in train} & {task.id for task in held_out}
    if both:
        raise DataError(
            f"{count_of(len(both), 'id')} of tasks.path too, the first one is {min(both)}: give the rows of one file"
            " other ids; a row without an id has one made of its number",
            file=config.tasks.eval_path,
            field="id",
        )


def _unlike(environment: Environment, train: list[Task], held_out: list[Task], dropped: dict[str, int]) -> list[Task]:
    """The training tasks without those that ask what a held-out task asks, in another row or in another scenario;
    these are counted in ``dropped``.
    """
    beginning: Callable[[Task], str] = getattr(environment, "beginning_of", lambda task: str(task.user_turns))
    asked = {beginning(task) for task in held_out}
    unseen = [task for task in train if beginning(task) not in asked]
    if len(unseen) < len(train):
        dropped["held_out_too"] = dropped.get("held_out_too", 0) + len(train) - len(unseen)
    return unseen


def refuse_evaluation_only(config: Config, tasks: list[Task]) -> None:
    """Raises ConfigError where the tasks of these settings can be evaluated but not trained on; says why."""
    why = registry.environment_spec(config.environment).evaluation_only(config.environment_config)
    if why is not None:
        raise ConfigError(why)
    linked = next((task for task in tasks if task.after or task.prepares), None)
    if linked is not None:
        raise ConfigError(
            f"task {linked.id} builds on other episodes or prepares for them, so it can't be trained on: leave such"
            " tasks out, and evaluate them with tools/evaluate.py"
        )


def check_batches(
    config: Config, train: list[Task], warmup_tasks: list[Task] | None, quarantine: Quarantine | None = None
) -> None:
    """Refuse batches that the tasks can't fill, before anything is started.

    Args:
        warmup_tasks: None: not known yet.
        quarantine: rows that were left out; where there are any, an error begins with them.

    Raises:
        ConfigError: names the batch size and the tasks that there are.
    """
    try:
        if config.trainer.steps != 0:
            prompts_of_step(train, 0, config.trainer.batch_size, config.run.seed, "trainer.batch_size")
        if config.warmup.steps and warmup_tasks is not None:
            if not warmup_tasks:
                raise ConfigError(
                    "warmup.steps > 0 needs training tasks with traces, and there are none; set warmup.steps=0 or check"
                    " traces.path"
                )
            prompts_of_step(warmup_tasks, 0, config.warmup.batch_size, config.run.seed, "warmup.batch_size")
    except ConfigError as error:
        if quarantine is None or not quarantine.rows:
            raise
        files = ", ".join(f"{count} of {name}" for name, count in quarantine.by_file().items())
        raise ConfigError(
            f"in quarantine: {count_of(len(quarantine), 'row')} ({files}); mend them, the first one:"
            f" {quarantine.rows[0].error}. Without them, {error}"
        ) from error


def _quarantined(quarantine: Quarantine) -> str:
    """What an error for want of tasks says of the rows that were left out."""
    return (
        f"; in quarantine: {count_of(len(quarantine), 'row')}, the first one: {quarantine.rows[0].error}"
        if quarantine.rows
        else ""
    )


def limited(config: Config, train: list[Task], held_out: list[Task]) -> tuple[list[Task], list[Task]]:
    """Both sides in the order of ``tasks.split_seed``, the first ``tasks.max_train`` and ``tasks.max_eval`` of them.

    A held-out task's place depends on the seed and its id alone. So runs that leave out different training tasks, or a
    few held-out ones, are still evaluated on the same.
    """
    seed = config.tasks.split_seed
    train = sorted(train, key=lambda task: task.id)
    random.Random(seed).shuffle(train)
    held_out = sorted(held_out, key=lambda task: rank(task.id, seed))
    return train[: config.tasks.max_train], held_out[: config.tasks.max_eval]


def prompt_length(chat: ChatFormat, task: Task) -> int:
    """Tokens of a task's prompt x.

    Raises:
        DataError: tool format or chat template can't render it; names the task.
    """
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
            f"the prompt of {task.id} asks for no <answer></answer>: {remedy}"
            f" {registry.environment_spec(config.environment).answer_remedy}",
            file=config.tasks.path,
        )
    return task


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
    return _of_epoch(train, epoch, (index + 1) * batch_size, batch_size, seed)


def _of_epoch(train: list[Task], epoch: int, end: int, size: int, seed: int | str) -> list[Task]:
    """The ``size`` tasks before place ``end`` of an epoch's permutation."""
    order = list(range(len(train)))
    random.Random(f"{seed}:{epoch}").shuffle(order)
    return [train[i] for i in order[end - size : end]]


def traced_in_steps(share: float, size: int, steps: int) -> list[int]:
    """How many of the ``size`` prompts are of tasks with a trace, in each of the first ``steps`` steps.

    floor((s + 1) p) - floor(s p) for p = share * size: what a step can't have whole is carried over to the next ones.
    ``share`` is the decimal that is written: in floats 0.29 of 100 is below 29.
    """
    top, bottom = (Fraction(repr(share)) * size).as_integer_ratio()
    ends = [step * top // bottom for step in range(steps + 1)]
    return [end - start for start, end in pairwise(ends)]


def prompts_after(train: list[Task], sizes: list[int], seed: str) -> list[Task]:
    """:func:`prompts_of_step` of the last of some steps of so many prompts each; none may be larger than ``train``."""
    epoch = end = 0
    for size in sizes:
        epoch, end = (epoch, end + size) if end + size <= len(train) else (epoch + 1, size)
    return _of_epoch(train, epoch, end, sizes[-1], seed)
