"""The folders that checkpoints lie in: one a step, and a pointer to the one that was finished last."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

from pact_nemo.checkpoints.failures import delete_folder
from pact_nemo.checkpoints.resume_manifest import verify
from pact_nemo.errors import CheckpointError
from pact_nemo.runtime.files import remove_unfinished as remove_leftovers
from pact_nemo.runtime.files import write_text_atomic

logger = logging.getLogger(__name__)

POINTER_NAME = "latest"
_FOLDER = re.compile(r"step_(\d{6,})")


def checkpoint_path(root: str | Path, step: int) -> Path:
    """``<root>/step_{step:06d}``."""
    return Path(root) / f"step_{step:06d}"


def steps(root: str | Path) -> list[int]:
    """Steps of all visible checkpoints, ascending, whole or not; empty if ``root`` doesn't exist."""
    base = Path(root)
    matches = (_FOLDER.fullmatch(path.name) for path in base.iterdir()) if base.is_dir() else iter(())
    return sorted(int(match.group(1)) for match in matches if match)


def latest(root: str | Path) -> Path | None:
    """The checkpoint that was finished last, by its pointer; None if nothing was ever saved. It is verified when
    loaded.

    Raises:
        CheckpointError: the pointer names a folder that is gone, or is missing although there are checkpoints.
    """
    pointer = Path(root) / POINTER_NAME
    if not pointer.is_file():
        if steps(root):
            raise CheckpointError(
                f"{pointer} is missing although there are checkpoints; name one, or use the latest complete one"
            )
        return None
    name = pointer.read_bytes().decode("utf-8", "replace").strip()
    folder = Path(root) / name
    if not _FOLDER.fullmatch(name) or not folder.is_dir():
        raise CheckpointError(
            f"{pointer} names {name[:60]!r}, which is not there; name a checkpoint, or use the latest complete one"
        )
    return folder


def latest_complete(root: str | Path) -> Path | None:
    """The newest checkpoint that its manifest says is whole, whatever the pointer says; None if there is none. Refused
    ones are logged.
    """
    for step in reversed(steps(root)):
        folder = checkpoint_path(root, step)
        try:
            verify(folder)
        except CheckpointError as error:
            logger.warning("passing over %s: %s", folder, error)
        else:
            return folder
    return None


def read_state(folder: Path) -> dict[str, Any]:
    """``step`` and ``ranks`` of a whole checkpoint, and ``caller``: what the training loop keeps in it."""
    state: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return state


def point_to(folder: Path) -> None:
    """Make ``folder`` the one that was finished last (call on rank 0)."""
    write_text_atomic(folder.parent / POINTER_NAME, folder.name + "\n")


def remove_unfinished(root: str | Path) -> None:
    """Delete what saves that were cut off left under temporary names (call on rank 0 while nothing is being saved)."""
    remove_leftovers(root)
    for folder in Path(root).glob(".step_*.deleted"):
        shutil.rmtree(folder, ignore_errors=True)


def prune(root: str | Path, keep: int) -> list[int]:
    """Delete all but the ``keep`` newest checkpoints (call on rank 0). Returns the steps deleted, ascending.

    Nothing is deleted unless the newest one is whole: until then an older one is what a resume would go on from.

    Raises:
        CheckpointError: ``keep`` < 1; the newest checkpoint is not whole; or an old one can't be deleted.
    """
    if keep < 1:
        raise CheckpointError(f"keep={keep}: at least the newest checkpoint has to stay")
    found = steps(root)
    doomed = found[:-keep]
    if doomed:
        verify(checkpoint_path(root, found[-1]))
    for step in doomed:
        delete_folder(checkpoint_path(root, step), "newer checkpoints are whole")
    return doomed
