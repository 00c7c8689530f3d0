"""What adapters (``policy.lora``) mean for the rollout servers."""

from __future__ import annotations

from pact_nemo.config.schema import Config
from pact_nemo.policy.config import ADAPTER, LORA_MATRICES, MERGED
from pact_nemo.serving.adapters import AdapterRoom


def refit_kind(config: Config) -> str:
    """What a refit brings: ``adapter``, or ``merged``: the whole model, which it is without adapters, too."""
    return ADAPTER if config.policy.lora.rank and config.rollout.lora_refit == ADAPTER else MERGED


def adapter_room(config: Config) -> AdapterRoom | None:
    """What the servers are started with, so that a refit can bring adapters; None: it brings the whole model."""
    lora = config.policy.lora
    if refit_kind(config) == MERGED:
        return None
    return AdapterRoom(lora.rank, tuple(name for target in lora.targets for name in LORA_MATRICES[target]))
