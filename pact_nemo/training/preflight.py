"""What can be known before anything is started: of the model folder and its layout, and for ``--dry-run`` of tasks and
traces as well.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pact_nemo.chat.template import ChatFormat
from pact_nemo.checkpoints.embedded import FOLDER_NAME, convert_gguf, find_embedded_gguf
from pact_nemo.config.schema import Config, settled
from pact_nemo.data.dataset import Dataset, build_dataset, check_server_length
from pact_nemo.data.tasks import build_environment, check_batches, load_tasks
from pact_nemo.environments.registry import environment_spec
from pact_nemo.errors import ConfigError
from pact_nemo.planning import disk
from pact_nemo.planning.from_config import model_shape
from pact_nemo.planning.generation import server_problems
from pact_nemo.planning.shape import Layout, ModelShape, adapter_parameters
from pact_nemo.policy import device as devices
from pact_nemo.policy.architectures import check_architecture
from pact_nemo.policy.model_folder import check_model_folder, check_values
from pact_nemo.runtime import machine, strict_json
from pact_nemo.runtime.quarantine import Quarantine
from pact_nemo.runtime.tensor_files import read_tensors
from pact_nemo.training.limits import training_limits

READ_BYTES = (
    4 << 30
)  #: of weights that are looked through before a run; more of them take longer than a refusal at the load costs


def preflight(config: Config, world: int | None = None) -> ChatFormat | None:
    """Refuse a ``model.path`` that could not be trained on as it is, and a layout that its model can't be cut into. On
    one rank only.

    Reads file headers, the tokenizer, and the weights where they are few: a large folder's are checked as the policy
    loads them. Without a path (the embedded model, or a recipe that is only explained) the layout is all that there is
    to check.

    Args:
        world: ranks of the job; None: a dry run, which may be on one process.

    Raises:
        ConfigError: the architecture, a setting of it, the tokenizer, the chat template, the layout or the server's
            length is not supported.
        CheckpointError: the folder's tensors are not those of its model, or not finite.
    """
    check_layout(config, world)
    check_server_length(config)
    if config.model.path is None:
        return None
    path = Path(config.model.path)
    architecture = check_architecture(path, attention=config.policy.attention)
    folder = check_model_folder(path)
    chat = chat_format(config, path)
    check_token_ids(path, chat.tokenizer, architecture.vocab)
    if folder.stored_bytes <= READ_BYTES:
        check_values(folder)
    return chat


def check_layout(config: Config, world: int | None) -> None:
    """Refuse a ``policy`` that the model can't be cut into, a server's likewise, and one that this job's ranks or this
    machine can't have.

    Args:
        world: ranks of the job; None: not known, and neither is its machine.

    Raises:
        ConfigError: names each setting of the layout and of ``config.json``.
    """
    policy, server = config.policy, config.rollout.server
    shape = model_shape(config)
    enough = policy.tensor_parallel * policy.pipeline_parallel * policy.context_parallel * policy.expert_parallel
    found = Layout.of(policy, enough).problems(shape)
    if server.url is None:
        found += server_problems(shape, server.tensor_parallel_size)
    fp8 = policy.resolved_fp8(capability=devices.compute_capability(), has_te=devices.has_transformer_engine())
    if fp8 is not None and 2 * policy.fp8_bf16_layers >= shape.layers:
        found.append(
            f"policy.fp8_bf16_layers={policy.fp8_bf16_layers} at each end leaves none of {shape.layers} layers in FP8"
        )
    found += _fp32_attention(config, shape, devices.gpu_memory())
    if found:
        model = "the embedded model" if config.model.recipe is None else f"the model of recipe {config.model.recipe}"
        where = model if config.model.path is None else str(Path(config.model.path) / "config.json")
        raise ConfigError(f"{where}: {'; '.join(found)}; change these settings of the layout, or take another model")
    if world is not None:
        policy.validate(cuda=devices.use_cuda(), world_size=world)


def _fp32_attention(config: Config, shape: ModelShape, memory: int | None) -> list[str]:
    """Why attention in float32 would not fit a GPU of ``memory`` bytes; None: there is none.

    torch has no kernel there for heads that share keys and values: it stores the scores of each call, twice.
    """
    policy, limits = config.policy, training_limits(config)
    if memory is None or shape.heads == shape.kv_heads or policy.resolved_precision(cuda=True) != "fp32":
        return []
    prompt, trace, response = config.tasks.max_prompt_tokens, config.traces.max_tokens, limits.max_response_tokens
    queries, keys = max(prompt, trace, response), prompt + trace + response
    needed = 2 * 4 * (shape.heads // policy.tensor_parallel) * queries * keys
    if needed <= memory:
        return []
    return [
        f"policy.precision=fp32: on a GPU the attention scores of {queries:,} by {keys:,} tokens take"
        f" {needed / 2**30:.0f} GiB, of {memory / 2**30:.0f}; set policy.precision=bf16, whose kernels store none, or"
        " lower tasks.max_prompt_tokens, rollout.sampling.max_response_tokens and traces.max_tokens"
    ]


def check_room(config: Config) -> None:
    """Refuse a run whose weights and checkpoints have no room on their disks. Not for a resumed run, whose disk holds
    most of them already.

    Raises:
        ConfigError: names the setting of the folder, what is needed and what is free.
    """
    parameters, rollout = model_shape(config).parameters, config.rollout
    precision = config.policy.resolved_precision(cuda=devices.use_cuda())
    reference = config.warmup.steps > 0 and config.objective.kl_coef > 0
    lora = config.policy.lora
    trained = adapter_parameters(model_shape(config), lora) if lora.rank else parameters
    own = disk.checkpoint_bytes(trained, precision, config.trainer.keep_checkpoints)
    own += disk.final_bytes(parameters, precision, reference=reference)
    exports = (
        disk.export_bytes(parameters, rollout.export_dtype, rollout.keep_exports)
        if config.trainer.replay is None
        else 0.0
    )
    needs = {
        "run.root": (config.run.root, own),
        "rollout.exports_dir": (rollout.exports_dir or config.run.root, exports),
    }
    by_disk: dict[int, list[str]] = {}
    for key, (folder, _) in needs.items():
        by_disk.setdefault(machine.disk_of(folder), []).append(key)
    for keys in by_disk.values():
        needed, free = sum(needs[key][1] for key in keys), machine.free_bytes(needs[keys[0]][0])
        if needed > free:
            where, gib = needs[keys[0]][0], 2**30
            raise ConfigError(
                f"{keys[0]}={where}: the run's weights and checkpoints take {needed / gib:.1f} GiB there,"
                f" {free / gib:.1f} GiB are free; make room, lower trainer.keep_checkpoints or rollout.keep_exports, or"
                " set run.root or rollout.exports_dir to another disk"
            )


def chat_format(config: Config, source: Path) -> ChatFormat:
    """Template and tokenizer of the model folder ``source``, with the settings of ``model``."""
    settings = config.model
    chat = ChatFormat.from_pretrained(source, settings.tool_format, settings.template_kwargs, settings.earlier_thoughts)
    if config.traces.control == "none":
        chat.boundary_after_nothing_ids()  # raises where the template can't have it
    return chat


def chat_of(config: Config) -> ChatFormat | None:
    """Template and tokenizer of the model that a config names, the embedded one included; None for a recipe without
    ``model.path``.

    Raises:
        ConfigError: the folder has no usable template or tokenizer.
    """
    if config.model.path is not None:
        return chat_format(config, Path(config.model.path))
    return None if config.model.recipe is not None else _embedded_chat_format(config)


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
                f"{len(train)} training tasks, {len(held_out)} held-out tasks; left out: {dropped}; a run makes their"
                " traces at its start"
            )
    finally:
        environment.close()
    check_batches(config, train, warmup_tasks)
    if len(quarantine):
        notes.append(
            f"{len(quarantine)} bad rows would be left out ({quarantine.by_file()}), the first one:"
            f" {quarantine.rows[0].error}"
        )
    return DataSeen(settled(config, len(train)), notes, chat, dataset)


def _embedded_chat_format(config: Config) -> ChatFormat:
    cached = Path(config.run.cache_dir) / FOLDER_NAME
    if cached.exists():  # from a run before this one
        return chat_format(config, cached)
    with tempfile.TemporaryDirectory(prefix="pact-") as folder:
        convert_gguf(find_embedded_gguf(), Path(folder), weights=False)
        return chat_format(config, Path(folder))


def check_served_folder(path: Path, tokenizer: Any) -> None:
    """Refuse a folder that a server would start from and answer wrongly: its files contradict each other, or its
    tokenizer is larger than the model. Any architecture will do, for it is served and not trained.

    Raises:
        ConfigError, CheckpointError: the message names the file, or the token.
    """
    read_tensors(path)
    try:
        config = strict_json.loads((path / "config.json").read_text(encoding="utf-8"))
        rows = config["vocab_size"] if "vocab_size" in config else config["text_config"]["vocab_size"]
        check_token_ids(path, tokenizer, int(rows))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path / 'config.json'} says no vocab_size that can be read ({error!r}); copy that folder again"
        ) from error


def check_token_ids(path: Path, tokenizer: Any, rows: int) -> None:
    """Refuse a folder whose tokenizer or settings have token ids that the embedding has no row for. Fewer ids than rows
    are fine (padding).

    Args:
        tokenizer: of that folder.
        rows: of the model's embedding.

    Raises:
        ConfigError: names a token, its id and the rows.
    """
    remedy = (
        "give the model rows for it (resize_token_embeddings, then train them) or take the token out of the tokenizer"
    )
    beyond = sorted((index, token) for token, index in tokenizer.get_vocab().items() if index >= rows)
    if beyond:
        index, token = beyond[0]
        more = f" and {len(beyond) - 1} more" if len(beyond) > 1 else ""
        raise ConfigError(
            f"{path}: the tokenizer has {token!r} as id {index}{more}, the model has {rows} rows (ids 0 to {rows - 1});"
            f" {remedy}"
        )
    for name in ("config.json", "generation_config.json"):
        try:
            settings = strict_json.loads((path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path / name} can't be read ({error}); copy that folder again") from error
        for key, value in settings.items():
            if not key.endswith(("_token_id", "_token_ids")):
                continue
            ids = value if isinstance(value, list) else [value]
            strange = next((item for item in ids if isinstance(item, int) and item >= rows), None)
            if strange is not None:
                shown = f"{path / name}: {key}={json.dumps(value)}"
                raise ConfigError(
                    f"{shown}: the model has {rows} rows (ids 0 to {rows - 1}) and none for {strange}; change that key"
                )
