"""Versioned Hugging Face exports of a policy: what a rollout server reloads, and the final checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from pact_nemo.checkpoints.adapter_exports import PEFT_FACTS
from pact_nemo.checkpoints.failures import naming_the_file
from pact_nemo.checkpoints.manifest import export_path, read_manifest, versions, write_manifest
from pact_nemo.errors import CheckpointError
from pact_nemo.policy.config import ADAPTER, MERGED
from pact_nemo.runtime.collective import on_rank_zero
from pact_nemo.runtime.digests import FileEntry
from pact_nemo.runtime.files import new_directory

logger = logging.getLogger(__name__)

#: a merged export's manifest: share of the adapters' change that its weights have
CHANGE_KEPT = "adapter_change_kept"

#: facts for the manifest, and digests of the files that the writers know from memory
Written = tuple[dict[str, Any], dict[str, FileEntry]]


class Exportable(Protocol):
    """A policy that can write its weights; collective. It returns the digests of what it wrote."""

    def export_hf(
        self, folder: str | Path, *, dtype: str = "bfloat16", previous: tuple[Path, dict[str, FileEntry]] | None = None
    ) -> dict[str, FileEntry]: ...


def export_to(
    policy: Exportable,
    folder: str | Path,
    *,
    version: int,
    dtype: str = "bfloat16",
    extra: dict[str, Any] | None = None,
    previous: str | Path | None = None,
) -> Path:
    """Write the policy's weights as a new HF ``folder`` with a manifest; visible only when whole. Collective: every
    rank that sees the folder's disk writes its part, rank 0 the rest.

    Args:
        previous: export of an earlier version on the same disk, of the same dtype: weight files that come out equal are
            linked to its own.

    Raises:
        CheckpointError: on all ranks: the export failed its checks or a rank could not write (the message names file
            and remedy). Nothing is left behind.
        FileExistsError: the folder exists already (CheckpointError on ranks other than 0).
    """

    def write(temporary: Path) -> Written:
        known = policy.export_hf(temporary, dtype=dtype, previous=_entries(previous))
        return {"dtype": dtype, **_change_kept(policy, dtype), **(extra or {})}, known

    return _publish(Path(folder), version, write)


@runtime_checkable
class HasAdapters(Protocol):
    """A policy that can write its adapters alone; collective. It returns what they have to be loaded onto.

    Attributes:
        adapters: None where all weights are trained.
        weight_dtype: of the frozen weights.
    """

    adapters: Any

    @property
    def weight_dtype(self) -> str: ...

    def export_adapter(self, folder: str | Path) -> dict[str, Any]: ...


def export_adapter_to(policy: HasAdapters, folder: str | Path, *, version: int) -> Path:
    """Write the policy's adapters as a new ``folder`` in PEFT format with a manifest; visible only when whole.
    Collective.

    Raises:
        CheckpointError: on all ranks: the disk refused (the message names file and remedy). Nothing is left behind.
        FileExistsError: the folder exists already (CheckpointError on ranks other than 0).
    """
    return _publish(Path(folder), version, lambda temporary: ({**PEFT_FACTS, **policy.export_adapter(temporary)}, {}))


def _publish(target: Path, version: int, write: Callable[[Path], Written]) -> Path:
    """A new folder with what ``write`` puts there and a manifest; visible only when whole. Collective."""
    with naming_the_file(target, "can't be written", "nothing of it became visible"), ExitStack() as stack:
        temporary = Path(on_rank_zero(lambda: str(stack.enter_context(new_directory(target)))))
        facts, known = write(temporary)

        def publish() -> None:
            write_manifest(temporary, version, facts, known=known)
            stack.close()

        on_rank_zero(publish)
    return target


def export_version(
    policy: Exportable,
    root: str | Path,
    version: int,
    *,
    kind: str = MERGED,
    dtype: str = "bfloat16",
    extra: dict[str, Any] | None = None,
) -> Path:
    """Write the policy as ``<root>/v{version:06d}`` with a manifest; visible only when whole. Collective.

    Args:
        policy: the policy.
        root: folder of versions.
        version: weight version, the optimizer step in training.
        kind: ``merged``: its weights; ``adapter``: its adapters alone, in its own dtype.
        dtype: of the weights.
        extra: facts for the manifest.

    Returns:
        the folder, on every rank.

    Raises:
        CheckpointError: that version exists already, or the export failed its checks; on all ranks.
    """
    folder = export_path(root, version)

    def before() -> str | None:
        if folder.exists():
            raise CheckpointError(f"{folder} exists already; a version is exported once")
        earlier = [number for number in versions(root) if number < version]
        return str(export_path(root, earlier[-1])) if earlier else None

    previous = on_rank_zero(before)
    if kind == ADAPTER:
        assert isinstance(policy, HasAdapters)
        return export_adapter_to(policy, folder, version=version)
    return export_to(policy, folder, version=version, dtype=dtype, extra=extra, previous=previous)


def _change_kept(policy: Exportable, dtype: str) -> dict[str, float]:
    """What is known of an export in the policy's own dtype; of another it isn't counted. Collective."""
    if not isinstance(policy, HasAdapters) or policy.adapters is None or policy.weight_dtype != dtype:
        return {}
    return {CHANGE_KEPT: policy.adapters.kept()}


def _entries(folder: str | Path | None) -> tuple[Path, dict[str, FileEntry]] | None:
    """What an earlier export holds; None where there is none or this rank can't tell."""
    if folder is None:
        return None
    try:
        return Path(folder), read_manifest(folder).files
    except CheckpointError as error:
        logger.info("nothing is linked: %s", error)
        return None
