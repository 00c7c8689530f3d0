"""Checkpoints to resume from: weights, optimizer, random-number state and the training loop's own state, under any
parallel layout.

``<root>/step_000012/`` holds ``weights/`` (megatron's torch_dist format), ``rng.json``, ``state.json`` and, written
last, ``manifest.json`` with the size and (but for large files of large checkpoints) SHA-256 of every file. The folder
appears in one rename; then ``<root>/latest`` is pointed at it. A folder that fails its manifest is refused. Falling
back to an older one is the caller's explicit choice: :func:`latest_complete`.
"""

from __future__ import annotations

import atexit
import inspect
import json
import logging
import multiprocessing
import os
import random
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from multiprocessing.context import ForkProcess
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist

from pact_nemo.checkpoints.failures import told
from pact_nemo.checkpoints.foreign import METADATA, check_weights
from pact_nemo.errors import CheckpointError
from pact_nemo.runtime import strict_json
from pact_nemo.runtime.collective import on_rank_zero
from pact_nemo.runtime.files import new_directory, sha256_file, stays_inside, write_json_atomic, write_text_atomic
from pact_nemo.runtime.files import remove_unfinished as remove_leftovers
from pact_nemo.runtime.machine import short_folder
from pact_nemo.runtime.orphans import leave_with

logger = logging.getLogger(__name__)

MANIFEST_NAME = "manifest.json"
POINTER_NAME = "latest"
RNG_NAME = "rng.json"
SCHEMA = 1
HASH_TOTAL = (
    8 << 30
)  # of a larger checkpoint, files above HASH_LIMIT are checked by size only: a resume must not read terabytes twice
HASH_LIMIT = 16 << 20
_WATCH_SECONDS = 0.2
_STANDS = "the previous checkpoint stands"
_FOLDER = re.compile(r"step_(\d{6,})")


class Resumable(Protocol):
    """What a policy must offer; all collective."""

    step: int

    def state_dict(self, *, is_loading: bool = False) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], *, step: int) -> None: ...


def checkpoint_path(root: str | Path, step: int) -> Path:
    """``<root>/step_{step:06d}``."""
    return Path(root) / f"step_{step:06d}"


def save(policy: Resumable, root: str | Path, state: dict[str, Any]) -> Path:
    """Write a checkpoint of ``policy`` at its current step. Collective; all ranks must see ``root``.

    Args:
        policy: the policy.
        root: folder of checkpoints.
        state: the training loop's state, JSON values; taken from rank 0.

    Returns:
        the folder, on every rank.

    Raises:
        CheckpointError: a checkpoint of this step exists already, or the disk refused (full, read-only, no permission,
            I/O): the message names the folder and the remedy, nothing of it is left behind, and older checkpoints
            stand.
    """
    return BackgroundSave(policy, root, state).finish()


def _free_path(policy: Resumable, root: str | Path) -> Path:
    final = checkpoint_path(root, policy.step)
    if on_rank_zero(final.exists):
        raise CheckpointError(
            f"{final} exists already; a checkpoint is written once: remove it or save to another root"
        )
    return final


def _write(policy: Resumable, folder: Path, state: dict[str, Any]) -> Any:
    """Fill a folder, but for the manifest and the weights. Returns megatron's request to write these."""
    from megatron.core import dist_checkpointing

    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, _rng_state())

    def prepare() -> None:
        (folder / "weights").mkdir()
        write_json_atomic(folder / RNG_NAME, states)
        write_json_atomic(folder / "state.json", {"step": policy.step, "ranks": dist.get_world_size(), "caller": state})

    on_rank_zero(prepare)
    _start_results_queue()
    options: dict[str, Any] = {"async_sharded_save": True}
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
        # megatron-core 0.19 would take NVIDIA's resiliency extension, which is for GPUs
        options["async_strategy"] = "mcore"
    request = dist_checkpointing.save(policy.state_dict(), str(folder / "weights"), **options)
    return request._replace(async_fn=partial(_watched, request.async_fn)) if request.async_fn is not None else request


def _start_results_queue() -> None:
    """Start the process through which writers hand over their results, as megatron does, but so that it leaves with
    this one: megatron's stays for ever, with everything it imported, when the trainer is killed."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is None:
        sockets = short_folder()  # the default is below TMPDIR, which may be too long for a socket
        atexit.register(shutil.rmtree, sockets, ignore_errors=True)
        manager = SyncManager(address=str(sockets / "results"), ctx=multiprocessing.get_context("spawn"))
        with _bare_children():
            manager.start(leave_with, (os.getpid(), str(sockets)))
        filesystem_async._results_queue = manager.Queue()


@contextmanager
def _bare_children() -> Iterator[None]:
    """Spawned processes don't import the main module, for which they would need seconds and some hundred MB, and only
    then look whether we live.
    """
    main = sys.modules["__main__"]
    hidden: dict[str, Any] = {name: vars(main)[name] for name in ("__file__", "__spec__") if name in vars(main)}
    vars(main).update(dict.fromkeys(hidden))
    try:
        yield
    finally:
        vars(main).update(hidden)


def _watched(write: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Runs in the process that megatron forks for a save, which forks one writer a file and waits for all of them: for
    ever, if one was killed.
    """
    writers: list[Any] = []
    start = ForkProcess.start

    def noted(process: Any) -> None:
        start(process)
        writers.append(process)

    def watch() -> None:
        while not any((writer.exitcode or 0) < 0 for writer in writers):
            time.sleep(_WATCH_SECONDS)
        os._exit(1)  # the trainer finds no results, and tells

    ForkProcess.start = noted  # type: ignore[assignment,method-assign] # of this process only
    threading.Thread(target=watch, name="checkpoint-writers", daemon=True).start()
    return write(*args, **kwargs)


def _publish(folder: Path, final: Path, stack: ExitStack) -> None:
    """Make a folder that is complete but for its manifest visible, then point ``latest`` at it. On rank 0."""
    _write_manifest(folder)
    stack.close()
    write_text_atomic(final.parent / POINTER_NAME, final.name + "\n")


class BackgroundSave:
    """A checkpoint that is written while training goes on, by one child process a rank.

    The child is forked when the object is made, after tensors on a GPU were copied to the host: it has the weights of
    that moment, whatever the trainer does to its own. The folder appears when :meth:`finish` has written the manifest;
    a trainer that dies before leaves nothing that could be taken for a checkpoint. Every method is collective.
    """

    def __init__(self, policy: Resumable, root: str | Path, state: dict[str, Any]):
        """As :func:`save`; returns as soon as the writers have started.

        Raises:
            CheckpointError: a checkpoint of this step exists already.
        """
        from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

        self.final = _free_path(policy, root)
        self._stack = ExitStack()
        self._queue = AsyncCallsQueue()
        with self._closed_on_error():
            self._folder = Path(on_rank_zero(lambda: str(self._stack.enter_context(new_directory(self.final)))))
            self._queue.schedule_async_request(_write(policy, self._folder, state))

    def finished(self) -> bool:
        """Whether the writers of all ranks have ended, well or not: :meth:`finish` then takes no time."""
        if self._queue.get_num_unfinalized_calls():
            with self._closed_on_error():
                self._queue.maybe_finalize_async_calls(blocking=False)
        return not self._queue.get_num_unfinalized_calls()

    def finish(self) -> Path:
        """Wait for the writers, then make the folder visible and point ``latest`` at it.

        Raises:
            CheckpointError: a writer failed or was killed (disk full, no permission, no memory); on all ranks, and
                nothing is left behind.
        """
        with self._closed_on_error():
            self._queue.maybe_finalize_async_calls(blocking=True)
            on_rank_zero(lambda: _publish(self._folder, self.final, self._stack))
        logger.info("saved %s", self.final)
        return self.final

    @contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        with told(self.final, "can't be written", _STANDS):
            try:
                yield
            except BaseException as error:
                self._queue.async_calls.clear()
                with suppress(type(error)):  # the folder's own exit removes it, then raises what it was given
                    self._stack.__exit__(type(error), error, error.__traceback__)
                raise


def load(policy: Resumable, folder: str | Path) -> dict[str, Any]:
    """Restore ``policy`` from a checkpoint that may come from another layout. Collective.

    Random-number states are restored per rank if the number of ranks is the same; otherwise every rank takes rank 0's.

    Returns:
        the ``state`` given to :func:`save`.

    Raises:
        CheckpointError: the checkpoint is torn or incomplete, or belongs to another model.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from torch.distributed.checkpoint.api import CheckpointException

    path = Path(folder)
    problem = None
    if dist.get_rank() == 0:
        try:
            verify(path)
        except CheckpointError as error:
            problem = str(error)
    problem = _from_rank_0(problem)
    if problem:
        raise CheckpointError(problem)
    facts = json.loads((path / "state.json").read_text(encoding="utf-8"))
    try:
        loaded = dist_checkpointing.load(policy.state_dict(is_loading=True), str(path / "weights"))
        policy.load_state_dict(loaded, step=int(facts["step"]))
    except (CheckpointException, CheckpointingException, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1:]
        raise CheckpointError(
            f"{path} doesn't fit this model {reason}; resume with the model and optimizer it was saved from"
        ) from error
    states = _read_rng_states(path)
    _set_rng_state(states[dist.get_rank() if len(states) == dist.get_world_size() else 0])
    caller: dict[str, Any] = facts["caller"]
    return caller


def verify(folder: str | Path) -> None:
    """Check a checkpoint against its manifest.

    Raises:
        CheckpointError: names the file concerned and the remedy.
    """
    base = Path(folder)
    remedy = "resume from an older checkpoint (checkpoints.resume.latest_complete finds it)"
    try:
        row = strict_json.loads((base / MANIFEST_NAME).read_bytes().decode("utf-8"))
        if row["schema"] != SCHEMA:
            raise CheckpointError(
                f"{base / MANIFEST_NAME}: schema {row['schema']!r}, this version reads {SCHEMA}; {remedy}"
            )
        files = {name: (int(entry["size"]), entry["sha256"]) for name, entry in row["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointError(
            f"{base / MANIFEST_NAME} is missing or unreadable ({error}): the checkpoint is incomplete; {remedy}"
        ) from error
    for name, (expected, digest) in files.items():
        if not stays_inside(base, name):
            raise CheckpointError(f"{base / MANIFEST_NAME} names {name!r}, which is not in that folder; {remedy}")
        path = base / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; {remedy}")
        size = path.stat().st_size
        if size != expected:
            raise CheckpointError(f"{path} has {size} bytes, the manifest says {expected}; {remedy}")
        if digest is not None and sha256_file(path) != digest:
            raise CheckpointError(f"{path} is corrupt: its SHA-256 differs from the manifest's; {remedy}")
    strays = sorted(
        {path.relative_to(base).as_posix() for path in base.rglob("*") if path.is_file()} - {*files, MANIFEST_NAME}
    )
    if strays:
        raise CheckpointError(
            f"{base / strays[0]} is not in the manifest: nothing unchecked is read; remove it, or {remedy}"
        )
    if (base / "weights" / METADATA).is_file():
        check_weights(base / "weights")


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
    """The newest checkpoint that passes :func:`verify`, whatever the pointer says; None if there is none. Refused ones
    are logged.
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


def remove_unfinished(root: str | Path) -> None:
    """Delete what saves that were cut off left under temporary names (call on rank 0 while nothing is being saved)."""
    remove_leftovers(root)
    for folder in Path(root).glob(".step_*.deleted"):
        shutil.rmtree(folder, ignore_errors=True)


def prune(root: str | Path, keep: int) -> list[int]:
    """Delete all but the ``keep`` newest checkpoints (call on rank 0). Returns the steps deleted, ascending.

    Nothing is deleted unless the newest one passes :func:`verify`: until then an older one is what a resume would go on
    from.

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
        folder = checkpoint_path(root, step)
        hidden = folder.with_name(f".{folder.name}.deleted")
        with told(folder, "can't be deleted", "newer checkpoints are whole"):
            shutil.rmtree(hidden, ignore_errors=True)
            folder.rename(hidden)
            shutil.rmtree(hidden)
    return doomed


def _write_manifest(base: Path) -> None:
    sizes = {path: path.stat().st_size for path in sorted(base.rglob("*")) if path.is_file()}
    limit = HASH_TOTAL if sum(sizes.values()) <= HASH_TOTAL else HASH_LIMIT
    files = {
        path.relative_to(base).as_posix(): {"size": size, "sha256": sha256_file(path) if size <= limit else None}
        for path, size in sizes.items()
    }
    write_json_atomic(base / MANIFEST_NAME, {"schema": SCHEMA, "files": files})


def _from_rank_0(value: Any) -> Any:
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _rng_state() -> dict[str, Any]:
    """This rank's random-number generators as JSON values, exact: whole numbers, bytes in hexadecimal, a float that
    reads back as it was.
    """
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [str(kind), [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
        "torch": _hex(torch.random.get_rng_state()),
        "cuda": _hex(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None,
    }


def _hex(state: torch.Tensor) -> str:
    return bytes(state.numpy()).hex()


def _from_hex(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def _read_rng_states(folder: Path) -> list[dict[str, Any]]:
    path = folder / RNG_NAME
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing: an earlier version of this program made that checkpoint; resume with that version, or"
            " start anew"
        )
    try:
        states: list[dict[str, Any]] = strict_json.loads(path.read_bytes().decode("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read ({error}); resume from an older checkpoint") from error
    return states


def _set_rng_state(state: dict[str, Any]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.random.set_rng_state(_from_hex(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_from_hex(state["cuda"]))
