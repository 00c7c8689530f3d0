"""Rank 0 talks to the world (server, environment, files); the other ranks receive what it learnt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist

from pact_nemo import errors
from pact_nemo.errors import PactError

T = TypeVar("T")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def on_rank_zero(action: Callable[[], T]) -> T:
    """Run ``action`` on rank 0 and hand its result to every rank; its exception is raised on every rank, so that none
    waits for ever.
    """
    if world_size() == 1:
        return action()
    message: list[Any] = [None, None]
    failure: BaseException | None = None
    if rank() == 0:
        try:
            message[0] = action()
        except Exception as error:  # re-raised below, on rank 0 as it was and elsewhere by its text
            failure, message[1] = error, (type(error).__name__, str(error))
    dist.broadcast_object_list(message, src=0)
    if failure is not None:
        raise failure
    if message[1] is not None:
        name, text = message[1]
        kind = getattr(errors, name, None)
        if isinstance(kind, type) and issubclass(
            kind, PactError
        ):  # the same type everywhere: who catches it on rank 0 catches it on all
            raise kind(f"rank 0: {text}")
        raise PactError(f"rank 0 stopped with {name}: {text}")
    return cast(T, message[0])
