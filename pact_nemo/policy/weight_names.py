"""Names of a folder's tensors that are not those of its model: what they are a sign of, and what to do."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from pact_nemo.errors import CheckpointError
from pact_nemo.policy.architectures import Architecture
from pact_nemo.policy.expected_weights import EMBEDDING, HEAD, Shapes
from pact_nemo.runtime.tensor_files import TensorEntry

#: prefixes that wrappers leave on every name
_WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "module.": "DistributedDataParallel or DeepSpeed",
    "base_model.model.": "PEFT",
    "language_model.": "a multimodal model",
    "model.language_model.": "a multimodal model",
    "actor_module.": "a trainer",
    "policy.": "a trainer",
    "transformer.": "another model class",
}
#: what a tensor that the model doesn't have is a sign of, and what to do
_SIGNS: tuple[tuple[str, str], ...] = (
    (
        r"lora_|\.adapter|modules_to_save",
        "it belongs to a LoRA adapter; merge that into the weights (merge_and_unload) and save the model",
    ),
    (
        r"weight_scale_inv$",
        (
            "it holds scales of an FP8 weight, which need a quantization_config in config.json and an FP8 weight of"
            " their name"
        ),
    ),
    (
        r"qweight|qzeros|g_idx|\.scales$|absmax|quant_map|quant_state|\.SCB$|weight_format|weight_(?:packed|shape|zero_point|scale)|input_scale",
        "it is part of a quantised weight; give a folder of the unquantised weights",
    ),
    (
        r"(?:^|\.)(?:v_head|value_head|score|classifier|reward_head|critic)\b",
        "it is a value or reward head; save the language model without it",
    ),
    (
        r"(?:^|\.)mtp|eh_proj|enorm|hnorm|shared_head|medusa|eagle",
        "it is for predicting several tokens at once, which is not trained; take it out",
    ),
    (
        r"vision|visual|image|audio|multi_modal|mm_projector",
        "it is part of a multimodal model; give its language model alone",
    ),
    (
        r"\.bias$",
        (
            "this configuration has no such bias; see attention_bias and mlp_bias in config.json, or take another"
            " model_type"
        ),
    ),
    (r"\.experts\.|shared_expert|mlp\.gate\.", "this configuration has no such expert; see num_experts in config.json"),
)


def check_prefixes(base: Path, expected: Iterable[str], held: dict[str, TensorEntry]) -> None:
    """Refuse a folder whose names all carry a prefix too many, or lack theirs: transformers loads some of these,
    servers don't.

    Raises:
        CheckpointError: names the tensor, its file and the wrapper that leaves such a prefix.
    """
    if EMBEDDING in held:
        return
    bare = EMBEDDING.removeprefix("model.")
    found = next((name for name in held if name == bare or name.endswith(f".{bare}")), None)
    if found is None:
        return
    got = found.removesuffix(bare)
    if not got:
        raise CheckpointError(
            f"{base / held[found].file}: {found} should be {EMBEDDING}: the folder was saved from the base model,"
            " without 'model.'; load it with AutoModelForCausalLM and save that"
        )
    wrapper = next((f" ({source} leaves it)" for prefix, source in _WRAPPERS.items() if got.startswith(prefix)), "")
    raise CheckpointError(
        f"{base / held[found].file}: {found} should be {EMBEDDING}: names begin with {got!r} instead of"
        f" 'model.'{wrapper}; save the unwrapped model"
    )


def check_names(
    base: Path, model: Architecture, expected: Shapes, held: dict[str, TensorEntry], known: set[str]
) -> None:
    """Refuse a folder that lacks a weight of its model, or has a tensor beyond it.

    Args:
        base: the folder.
        model: that it is of.
        expected: weight -> shape.
        held: tensor -> where it is stored.
        known: names that belong to the model: weights and what goes with them.

    Raises:
        CheckpointError: names the tensor, its file and the likely cause.
    """
    strange = next((name for name in held if name not in known), None)
    missing = next((name for name in expected if name not in held), None)
    if missing is not None:
        files = sorted({entry.file for entry in held.values()})
        where = base / files[0] if len(files) == 1 else base
        also = f"; it holds {strange}, which is none of the model's: was it renamed?" if strange is not None else ""
        tied = (
            "; where the head is the embedding, set tie_word_embeddings to true in config.json"
            if missing == HEAD
            else ""
        )
        raise CheckpointError(
            f"{where} lacks {missing} {list(expected[missing])}, which config.json ({model.family}) asks"
            f" for{tied}{also}; export the whole model again"
        )
    if strange is not None:
        raise CheckpointError(
            f"{base / held[strange].file}: {strange} is no weight of this {model.family}: {_sign(strange, model)}"
        )


def _sign(name: str, model: Architecture) -> str:
    layer = re.search(r"\.layers\.(\d+)\.", name)
    if layer is not None and int(layer[1]) >= model.layers:
        return (
            f"it belongs to a layer beyond num_hidden_layers={model.layers} (does that predict several tokens at"
            " once?); take it out"
        )
    if name == HEAD:
        return (
            "with tie_word_embeddings=true the head is the embedding, and this one has another shape; take it out or"
            " set the flag to false"
        )
    return next(
        (sign for pattern, sign in _SIGNS if re.search(pattern, name)), "nothing reads it; take it out of the folder"
    )
