"""An FP8 copy of a Hugging Face folder: what a rollout server starts from when its refits are FP8."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from blake3 import blake3
from safetensors import safe_open

from pact_nemo.checkpoints.manifest import verify_manifest, write_manifest
from pact_nemo.errors import CheckpointError
from pact_nemo.files import new_directory
from pact_nemo.policy.fp8_block import FP8_BLOCK
from pact_nemo.policy.hf_folder import write_folder_alone
from pact_nemo.tensor_files import TensorEntry, read_tensors

log = logging.getLogger(__name__)


def materialise_fp8(source: str | Path, cache_dir: str | Path) -> Path:
    """The folder under ``cache_dir`` that holds ``source`` in ``fp8_block``; converted tensor by tensor on the first call, verified and reused
    afterwards. A torn one is replaced; a changed source gets a new one.

    Raises:
        CheckpointError: ``source`` holds no safetensors weights.
    """
    base = Path(source).resolve()
    tensors = read_tensors(base)
    state = [(name, (base / name).stat().st_size, (base / name).stat().st_mtime_ns) for name in sorted({entry.file for entry in tensors.values()})]
    folder = Path(cache_dir) / f"{base.name}-{FP8_BLOCK}-{blake3(repr((str(base), state)).encode()).hexdigest()[:12]}"
    if folder.exists():
        try:
            verify_manifest(folder)
            return folder
        except CheckpointError as error:
            log.warning("the FP8 copy is made again: %s", error)
            shutil.rmtree(folder)
    shapes = {name: entry.shape for name, entry in tensors.items()}
    try:
        with new_directory(folder) as temporary:
            known = write_folder_alone(_read(base, tensors), base, temporary, FP8_BLOCK, shapes)
            write_manifest(temporary, 0, {"source": base.name, "dtype": FP8_BLOCK}, known=known)
    except OSError:
        if not folder.exists():  # unless another process finished the same copy first
            raise
        verify_manifest(folder)
    return folder


def _read(base: Path, tensors: dict[str, TensorEntry]) -> Iterator[tuple[str, torch.Tensor]]:
    for file in dict.fromkeys(entry.file for entry in tensors.values()):
        with safe_open(base / file, framework="pt") as handle:
            for name in (name for name, entry in tensors.items() if entry.file == file):
                yield name, handle.get_tensor(name)
