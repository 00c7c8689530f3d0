"""What a trainer holds between two updates, off its device and back, bit for bit.

Storages are moved, not tensors: every view of one (a parameter in megatron's buffer, a main weight, a bucket) stays the
object that it is. The gradients are dropped, because each backward pass writes zeros first.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from pact_nemo.policy.device import forget_pages, give_back_freed_memory

logger = logging.getLogger(__name__)

SMALLEST = 1 << 16  #: bytes; what is smaller stays where it is
BLOCK = 1 << 30  #: bytes of the host's memory taken at once


@dataclass(frozen=True)
class Moved:
    """One way of the move.

    Attributes:
        copied: bytes copied between device and host.
        dropped: bytes given back, or taken again, without a copy.
        seconds: wall time, the device synchronised before and after.
    """

    copied: int
    dropped: int
    seconds: float


class HostMemory:
    """Where a trainer's copy lies on the host: made as it is first needed, page-locked beside a GPU, kept for the next
    time. Making it takes longer than many copies into it.
    """

    def __init__(self) -> None:
        self._blocks: list[torch.Tensor] = []

    def blocks(self, size: int, *, locked: bool) -> list[torch.Tensor]:
        """Blocks of ``size`` bytes in all or more, [bytes] uint8 each; more of them are made where there are too few.

        Args:
            locked: page-locked, as far as the system allows.
        """
        missing = size - sum(block.numel() for block in self._blocks)
        if missing > 0:
            self._blocks += _host_memory(missing, locked=locked)
        return self._blocks


class Offload:
    """The memory of one rank's trainer, on its device or released.

    Args:
        kept: tensors whose values come back. Those that share a storage move together.
        dropped: tensors that are written before anybody reads them again; what is in them after a restore is undefined.
        stays: tensors whose storages don't move, also where ``kept`` or ``dropped`` has a view of them.
        host: of an earlier one, to be used again.

    Attributes:
        copied: the storages whose values come back, [bytes] uint8 each.
        released: whether the device's memory is given back.
    """

    def __init__(
        self,
        kept: Iterable[torch.Tensor],
        dropped: Iterable[torch.Tensor],
        stays: Iterable[torch.Tensor] = (),
        *,
        host: HostMemory | None = None,
    ):
        own = {tensor.untyped_storage().data_ptr() for tensor in stays}
        drops, copies = _storages(dropped, own), _storages(kept, own)
        self._dropped = [_bytes_of(storage) for pointer, storage in drops.items() if pointer not in copies]
        self.copied = [_bytes_of(storage) for storage in copies.values()]
        self._host = host if host is not None else HostMemory()
        self.released = False

    @property
    def copied_bytes(self) -> int:
        return sum(view.numel() for view in self.copied)

    @property
    def dropped_bytes(self) -> int:
        return sum(view.numel() for view in self._dropped)

    @torch.no_grad()
    def release(self) -> Moved:
        """Copy to the host and give the device's memory back.

        Raises:
            RuntimeError: it is released already.
        """
        if self.released:
            raise RuntimeError("the trainer's memory is released already")
        start = time.perf_counter()
        for view, host in self._pairs():
            host.copy_(view, non_blocking=True)
        _synchronize(self.copied)
        for view in (*self.copied, *self._dropped):
            if view.untyped_storage().resizable():
                view.untyped_storage().resize_(0)
            else:  # NumPy has had a view of it, as the export's writer has
                forget_pages(view.data_ptr(), view.numel())
        if any(view.is_cuda for view in (*self.copied, *self._dropped)):
            torch.cuda.empty_cache()
        else:
            give_back_freed_memory()
        self.released = True
        return Moved(self.copied_bytes, self.dropped_bytes, time.perf_counter() - start)

    @torch.no_grad()
    def restore(self) -> Moved:
        """Take the memory again and bring the values back.

        Raises:
            RuntimeError: nothing is released.
        """
        if not self.released:
            raise RuntimeError("the trainer's memory is not released")
        start = time.perf_counter()
        for view in (*self.copied, *self._dropped):
            if view.untyped_storage().resizable():
                view.untyped_storage().resize_(view.numel())
        for view, host in self._pairs():
            view.copy_(host, non_blocking=True)
        _synchronize(self.copied)
        self.released = False
        return Moved(self.copied_bytes, self.dropped_bytes, time.perf_counter() - start)

    def _pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Every piece of the device's memory with its place on the host."""
        blocks = iter(self._host.blocks(self.copied_bytes, locked=any(view.is_cuda for view in self.copied)))
        room = next(blocks, torch.empty(0, dtype=torch.uint8))
        for view in self.copied:
            while view.numel():
                if not room.numel():
                    room = next(blocks)
                size = min(view.numel(), room.numel())
                yield view[:size], room[:size]
                view, room = view[size:], room[size:]


def trainer_memory(wrapped: list[Any], optimizer: Any, *, weights: bool, host: HostMemory | None = None) -> Offload:
    """What a policy's trainer can leave to others while nothing is trained: the optimizer's main weights and moments,
    the gradients, and the weights if asked for. It is of now: the first update and a loaded checkpoint make moments.

    Args:
        wrapped: megatron's DDP chunks.
        optimizer: megatron's chained optimizer over them.
        weights: the model's weights, too. Without them the policy can still score and export.
        host: see :class:`Offload`.
    """
    buffers = [buffer for chunk in wrapped for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    parameters = [parameter.data for chunk in wrapped for parameter in chunk.module.parameters()]
    kept = list(_optimizer_tensors(optimizer))
    return Offload(
        kept=[*kept, *parameters] if weights else kept,
        dropped=[buffer.grad_data for buffer in buffers],
        stays=() if weights else parameters,
        host=host,
    )


def _optimizer_tensors(optimizer: Any) -> Iterator[torch.Tensor]:
    for part in optimizer.chained_optimizers:
        if getattr(part, "is_stub_optimizer", False):
            continue
        for group in part.optimizer.param_groups:
            yield from group["params"]
        for state in part.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def _storages(tensors: Iterable[torch.Tensor], without: set[int]) -> dict[int, torch.Tensor]:
    """A tensor of each storage that is large enough and not among ``without``, by its address."""
    found: dict[int, torch.Tensor] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() >= SMALLEST and storage.data_ptr() not in without:
            found.setdefault(storage.data_ptr(), tensor)
    return found


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The whole storage of ``tensor`` as bytes, [nbytes] uint8, sharing it."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())  # type: ignore[call-overload,no-any-return]


def _host_memory(size: int, *, locked: bool) -> list[torch.Tensor]:
    """Blocks of ``size`` bytes in all on the host, page-locked if asked for and allowed.

    Blocks of 2^30, for torch's allocator of page-locked memory rounds up to a power of two.
    """
    sizes = [BLOCK] * (size // BLOCK) + [size % BLOCK]
    try:
        return [torch.empty(part, dtype=torch.uint8, pin_memory=locked) for part in sizes if part]
    except RuntimeError as error:  # the system allows no more locked memory
        logger.warning("the trainer's copy on the host is in pageable memory, and slower: %s", error)
        return [torch.empty(part, dtype=torch.uint8) for part in sizes if part]


def _synchronize(views: list[torch.Tensor]) -> None:
    if any(view.is_cuda for view in views):
        torch.cuda.synchronize()
