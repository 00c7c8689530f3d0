"""Writing a policy's adapters as a folder in PEFT format, which ``peft`` and ``vllm serve --lora-modules`` load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save_file

from pact_nemo.runtime.collective import on_rank_zero
from pact_nemo.runtime.files import write_json_atomic

if TYPE_CHECKING:
    from pact_nemo.policy.lora import Adapters

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"


def write_adapter(adapters: Adapters, base: str | Path, folder: str | Path) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``. Collective; rank 0 writes.

    Args:
        adapters: of a policy.
        base: the model that they belong to, as the configuration names it.
        folder: an existing folder.
    """
    tensors = adapters.peft_tensors()

    def write() -> None:
        save_file(tensors, Path(folder) / WEIGHTS_NAME, metadata={"format": "pt"})
        write_json_atomic(Path(folder) / CONFIG_NAME, adapters.peft_config(str(base)))

    on_rank_zero(write)
