"""Checkpoints to resume from: weights, optimizer, random-number state and the training loop's own state, under any
parallel layout.

``<root>/step_000012/`` holds ``weights/`` (megatron's torch_dist format), ``rng.json``, ``state.json`` and, written
last, ``manifest.json`` with the size and (but for large files of large checkpoints) SHA-256 of every file. The folder
appears in one rename; then ``<root>/latest`` is pointed at it. A folder that fails its manifest is refused. Falling
back to an older one is the caller's explicit choice: :func:`~pact_nemo.checkpoints.resume_folders.latest_complete`.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from pact_nemo.checkpoints.failures import naming_the_file
from pact_nemo.checkpoints.random_state import RNG_NAME, read_rng_states, rng_state, set_rng_state
from pact_nemo.checkpoints.resume_folders import checkpoint_path, point_to, read_state
from pact_nemo.checkpoints.resume_manifest import verify, write_manifest
from pact_nemo.checkpoints.writer_processes import start_results_queue, watched
from pact_nemo.errors import CheckpointError
from pact_nemo.policy.sharded_state import check_facts
from pact_nemo.runtime.collective import on_rank_zero
from pact_nemo.runtime.files import new_directory, write_json_atomic

logger = logging.getLogger(__name__)

_STANDS = "the previous checkpoint stands"


class Resumable(Protocol):
    """What a policy must offer; all collective."""

    step: int
    adapters: Any  #: None where all weights are trained

    def state_dict(self, *, is_loading: bool = False) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], *, step: int) -> None: ...


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
    dist.all_gather_object(states, rng_state())

    def prepare() -> None:
        (folder / "weights").mkdir()
        write_json_atomic(folder / RNG_NAME, states)
        _write_state(folder, policy.step, state)

    on_rank_zero(prepare)
    start_results_queue()
    options: dict[str, Any] = {"async_sharded_save": True}
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
        # megatron-core 0.19 would take NVIDIA's resiliency extension, which is for GPUs
        options["async_strategy"] = "mcore"
    request = dist_checkpointing.save(policy.state_dict(), str(folder / "weights"), **options)
    return request._replace(async_fn=partial(watched, request.async_fn)) if request.async_fn is not None else request


def _write_state(folder: Path, step: int, state: dict[str, Any]) -> None:
    write_json_atomic(folder / "state.json", {"step": step, "ranks": dist.get_world_size(), "caller": state})


def _publish(folder: Path, final: Path, stack: ExitStack) -> None:
    """Make a folder that is complete but for its manifest visible, then point ``latest`` at it. On rank 0."""
    write_manifest(folder)
    stack.close()
    point_to(final)


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

        self.final, self._step = _free_path(policy, root), policy.step
        self._stack = ExitStack()
        self._queue = AsyncCallsQueue()
        with self._closed_on_error():
            self._folder = Path(on_rank_zero(lambda: str(self._stack.enter_context(new_directory(self.final)))))
            self._queue.schedule_async_request(_write(policy, self._folder, state))

    def renew(self, state: dict[str, Any]) -> None:
        """Replace the training loop's state with a later one of the same step.

        Raises:
            CheckpointError: it can't be written; on all ranks, and nothing is left behind.
        """
        with self._closed_on_error():
            on_rank_zero(lambda: _write_state(self._folder, self._step, state))

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
        with naming_the_file(self.final, "can't be written", _STANDS):
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
        CheckpointError: the checkpoint is torn or incomplete, or belongs to another model or other adapters.
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
    facts = read_state(path)
    try:
        check_facts(dist_checkpointing.load_common_state_dict(str(path / "weights")), policy.adapters, path)
        loaded = dist_checkpointing.load(policy.state_dict(is_loading=True), str(path / "weights"))
        policy.load_state_dict(loaded, step=int(facts["step"]))
    except (CheckpointException, CheckpointingException, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1:]
        raise CheckpointError(
            f"{path} doesn't fit this model {reason}; resume with the model and optimizer it was saved from"
        ) from error
    states = read_rng_states(path)
    set_rng_state(states[dist.get_rank() if len(states) == dist.get_world_size() else 0])
    caller: dict[str, Any] = facts["caller"]
    return caller


def _from_rank_0(value: Any) -> Any:
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
