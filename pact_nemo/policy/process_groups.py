"""megatron's process groups, one layout at a time."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from pact_nemo.policy.config import PolicyConfig
from pact_nemo.policy.distributed import patience
from pact_nemo.policy.megatron_import import prepare_megatron

prepare_megatron()

from megatron.core import parallel_state, tensor_parallel  # noqa: E402

_layout: tuple[Any, ...] | None = None  # of the process groups that exist


def initialize_model_parallel(config: PolicyConfig, *, seed: int) -> None:
    """Create megatron's process groups for this layout and seed its generators. Groups of the same layout are used
    again: torch keeps every group, with its sockets, until the process ends or the group is destroyed by name."""
    global _layout
    layout = (
        dist.group.WORLD,
        config.tensor_parallel,
        config.pipeline_parallel,
        config.virtual_pipeline,
        config.context_parallel,
        config.expert_parallel,
    )
    if layout != _layout or not parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.tensor_parallel,
            pipeline_model_parallel_size=config.pipeline_parallel,
            virtual_pipeline_model_parallel_size=config.virtual_pipeline,
            context_parallel_size=config.context_parallel,
            expert_model_parallel_size=config.expert_parallel,
            expert_tensor_parallel_size=1,
            distributed_timeout_minutes=int(patience(config.init_timeout_s).total_seconds() // 60),
        )
        _layout = layout
    if config.virtual_pipeline is not None:
        parallel_state.set_virtual_pipeline_model_parallel_rank(0)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
