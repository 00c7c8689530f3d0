"""Failing together: what goes wrong on one rank is raised on all of them, so that none waits for ever."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist

from pact_nemo.errors import CheckpointError, PactError

T = TypeVar("T")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value: T) -> list[T]:
    """Every rank's value, by rank; collective, so a barrier too."""
    if world_size() == 1:
        return [value]
    everyone: list[Any] = [None] * world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def raise_together(error: Exception | None) -> None:
    """Collective. Returns when no rank has an error.

    Raises:
        PactError: this rank's own, as it is.
        CheckpointError: this rank's own of another type, or the first failing rank's, by its text.
    """
    texts = gather(
        f"{error}"
        if isinstance(error, PactError)
        else f"{type(error).__name__}: {error}"
        if error is not None
        else None
    )
    failed = [(index, text) for index, text in enumerate(texts) if text is not None]
    if not failed:
        return
    if isinstance(error, PactError):
        raise error
    index, text = (rank(), texts[rank()]) if error is not None else failed[0]
    raise CheckpointError(f"rank {index}: {text}" if world_size() > 1 else str(text)) from error


def from_rank_zero(action: Callable[[], T]) -> T:
    """Run ``action`` on rank 0 and hand its result to every rank; its exception is raised on rank 0 as it is, elsewhere
    as CheckpointError.
    """
    result, error = None, None
    if rank() == 0:
        try:
            result = action()
        except Exception as caught:  # raised below, after the others have heard of it
            error = caught
    if world_size() > 1:
        message = [result, f"{type(error).__name__}: {error}" if error is not None else None]
        dist.broadcast_object_list(message, src=0)
        result, text = cast(Any, message)
        if text is not None and error is None:
            raise CheckpointError(f"rank 0: {text}")
    if error is not None:
        raise error
    return cast(T, result)


def host() -> str:
    """Name of this machine, to tell the ranks of one node from those of others."""
    return socket.gethostname()
