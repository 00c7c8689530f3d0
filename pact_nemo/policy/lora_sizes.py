"""Whether a model has places for the adapters that are asked for. Needs its sizes alone, so that a plan and a dry run
can ask.
"""

from __future__ import annotations

from typing import Protocol

from pact_nemo.policy.config import LoraConfig


class Sizes(Protocol):
    """Of a model, as Hugging Face names them; ``experts`` is 0 where it has none."""

    @property
    def hidden(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def intermediate(self) -> int: ...
    @property
    def experts(self) -> int: ...


def lora_problems(lora: LoraConfig, model: Sizes) -> list[str]:
    """Why a model has no place for these adapters; empty if it has, or there are none."""
    if not lora.rank:
        return []
    feed_forward = [name for name in lora.targets if name in ("linear_fc1", "linear_fc2")]
    if model.experts and feed_forward:
        return [
            f"policy.lora.targets holds {', '.join(feed_forward)}, which are experts in this model and get no"
            " adapter; set policy.lora.targets=[linear_qkv,linear_proj]"
        ]
    queries, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
    sizes = {
        "linear_qkv": min(queries + 2 * keys, model.hidden),
        "linear_proj": min(queries, model.hidden),
        "linear_fc1": min(2 * model.intermediate, model.hidden),
        "linear_fc2": min(model.intermediate, model.hidden),
    }
    return [
        f"policy.lora.rank={lora.rank} is above the rank that {name} itself can have, {sizes[name]}; lower it"
        for name in lora.targets
        if lora.rank > sizes[name]
    ]
