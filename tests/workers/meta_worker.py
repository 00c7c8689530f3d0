"""Builds single ranks of models under any layout, on the meta device behind a fake process group, and prints their
parameter counts.

python meta_worker.py '[{"folder": HF_CONFIG_FOLDER, "settings": {POLICY...}, "world": 64, "ranks": [0, 16]}, ...]'
"""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore


def count(folder: str, settings: dict[str, object], world: int, ranks: list[int]) -> list[dict[str, int]]:
    """Parameters of each of ``ranks``, by kind."""
    from pact_nemo.policy.config import PolicyConfig
    from pact_nemo.policy.megatron_import import prepare_megatron

    prepare_megatron()
    from megatron.core import parallel_state, tensor_parallel

    from pact_nemo.policy import model
    from pact_nemo.policy.architectures import check_architecture
    from pact_nemo.policy.provider import build_provider, configure_provider

    config = PolicyConfig(**settings)  # type: ignore[arg-type]
    answers = []
    for rank in ranks:
        dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.tensor_parallel,
            pipeline_model_parallel_size=config.pipeline_parallel,
            virtual_pipeline_model_parallel_size=config.virtual_pipeline,
            context_parallel_size=config.context_parallel,
            expert_model_parallel_size=config.expert_parallel,
            expert_tensor_parallel_size=1,
            create_gloo_process_groups=False,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        architecture = check_architecture(folder)
        provider = build_provider(architecture)
        provider.expert_tensor_parallel_size = 1
        configure_provider(provider, config, cuda=False)
        local, model.local_device = (
            model.local_device,
            lambda: torch.device("meta"),
        )  # build_chunks moves each chunk to this rank's device
        try:
            with torch.device("meta"):
                chunks = model.build_chunks(provider, architecture, config, cuda=False)
        finally:
            model.local_device = local
        named = [(name, param) for chunk in chunks for name, param in chunk.named_parameters()]
        assert all(param.is_meta for _, param in named)
        answers.append(
            {
                "stage": parallel_state.get_pipeline_model_parallel_rank(),
                "expert": sum(p.numel() for n, p in named if ".experts." in n),
                "total": sum(p.numel() for _, p in named),
                "largest": max(p.numel() for _, p in named),
            }
        )
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    return answers


if __name__ == "__main__":
    jobs = json.loads(sys.argv[1])
    print(json.dumps([count(**job) for job in jobs]))
