"""Versioned Hugging Face exports of a policy: what a rollout server reloads, and the final checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from pact_nemo.checkpoints.manifest import FileEntry, export_path, write_manifest
from pact_nemo.errors import CheckpointError
from pact_nemo.files import new_directory


class Exportable(Protocol):
    """A policy that can write its weights; collective, every rank returns the files that it wrote."""

    def export_hf(self, folder: str | Path, *, dtype: str = "bfloat16") -> dict[str, FileEntry]: ...


def export_to(policy: Exportable, folder: str | Path, *, version: int, dtype: str = "bfloat16", extra: dict[str, Any] | None = None) -> Path:
    """Write the policy's weights as a new HF ``folder`` with a manifest; visible only when whole. Collective; every rank writes and digests its
    share under a temporary name that rank 0 chooses, and rank 0 renames.

    Raises:
        CheckpointError: the export failed its checks or couldn't be written; on all ranks, and nothing is left.
        FileExistsError: the folder exists already (on rank 0).
    """
    with ExitStack() as stack:
        temporary = _from_rank_0(lambda: str(stack.enter_context(new_directory(folder))))
        own = policy.export_hf(temporary, dtype=dtype)
        everyone: list[Any] = [own]
        if dist.is_initialized():
            everyone = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, own)
        if _is_rank_0():
            write_manifest(temporary, version, {"dtype": dtype, **(extra or {})}, {k: entry for part in everyone for k, entry in part.items()})
    if dist.is_initialized():
        dist.barrier()
    return Path(folder)


def _is_rank_0() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _from_rank_0(make: Callable[[], str]) -> str:
    """What ``make`` gives on rank 0, on every rank; its failure is every rank's.

    Raises:
        CheckpointError: it failed on rank 0 (which raises the error itself).
    """
    box: list[Any] = [None, None]
    failure: BaseException | None = None
    if _is_rank_0():
        try:
            box[0] = make()
        except (OSError, CheckpointError) as error:
            failure, box[1] = error, str(error)
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    if failure is not None:
        raise failure
    if box[1] is not None:
        raise CheckpointError(box[1])
    return str(box[0])


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
