"""Failing together: what goes wrong on one rank is raised on all of them, so that none waits for ever."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist

from pact_nemo import errors
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


def on_rank_zero(action: Callable[[], T], *, otherwise: type[PactError] = PactError) -> T:
    """Run ``action`` on rank 0 and hand its result to every rank; its exception is raised on every rank, so that none
    waits for ever: on rank 0 as it is, elsewhere with its type and text.

    Args:
        otherwise: the type elsewhere of an exception that isn't this package's own.
    """
    if world_size() == 1:
        return action()
    message: list[Any] = [None, None]
    failure: BaseException | None = None
    if rank() == 0:
        try:
            message[0] = action()
        except Exception as error:  # re-raised below, after the others have heard of it
            failure, message[1] = error, (type(error).__name__, str(error))
    dist.broadcast_object_list(message, src=0)
    if failure is not None:
        raise failure
    if message[1] is not None:
        name, text = message[1]
        kind = getattr(errors, name, None)
        # the same type everywhere: who catches it on rank 0 catches it on all
        if isinstance(kind, type) and issubclass(kind, PactError):
            raise kind(f"rank 0: {text}")
        raise otherwise(f"rank 0 stopped with {name}: {text}")
    return cast(T, message[0])


def host() -> str:
    """Name of this machine, to tell the ranks of one node from those of others."""
    return socket.gethostname()
