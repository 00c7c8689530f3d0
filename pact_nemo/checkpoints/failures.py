"""What a disk does wrong while a checkpoint or an export is written or deleted, as a CheckpointError: it names the file
and the remedy.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pact_nemo.errors import CheckpointError
from pact_nemo.runtime.files import disk_remedy

_STREAM_WRITER = (
    "PytorchStreamWriter",
    "inline_container",
    "iostream error",
)  # torch.save tells a full disk as a RuntimeError without a cause


@contextmanager
def naming_the_file(target: Path, action: str, consequence: str) -> Iterator[None]:
    """Turn failures of the disk within the block into CheckpointError; others pass as they are.

    Args:
        target: folder concerned, by the name that the user knows.
        action: what failed, e.g. ``can't be written``.
        consequence: end of the message: what stands in spite of it.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except FileExistsError:
        raise
    except (OSError, RuntimeError, CheckpointException) as error:
        cause = _of_the_disk(error)
        if cause is None:
            raise
        reason = str(cause).strip().splitlines()[-1:] or [repr(cause)]
        remedy = disk_remedy(cause) if isinstance(cause, OSError) else "free or repair the disk"
        raise CheckpointError(f"{target} {action} ({reason[0]}); {remedy}; {consequence}") from error


def delete_folder(folder: Path, consequence: str) -> None:
    """Delete a folder that others may be reading: it is renamed out of sight first, so that none is found half deleted.

    Args:
        consequence: see :func:`naming_the_file`.

    Raises:
        CheckpointError: it can't be deleted.
    """
    hidden = folder.with_name(f".{folder.name}.deleted")
    with naming_the_file(folder, "can't be deleted", consequence):
        shutil.rmtree(hidden, ignore_errors=True)
        folder.rename(hidden)
        shutil.rmtree(hidden)


def _of_the_disk(error: BaseException) -> BaseException | None:
    """The failure of the disk behind an exception; None where there is none."""
    from torch.distributed.checkpoint.api import CheckpointException

    seen: list[BaseException] = [error]
    for one in seen:
        if isinstance(one, OSError):
            return one
        behind = [one.__cause__, one.__context__]
        if isinstance(one, CheckpointException):
            behind += [failure[0] for failure in one.failures.values()]
        seen += [other for other in behind if other is not None and other not in seen]
    if any(isinstance(one, CheckpointException) or any(name in str(one) for name in _STREAM_WRITER) for one in seen):
        return error
    return None
