"""The Hugging Face copy of a Megatron-Bridge checkpoint that a run starts from, which rollout servers and the KL
reference read. The trainer itself reads the checkpoint.
"""

from __future__ import annotations

import gc
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from pact_nemo.checkpoints.hf import export_to
from pact_nemo.checkpoints.manifest import verify_manifest
from pact_nemo.checkpoints.megatron_bridge.index import identity, stored_weights
from pact_nemo.checkpoints.megatron_bridge.reading import CheckpointWeights
from pact_nemo.errors import CheckpointError
from pact_nemo.policy.config import LoraConfig, OptimizerConfig, PolicyConfig
from pact_nemo.policy.device import use_cuda
from pact_nemo.policy.distributed import init_distributed
from pact_nemo.policy.model_source import ModelSource
from pact_nemo.policy.policy import MegatronPolicy
from pact_nemo.runtime import machine
from pact_nemo.runtime.collective import on_rank_zero

log = logging.getLogger(__name__)


def copy_as_hf(source: ModelSource, cache: Path, policy_config: PolicyConfig, *, seed: int) -> Path:
    """The folder below ``cache`` with a checkpoint's weights in Hugging Face's format. Collective.

    All ranks make it on the first call, under the run's own layout, and before a server has memory. Later calls verify
    it. A torn one is made again; a changed checkpoint gets a new one. The weights are the policy's: in bfloat16 where
    the checkpoint's or the policy's are, else in float32.

    Raises:
        CheckpointError: on all ranks: the checkpoint is not of the model of ``source.described``, or not whole.
        ConfigError: on all ranks: contradictory settings, or ``run.cache_dir``, which ``cache`` is, can't be written.
    """
    bf16 = policy_config.resolved_precision(cuda=use_cuda()) == "bf16"
    assert source.checkpoint is not None
    save = source.checkpoint

    def dtype_of() -> str:
        return "bfloat16" if bf16 or stored_weights(save).dtype == torch.bfloat16 else "float32"

    dtype = on_rank_zero(dtype_of)
    name = f"{save.parent.name}-{save.name}-{dtype}"
    folder = cache / on_rank_zero(lambda: f"{name}-{identity(source)}")
    if on_rank_zero(lambda: _is_whole(folder)):
        return folder
    on_rank_zero(lambda: machine.check_writable(cache, "run.cache_dir"))
    init_distributed(policy_config.init_timeout_s)
    policy = MegatronPolicy(
        replace(policy_config, lora=LoraConfig()),
        OptimizerConfig(),
        source.described,
        seed=seed,
        total_steps=1,
        trainable=False,
        weights=CheckpointWeights(source),
    )
    try:
        export_to(policy, folder, version=0, dtype=dtype, extra={"source": save.name})
    except (CheckpointError, FileExistsError):
        if not on_rank_zero(lambda: _is_whole(folder)):  # unless another job finished the same copy first
            raise
    del policy
    gc.collect()
    if use_cuda():
        torch.cuda.empty_cache()
    return folder


def _is_whole(folder: Path) -> bool:
    if not folder.exists():
        return False
    try:
        verify_manifest(folder)
    except CheckpointError as error:
        log.warning("the copy of the checkpoint is made again: %s", error)
        shutil.rmtree(folder)
        return False
    return True
