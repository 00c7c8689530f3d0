"""What adapters (``policy.lora``) mean for the rollout servers."""

from __future__ import annotations

from pact_nemo.config.schema import Config
from pact_nemo.policy.config import ADAPTER, LORA_MATRICES, MERGED
from pact_nemo.serving.adapters import AdapterRoom


def refit_kind(config: Config, *, cuda: bool) -> str:
    """What a refit brings: ``adapter``, or ``merged``: the whole model, which it is without adapters, too.

    Args:
        cuda: the servers are on GPUs. vLLM computes adapters slowly on a CPU (docs/reference/lora.md).
    """
    if not config.policy.lora.rank:
        return MERGED
    said = config.rollout.lora_refit
    return said if said is not None else ADAPTER if cuda else MERGED


def adapter_room(config: Config, *, cuda: bool) -> AdapterRoom | None:
    """What the servers are started with, so that a refit can bring adapters; None: it brings the whole model.

    Raises:
        ConfigError: vLLM takes no adapters of such a rank.
    """
    lora = config.policy.lora
    if refit_kind(config, cuda=cuda) == MERGED:
        return None
    return AdapterRoom(lora.rank, tuple(name for target in lora.targets for name in LORA_MATRICES[target]))
