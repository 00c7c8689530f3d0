"""The process of a rehearsal (``pact_nemo/rehearsal/rank.py``) with a fault in the project's own code, another one for
each case. Their names are in ``PACT_TEST_BREAKS``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

from pact_nemo.rehearsal import guard, rank


def fault(name: str) -> Any:
    """A context in which the fault is there."""
    import torch

    from pact_nemo.policy import attention, fused

    if name == "device":  # what turns the queries stays on the host
        turn = attention.rotate
        return mock.patch.object(attention, "rotate", lambda x, cosine, sine: turn(x, cosine.cpu(), sine))
    if name == "shape":  # a norm of another width
        norm = fused.rms_norm
        return mock.patch.object(fused, "rms_norm", lambda x, weight, eps: norm(x, weight[1:], eps))
    if name == "read":  # a number is read back in every layer
        forward = attention.TreeCoreAttention.forward

        def reading(self: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            assert float(query.sum()) is not None
            return forward(self, query, *args, **kwargs)

        return mock.patch.object(attention.TreeCoreAttention, "forward", reading)
    raise ValueError(name)


def main() -> int:
    names = iter(os.environ["PACT_TEST_BREAKS"].split(","))
    install = guard.install

    def installing(held: Any) -> None:
        install(held)
        from pact_nemo.rehearsal import cuda

        cuda.pretend_cuda = breaking(cuda.pretend_cuda, names)

    guard.install = installing
    return rank.main()


def breaking(pretend: Callable[..., None], names: Any) -> Callable[..., None]:
    """``pretend_cuda``, after which every case is played with the next fault."""

    def pretending(**words: Any) -> None:
        pretend(**words)
        from pact_nemo.rehearsal import play as module

        play = module.play

        def broken(case: Any) -> Any:
            with fault(next(names)):
                return play(case)

        module.play = broken

    return pretending


if __name__ == "__main__":
    sys.exit(main())
