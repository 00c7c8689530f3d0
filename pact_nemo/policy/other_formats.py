"""Checkpoints that are no Hugging Face folder, told apart, each with the way to make one of it."""

from __future__ import annotations

from pathlib import Path

from pact_nemo.policy.model_source import RUN_CONFIG

_ITERATION = "iter_*"  #: folder of one save, in Megatron-Bridge's and Megatron-LM's checkpoints
_BRIDGE = (
    'from megatron.bridge import AutoBridge; AutoBridge.from_hf_pretrained("{like}").export_ckpt("{found}", "{out}")'
)
_LIKE = "HF folder or name of the same model"


def how_to_convert(path: Path) -> str | None:
    """What a path without ``config.json`` is, and how a Hugging Face folder is made of it; None for what is unknown.

    Args:
        path: of a folder or file, which may not exist.
    """
    out = f"{path.name}-hf"
    for root in (path, path.parent) if path.name in ("context", "weights") else (path,):
        if (root / "context").is_dir() and (root / "weights").is_dir():
            return _of_nemo_2(root)
    if path.suffix == ".nemo" and path.is_file():
        return (
            "it is a NeMo 1 archive. The scripts/checkpoint_converters of NeMo's releases before 2.0 make a Hugging"
            " Face folder of it"
        )
    saves = [path] if path.match(_ITERATION) else sorted(path.glob(_ITERATION)) if path.is_dir() else []
    if saves:
        run = _BRIDGE.format(like=_LIKE, found=saves[-1], out=out)
        if (saves[-1] / RUN_CONFIG).is_file():
            return f"it is a Megatron-Bridge checkpoint, which model.path takes. Python makes a folder of it: {run}"
        return f"it is a Megatron-LM checkpoint. Python makes a folder of it: {run}"
    if (path / "params.json").is_file() and any(path.glob("consolidated.*")):
        return (
            "these are weights as Meta or Mistral publish them. transformers' convert_llama_weights_to_hf.py makes a"
            " folder of them, or take the model's Hugging Face folder"
        )
    if path.suffix == ".gguf" or (path.is_dir() and any(path.glob("*.gguf"))):
        return "GGUF holds rounded weights for inference; take the folder that it was made of"
    return None


def _of_nemo_2(root: Path) -> str:
    """NeMo's connectors take no strings for paths. Of adapters alone they would export a base that was never loaded."""
    lead, merged = "In an environment with nemo_toolkit 2.x, Python makes a folder of it", root
    run = "from pathlib import Path; from nemo.collections import llm; "
    if adapters := (root / "weights" / "adapter_metadata.json").is_file():
        merged = Path(f"{root.name}-merged")
        run += f'llm.peft.merge_lora("{root}", "{merged}"); '
    run += f'llm.export_ckpt(path=Path("{merged}"), target="hf", output_path=Path("{root.name}-hf"))'
    return f"it is a NeMo 2 checkpoint{' of adapters alone' if adapters else ''}. {lead}: {run}"
