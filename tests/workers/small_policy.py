"""A policy of one process on a tiny model, as its tests build it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pact_nemo.policy.config import OptimizerConfig, PolicyConfig
from pact_nemo.policy.policy import MegatronPolicy


def build(
    path: Path, *, optimizer: dict[str, Any] | None = None, policy: dict[str, Any] | None = None, **config: Any
) -> MegatronPolicy:
    settings = PolicyConfig(**{"precision": "fp32", "micro_batch_tokens": 96, "logprob_chunk": 16, **config})
    return MegatronPolicy(
        settings,
        OptimizerConfig(**{"lr": 1e-3, "eps": 1e-5, **(optimizer or {})}),
        path,
        seed=1,
        total_steps=4,
        **(policy or {}),
    )
