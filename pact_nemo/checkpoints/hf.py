"""Versioned Hugging Face exports of a policy: what a rollout server reloads, and the final checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from pact_nemo.checkpoints.manifest import export_path, write_manifest
from pact_nemo.errors import CheckpointError
from pact_nemo.files import new_directory


class Exportable(Protocol):
    """A policy that can write its weights; collective."""

    def export_hf(self, folder: str | Path, *, dtype: str = "bfloat16") -> None: ...


def export_to(policy: Exportable, folder: str | Path, *, version: int, dtype: str = "bfloat16", extra: dict[str, Any] | None = None) -> Path:
    """Write the policy's weights as a new HF ``folder`` with a manifest; visible only when whole. Collective; rank 0 writes.

    Raises:
        CheckpointError: the export failed its checks.
        FileExistsError: the folder exists already.
    """
    if not dist.is_initialized() or dist.get_rank() == 0:
        with new_directory(folder) as temporary:
            policy.export_hf(temporary, dtype=dtype)
            write_manifest(temporary, version, {"dtype": dtype, **(extra or {})})
    else:
        policy.export_hf(folder, dtype=dtype)
    if dist.is_initialized():
        dist.barrier()
    return Path(folder)


def export_version(policy: Exportable, root: str | Path, version: int, *, dtype: str = "bfloat16", extra: dict[str, Any] | None = None) -> Path:
    """Write the policy's weights as ``<root>/v{version:06d}`` with a manifest; visible only when whole. Collective; rank 0 writes.

    Args:
        policy: the policy.
        root: folder of versions.
        version: weight version, the optimizer step in training.
        dtype: of the weights.
        extra: facts for the manifest.

    Returns:
        the folder, on every rank.

    Raises:
        CheckpointError: that version exists already, or the export failed its checks.
    """
    folder = export_path(root, version)
    if folder.exists():
        raise CheckpointError(f"{folder} exists already; a version is exported once")
    return export_to(policy, folder, version=version, dtype=dtype, extra=extra)
