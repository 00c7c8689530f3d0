"""A model folder, its layout and the disks, checked before anything is started."""

from __future__ import annotations

from pathlib import Path

from pact_nemo.chat.template import ChatFormat
from pact_nemo.checkpoints.megatron_bridge.index import check_checkpoint, identity
from pact_nemo.checkpoints.megatron_bridge.settings import bridge_settings
from pact_nemo.config.limits import training_limits
from pact_nemo.config.lora import refit_kind
from pact_nemo.config.schema import BRIDGE, Config
from pact_nemo.data.dataset import check_server_length
from pact_nemo.errors import ConfigError
from pact_nemo.planning import disk
from pact_nemo.planning.from_config import model_shape
from pact_nemo.planning.generation import server_problems
from pact_nemo.planning.shape import Layout, ModelShape, adapter_parameters
from pact_nemo.policy import device as devices
from pact_nemo.policy.architectures import check_architecture
from pact_nemo.policy.config import ADAPTER
from pact_nemo.policy.lora_sizes import lora_problems
from pact_nemo.policy.model_folder import check_model_folder, check_values
from pact_nemo.policy.model_source import model_source
from pact_nemo.preflight.chat import chat_format
from pact_nemo.preflight.token_ids import check_token_ids
from pact_nemo.runtime import machine
from pact_nemo.serving.launch import on_cuda

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
    source = model_source(config.model.path, config.model.hf_config)
    path = source.described
    architecture = check_architecture(path, attention=config.policy.attention)
    if BRIDGE in config.export.formats:
        bridge_settings(architecture)  # raises where Megatron-Bridge has no settings for it
    folder = check_model_folder(path) if source.checkpoint is None else None
    if folder is None:
        check_checkpoint(source, architecture)
    chat = chat_format(config, path)
    check_token_ids(path, chat.tokenizer, architecture.vocab)
    if folder is not None and folder.stored_bytes <= READ_BYTES:
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
    found = Layout.of(policy, enough).problems(shape) + lora_problems(policy.lora, shape)
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
        settings = config.model
        described = settings.path and model_source(settings.path, settings.hf_config).described / "config.json"
        where = str(described or model)
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
    own += disk.final_bytes(parameters, precision, formats=len(config.export.formats), reference=reference)
    own_dtype = "float32" if precision == "fp32" else "bfloat16"  # of adapters, which are exported as they are
    kind = refit_kind(config, cuda=on_cuda(rollout.server))
    what = (trained, own_dtype) if kind == ADAPTER else (parameters, rollout.export_dtype)
    exports = disk.export_bytes(*what, rollout.keep_exports) if config.trainer.replay is None else 0.0
    needs = {
        "run.root": (config.run.root, own),
        "rollout.exports_dir": (rollout.exports_dir or config.run.root, exports),
    }
    if (cached := _copy_bytes(config, parameters, precision)) > 0:
        needs["run.cache_dir"] = (config.run.cache_dir, cached)
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


def _copy_bytes(config: Config, parameters: int, precision: str) -> float:
    """Of the Hugging Face copy of a Megatron-Bridge checkpoint that has still to be made."""
    if config.model.path is None:
        return 0.0
    source = model_source(config.model.path, config.model.hf_config)
    if source.checkpoint is None or any(Path(config.run.cache_dir).glob(f"*-{identity(source)}")):
        return 0.0
    return disk.final_bytes(parameters, precision, reference=False)
