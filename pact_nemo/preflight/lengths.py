"""How long prompts and traces of a run are in tokens of its model: what a plan rests on where the data is at hand."""

from __future__ import annotations

from collections.abc import Callable

from pact_nemo.chat.template import ChatFormat
from pact_nemo.config.schema import Config
from pact_nemo.data.dataset import Dataset, build_dataset
from pact_nemo.data.tasks import build_environment, prompt_length
from pact_nemo.environments.registry import environment_spec
from pact_nemo.objective.components import OBSERVATION, OTHER
from pact_nemo.planning.from_config import expected_lengths
from pact_nemo.planning.workload import Lengths, measured
from pact_nemo.preflight.chat import chat_of
from pact_nemo.runtime.quarantine import Quarantine

LOOKED_AT = 256  #: training tasks that are measured at most: a mean needs no more


def lengths_of(config: Config, chat: ChatFormat, dataset: Dataset) -> Lengths:
    """Lengths of a dataset's training tasks and of their traces as they are cut for this run."""
    tasks = dataset.train[:LOOKED_AT]
    traces = [dataset.trace_tokens[task.id] for task in tasks if task.id in dataset.trace_tokens]
    written = [sum(part not in (OTHER, OBSERVATION) for part in trace.component) for trace in traces]
    return measured(
        [prompt_length(chat, task) for task in tasks],
        list(zip(map(len, traces), written, strict=True)),
        config.rollout.sampling.max_response_tokens,
    )


def read_lengths(config: Config, note: Callable[[str], None] = lambda text: None) -> Lengths:
    """Lengths of the user's own files, read as a run reads them; of what the limits say where the config names no
    file, or no tokenizer (a recipe without ``model.path``), or where traces would have to be made first.

    Args:
        note: told what was found, or why nothing was measured.

    Raises:
        ConfigError, DataError: as :func:`~pact_nemo.data.dataset.build_dataset` does.
    """
    if config.tasks.path is None and config.traces.path is None:
        return expected_lengths(config)
    if config.traces.path is None and environment_spec(config.environment).expert_traces == "recorded":
        note("lengths are assumed: the traces of recorded answers are made by a run; give traces.path")
        return expected_lengths(config)
    chat = chat_of(config)
    if chat is None:
        note("lengths are assumed: a tokenizer counts them; give model.path=FOLDER")
        return expected_lengths(config)
    quarantine = Quarantine(config.run.bad_rows)
    environment = build_environment(config, quarantine)
    try:
        return lengths_of(config, chat, build_dataset(config, environment, chat, note, quarantine))
    finally:
        environment.close()
