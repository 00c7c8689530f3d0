"""Tasks and traces as a run would read them, for ``--dry-run``."""

from __future__ import annotations

from dataclasses import dataclass

from pact_nemo.chat.template import ChatFormat
from pact_nemo.config.schema import Config, settled
from pact_nemo.data.dataset import Dataset, build_dataset
from pact_nemo.data.tasks import build_environment, check_batches, load_tasks
from pact_nemo.environments.registry import environment_spec
from pact_nemo.preflight.chat import chat_of
from pact_nemo.runtime.quarantine import Quarantine
from pact_nemo.runtime.words import count_of


@dataclass(frozen=True)
class DataSeen:
    """What a look at tasks and traces found.

    Attributes:
        config: with its length in steps.
        notes: lines that say what was found.
        chat: template and tokenizer that lengths are counted with; None where the config names none.
        dataset: of the run; None where it was not made.
    """

    config: Config
    notes: list[str]
    chat: ChatFormat | None = None
    dataset: Dataset | None = None


def look_at_data(config: Config, chat: ChatFormat | None) -> DataSeen:
    """Read tasks and traces as a run would, for ``--dry-run``: what a run would refuse is refused here.

    Traces that the run finds for recorded sub-answers are not made: that takes calls by the thousand.

    Args:
        chat: of the model folder; None: the embedded model's is taken. A recipe without ``model.path`` has no
            tokenizer: no data is read.

    Raises:
        ConfigError, DataError: as :func:`~pact_nemo.data.dataset.build_dataset` does.
    """
    if chat is None and config.model.recipe is not None:
        return DataSeen(config, ["tasks and traces were not read: lengths need a tokenizer, model.path=FOLDER"])
    notes: list[str] = []
    quarantine = Quarantine(config.run.bad_rows)
    chat = chat if chat is not None else chat_of(config)
    assert chat is not None  # no recipe without a model is left
    environment, dataset = build_environment(config, quarantine), None
    try:
        if environment_spec(config.environment).expert_traces != "recorded" or config.traces.path is not None:
            dataset = build_dataset(config, environment, chat, notes.append, quarantine)
            train, warmup_tasks = dataset.train, dataset.warmup_tasks(config.warmup.max_tasks)
        else:
            warmup_tasks = None
            train, held_out, dropped = load_tasks(config, environment, chat, quarantine)
            notes.append(
                f"{count_of(len(train), 'training task')}, {count_of(len(held_out), f'{config.tasks.scored} task')};"
                f" left out: {dropped}; a run makes their traces at its start"
            )
    finally:
        environment.close()
    check_batches(config, train, warmup_tasks, quarantine)
    if len(quarantine):
        notes.append(
            f"{len(quarantine)} bad rows would be left out ({quarantine.by_file()}), the first one:"
            f" {quarantine.rows[0].error}"
        )
    return DataSeen(settled(config, len(train)), notes, chat, dataset)
