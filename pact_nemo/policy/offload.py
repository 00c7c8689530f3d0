"""What a trainer holds between two updates, off its device and back, bit for bit.

Storages are moved, not tensors: every view of one (a parameter in megatron's buffer, a main weight, a bucket) stays the
object that it is. The gradients are dropped, because each backward pass begins with zeros.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

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


class Offload:
    """The memory of one rank's trainer, on its device or released.

    The copy on the host is made once, page-locked beside a GPU, and kept for the next time.

    Args:
        kept: tensors whose values come back. Those that share a storage move together.
        dropped: tensors whose values nobody reads after a restore; they are zeros then.
        stays: tensors whose storages don't move, also where ``kept`` or ``dropped`` has a view of them.
    """

    def __init__(
        self, kept: Iterable[torch.Tensor], dropped: Iterable[torch.Tensor], stays: Iterable[torch.Tensor] = ()
    ):
        own = {tensor.untyped_storage().data_ptr() for tensor in stays}
        drops, copies = _storages(dropped, own), _storages(kept, own)
        self._dropped = [_bytes_of(storage) for pointer, storage in drops.items() if pointer not in copies]
        self._copied = [_bytes_of(storage) for storage in copies.values()]
        self._host: list[torch.Tensor] | None = None  # blocks, filled one after another
        self.released = False

    @property
    def copied_bytes(self) -> int:
        return sum(view.numel() for view in self._copied)

    @property
    def dropped_bytes(self) -> int:
        return sum(view.numel() for view in self._dropped)

    def fingerprint(self) -> list[int]:
        """A sum over the bytes of each copied storage, by position: equal bits have equal sums."""
        sums = []
        for view in self._copied:
            words = view[: view.numel() // 8 * 8].view(torch.int64)
            sums.append(int(words.sum()) ^ int((words[::2] * 31).sum()) ^ int((words[::7] * 131).sum()))
        return sums

    @torch.no_grad()
    def release(self) -> Moved:
        """Copy to the host and give the device's memory back.

        Raises:
            RuntimeError: it is released already.
        """
        if self.released:
            raise RuntimeError("the trainer's memory is released already")
        start = time.perf_counter()
        if self._host is None:
            self._host = _host_memory(self.copied_bytes, locked=any(view.is_cuda for view in self._copied))
        for view, host in self._pairs():
            host.copy_(view, non_blocking=True)
        _synchronize(self._copied)
        for view in (*self._copied, *self._dropped):
            view.untyped_storage().resize_(0)
        if any(view.is_cuda for view in (*self._copied, *self._dropped)):
            torch.cuda.empty_cache()
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
        for view in (*self._copied, *self._dropped):
            view.untyped_storage().resize_(view.numel())
        for view, host in self._pairs():
            view.copy_(host, non_blocking=True)
        for view in self._dropped:
            view.zero_()
        _synchronize(self._copied)
        self.released = False
        return Moved(self.copied_bytes, self.dropped_bytes, time.perf_counter() - start)

    def _pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Every piece of the device's memory with its place on the host."""
        assert self._host is not None
        blocks = iter(self._host)
        room = next(blocks, torch.empty(0, dtype=torch.uint8))
        for view in self._copied:
            while view.numel():
                if not room.numel():
                    room = next(blocks)
                size = min(view.numel(), room.numel())
                yield view[:size], room[:size]
                view, room = view[size:], room[size:]


def trainer_memory(wrapped: list[Any], optimizer: Any, *, weights: bool) -> Offload:
    """What a policy's trainer can leave to others while nothing is trained: the optimizer's main weights and moments,
    the gradients, and the weights if asked for.

    Args:
        wrapped: megatron's DDP chunks.
        optimizer: megatron's chained optimizer over them.
        weights: the model's weights, too. Without them the policy can still score and export.
    """
    buffers = [buffer for chunk in wrapped for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    parameters = [parameter.data for chunk in wrapped for parameter in chunk.module.parameters()]
    kept = list(_optimizer_tensors(optimizer))
    return Offload(
        kept=[*kept, *parameters] if weights else kept,
        dropped=[buffer.grad_data for buffer in buffers],
        stays=() if weights else parameters,
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
