"""The other ranks of a rehearsed job: a process group that answers nothing, and pipeline stages whose rows have the
shape of this rank's own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

_new_group = dist.new_group


def join(rank: int, world: int) -> None:
    """Make this process rank ``rank`` of ``world``. A group of before is left."""
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())


def install() -> None:
    """Collectives of objects, which need no tensors, and groups of any backend."""

    def new_group(*args: Any, **kwargs: Any) -> Any:
        return _new_group(*args, **{**kwargs, "backend": "fake"})

    def all_gather_object(found: list[Any], value: Any, group: Any = None) -> None:
        found[:] = [value] * len(found)

    dist.new_group = torch.distributed.distributed_c10d.new_group = new_group
    dist.all_gather_object = all_gather_object
    dist.broadcast_object_list = lambda *args, **kwargs: None
    dist.barrier = lambda *args, **kwargs: None
    dist.monitored_barrier = lambda *args, **kwargs: None


def neighbours_send(shape: list[int]) -> None:
    """The pipeline stages before and after this one send rows and gradients of ``shape``."""
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    def shapes(
        self: Any, send_next: Any, send_prev: Any, recv_prev: bool, recv_next: bool
    ) -> tuple[list[int], list[int]]:
        nothing = [0, 0, 0]
        return (shape if recv_prev else nothing), (shape if recv_next else nothing)

    P2PCommunicator._communicate_shapes = shapes
