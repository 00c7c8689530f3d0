"""What a rank trains and its optimizer as megatron's sharded state dict, which another layout can load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pact_nemo.errors import CheckpointError

if TYPE_CHECKING:
    from pact_nemo.policy.lora import Adapters

_FACTS = "adapters"  #: what a state of adapters belongs to


def sharded_state(
    chunks: list[Any], optimizer: Any, *, is_loading: bool, adapters: Adapters | None = None
) -> dict[str, Any]:
    """Weights, moments, main weights and Adam's step counters of this rank's chunks; collective.

    Args:
        chunks: this rank's model chunks.
        optimizer: megatron's optimizer over them.
        is_loading: the tensors are placeholders that are loaded into.
        adapters: where there are some, only they are trained, and the base isn't in the state.
    """
    metadata = {"distrib_optim_sharding_type": "fully_reshardable"}
    state: dict[str, Any] = {}
    for name, chunk in zip(_names(chunks), chunks, strict=True):
        whole = chunk.sharded_state_dict(metadata=metadata)
        state[name] = whole if adapters is None else {key: part for key, part in whole.items() if _is_adapters(key)}
    state["optimizer"] = optimizer.sharded_state_dict(dict(state), is_loading=is_loading, metadata=metadata)
    if adapters is not None and not is_loading:
        state[_FACTS] = adapters.facts
    return state


def check_facts(common: dict[str, Any], adapters: Adapters | None, where: str | Path) -> None:
    """Refuse a state that would mean something else here, before its tensors are loaded.

    Args:
        common: what of it isn't a tensor.
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: it is of adapters, and these are none, scaled differently or of another base; or the other way
            round. Names the setting.
    """
    found, ours = common.get(_FACTS), adapters.facts if adapters is not None else None
    if found is None or ours is None:
        if found is not None or ours is not None:
            kind, remedy = ("all weights", "0") if found is None else ("adapters", str(found["rank"]))
            raise CheckpointError(f"{where} holds {kind}; resume with policy.lora.rank={remedy}")
        return
    for key, value in ours.items():
        if found.get(key) == value:
            continue
        if key == "base":
            raise CheckpointError(
                f"{where}: its adapters were trained on other base weights than those of model.path; resume with the"
                " model that the run began with"
            )
        raise CheckpointError(
            f"{where} has policy.lora.{key}={found.get(key)}, this run {value}; resume with the checkpoint's"
        )


def load_sharded_state(
    chunks: list[Any], optimizer: Any, state: dict[str, Any], *, adapters: Adapters | None = None
) -> None:
    """Take over a state of :func:`sharded_state` that :func:`check_facts` has passed and whose tensors were loaded.

    Raises:
        CheckpointError: an adapter lacks its state.
    """
    for name, chunk in zip(_names(chunks), chunks, strict=True):
        left = chunk.load_state_dict(state[name], strict=adapters is None)
        lost = [key for key in left.missing_keys if _is_adapters(key)] + list(left.unexpected_keys)
        if lost:
            raise CheckpointError(f"the checkpoint and the adapters differ in {lost[0]}")
    optimizer.load_state_dict(state["optimizer"])


def sharded_weights(chunks: list[Any], *, layer_by_layer: bool = False) -> dict[str, Any]:
    """Weights alone of this rank's chunks, by the names that Megatron-LM, NeMo and Megatron-Bridge store them under;
    collective.

    Args:
        chunks: this rank's model chunks.
        layer_by_layer: a tensor for each layer, instead of one for a matrix of all layers.

    Returns:
        chunk -> its sharded state dict, where Transformer Engine's scales are objects beside the tensors.
    """
    metadata = {"singleton_local_shards": False, "non_homogeneous_layers": layer_by_layer}
    return {
        name: chunk.sharded_state_dict(metadata=metadata) for name, chunk in zip(_names(chunks), chunks, strict=True)
    }


def load_sharded_weights(chunks: list[Any], state: dict[str, Any]) -> None:
    """Take over a state of :func:`sharded_weights` whose tensors were loaded, whatever it lacks."""
    for name, chunk in zip(_names(chunks), chunks, strict=True):
        chunk.load_state_dict(state[name], strict=False)


def _is_adapters(key: str) -> bool:
    return ".adapter." in key


def _names(chunks: list[Any]) -> list[str]:
    return ["model"] if len(chunks) == 1 else [f"model{index}" for index in range(len(chunks))]
