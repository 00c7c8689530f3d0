"""The tasks that an evaluation plays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pact_nemo.chat.template import ChatFormat
from pact_nemo.config.schema import Config
from pact_nemo.data.tasks import load_tasks
from pact_nemo.environments.base import Environment, Task
from pact_nemo.environments.order import refuse_samples, with_prerequisites
from pact_nemo.errors import ConfigError
from pact_nemo.preflight.chat import chat_of
from pact_nemo.runtime.quarantine import Quarantine


def model_folder(model: str) -> Path | None:
    """The folder that ``--model`` names; None where it is the URL of a server."""
    return None if model.startswith(("http://", "https://")) else Path(model)


def chosen_tasks(
    config: Config, environment: Environment, model: Path | None, *, held_out: bool, limit: int | None
) -> tuple[list[Task], list[Task]]:
    """(all tasks that there are, those to play: the ones that count, behind those that they build on).

    Args:
        model: the folder that is evaluated; None: it is behind a URL.
        held_out: only what a run with these settings is evaluated on.
        limit: only the first tasks.

    Raises:
        ConfigError: no run can have these tasks held out, or they can't be played ``evaluation.samples`` times.
    """
    every = environment.tasks()
    chosen = [task for task in every if not task.prepares]
    if held_out:
        chosen = _held_out(config, environment, model)
        names = {task.id for task in chosen}
        every = [*(task for task in every if task.id not in names), *chosen]  # they may be of tasks.eval_path
    chosen = with_prerequisites(chosen[:limit], every)
    refuse_samples(chosen, config.evaluation.samples)
    return every, chosen


def _held_out(config: Config, environment: Environment, model: Path | None) -> list[Task]:
    """What the run's own way of choosing makes of these settings: it leaves out prompts that are too long for the
    run's tokenizer before it splits.
    """
    try:
        _, held_out, _ = load_tasks(config, environment, _run_chat(config, model), Quarantine(config.run.bad_rows))
    except ConfigError as error:
        raise ConfigError(f"--held-out takes the tasks that a run with these settings holds out: {error}") from error
    return held_out


def _run_chat(config: Config, model: Path | None) -> ChatFormat:
    """The chat format of the run's model; of the evaluated folder where the settings name none."""
    if config.model.path is None and model is not None:
        config = replace(config, model=replace(config.model, path=str(model)))
    chat = chat_of(config)
    if chat is None:
        raise ConfigError("its prompts are measured with its tokenizer; set model.path=FOLDER")
    return chat
