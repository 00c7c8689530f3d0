"""A policy's weights as a checkpoint that Megatron-Bridge's own loader opens, under any layout.

The folder is what ``AutoBridge.import_ckpt`` writes: ``iter_0000000`` with megatron's ``torch_dist`` files,
``run_config.yaml``, ``train_state.pt`` and ``tokenizer``, and beside it the files that name the newest save. In
``tokenizer`` there are ``config.json`` and the chat template as well, so that ``model.path`` takes the folder alone.
"""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import yaml

from pact_nemo.checkpoints.failures import naming_the_file
from pact_nemo.checkpoints.manifest import write_manifest
from pact_nemo.checkpoints.megatron_bridge.settings import model_section
from pact_nemo.checkpoints.writer_processes import start_results_queue
from pact_nemo.errors import ConfigError
from pact_nemo.policy.architectures import Architecture
from pact_nemo.policy.export.hf_folder import copy_artifacts
from pact_nemo.policy.megatron_import import prepare_megatron
from pact_nemo.policy.model_source import RUN_CONFIG, TOKENIZER, TRACKER
from pact_nemo.policy.sharded_state import sharded_weights
from pact_nemo.runtime.collective import on_rank_zero
from pact_nemo.runtime.files import new_directory, write_text_atomic

prepare_megatron()

from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.dist_checkpointing.dict_utils import nested_values  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedObject  # noqa: E402

if TYPE_CHECKING:
    from pact_nemo.policy.policy import MegatronPolicy

SAVE = "iter_0000000"  #: as import_ckpt numbers a model that wasn't trained there
_TRAIN_STATE = "train_state.pt"
#: as Megatron-Bridge says of its own saves; it asks for the tensors of a layer by it
_CONTENT = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
_COUNTERS = ("step", "consumed_train_samples", "skipped_train_samples", "consumed_valid_samples")
_SETTINGS = "megatron.bridge.training"
_EXTRA = "_extra_state"


def export_bridge_to(policy: MegatronPolicy, folder: str | Path, *, version: int) -> Path:
    """Write the policy's weights, in their dtype, as a new ``folder`` with a manifest; visible only when whole.
    Collective; every rank sees the folder's disk.

    Raises:
        ConfigError: the policy has adapters, or Megatron-Bridge can't compute its architecture.
        CheckpointError: on all ranks: the disk refused (the message names file and remedy). Nothing is left behind.
        FileExistsError: the folder exists already (CheckpointError on ranks other than 0).
    """
    if policy.adapters is not None:
        raise ConfigError("export.formats: megatron_bridge holds all weights, and policy.lora trains adapters")
    target = Path(folder)
    with naming_the_file(target, "can't be written", "nothing of it became visible"), ExitStack() as stack:
        temporary = Path(on_rank_zero(lambda: str(stack.enter_context(new_directory(target)))))
        save = temporary / SAVE
        on_rank_zero(save.mkdir)
        _write_weights(policy, save)

        def publish() -> None:
            _write_run_config(save / RUN_CONFIG, policy.architecture, policy.weight_dtype, target / SAVE / TOKENIZER)
            (save / TOKENIZER).mkdir()
            copy_artifacts(policy.hf_path, save / TOKENIZER, policy.weight_dtype, {})
            _write_counters(save / _TRAIN_STATE)
            shutil.copyfile(save / _TRAIN_STATE, temporary / f"latest_{_TRAIN_STATE}")
            write_text_atomic(temporary / TRACKER, "0")
            write_manifest(temporary, version, {"format": "megatron_bridge", "dtype": policy.weight_dtype})
            stack.close()

        on_rank_zero(publish)
    return target


def _write_weights(policy: MegatronPolicy, save: Path) -> None:
    state: dict[str, Any] = {"checkpoint_version": 3.0, "iteration": 0, **sharded_weights(policy.chunks)}
    state["extra"] = _scales_of_transformer_engine(policy, state)
    start_results_queue()
    dist_checkpointing.save(state, str(save), content_metadata=_CONTENT)
    dist.barrier()


def _scales_of_transformer_engine(policy: MegatronPolicy, state: dict[str, Any]) -> dict[str, Any]:
    """Empty objects where Transformer Engine's modules look for their FP8 scales, and this policy's have none.

    Its attention is ours, and without CUDA its norms are torch's. Megatron's loader stops at an object that is missing.
    """
    config = policy.provider
    known = {value.key for value in nested_values(state) if isinstance(value, ShardedObject)}
    names = ["self_attention.core_attention"]
    names += ["self_attention.q_layernorm", "self_attention.k_layernorm"] if config.qk_layernorm else []
    names += ["pre_mlp_layernorm"] if config.num_moe_experts else []
    found: dict[str, Any] = {}
    for chunk in policy.chunks:
        groups = chunk.pg_collection
        copy = (0, groups.tp.rank(), groups.dp_cp.rank())
        for layer in chunk.decoder.layers:
            index = layer.layer_number - 1
            for name in names:
                key = f"decoder.layers.{name}.{_EXTRA}"
                found[f"{key}.{index}"] = ShardedObject(key, None, (config.num_layers,), (index,), copy)
        if chunk.post_process:
            key = f"decoder.final_layernorm.{_EXTRA}"
            found[key] = ShardedObject(key, None, (1,), (0,), copy)
    return {name: part for name, part in found.items() if part.key not in known}


def _write_counters(path: Path) -> None:
    """Megatron-Bridge's ``TrainState`` of a model that wasn't trained there."""
    state: dict[str, torch.Tensor] = {name: torch.tensor(0, dtype=torch.int32) for name in _COUNTERS}
    state["floating_point_operations_so_far"] = torch.tensor(0.0)
    torch.save(state | {name: torch.tensor(False) for name in ("do_train", "do_valid", "do_test")}, path)


def _write_run_config(path: Path, architecture: Architecture, dtype: str, tokenizer: Path) -> None:
    checkpoint = {"ckpt_format": "torch_dist", "save_optim": False, "save_rng": False, "fully_parallel_save": True}
    content = {
        "_target_": f"{_SETTINGS}.config.ConfigContainer",
        "model": model_section(architecture, dtype),
        "checkpoint": {"_target_": f"{_SETTINGS}.config.CheckpointConfig", **checkpoint},
        "tokenizer": {
            "_target_": f"{_SETTINGS}.tokenizers.config.TokenizerConfig",
            "tokenizer_type": "HuggingFaceTokenizer",
            "tokenizer_model": str(tokenizer.resolve()),
        },
    }
    write_text_atomic(path, yaml.safe_dump(content, default_flow_style=False))
