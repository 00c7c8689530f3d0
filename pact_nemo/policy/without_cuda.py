"""megatron-core without CUDA: what it asks of CUDA is answered by the CPU.

megatron-core names CUDA in a few places: ``torch.cuda.current_device()``, ``device="cuda"`` literals,
``Tensor.cuda()``, streams and events, CUDA random-number state, and dtype tests by ``Tensor.type()`` string. On a
machine without CUDA :func:`install_cpu_redirection` sends these to the CPU. It must run before megatron is imported;
with CUDA it does nothing at all. :data:`REDIRECTED` counts what was sent elsewhere, so that a test shows which of them
a given megatron-core version uses.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from pact_nemo.policy.device import CPU, use_cuda

REDIRECTED: collections.Counter[str] = collections.Counter()
_FACTORIES = (
    "zeros",
    "ones",
    "empty",
    "full",
    "tensor",
    "arange",
    "rand",
    "randn",
    "randint",
    "linspace",
    "eye",
    "as_tensor",
    "zeros_like",
    "ones_like",
    "empty_like",
    "full_like",
)
_installed = False


class NullStream:
    """Stands for a CUDA stream or event where there is nothing to wait for."""

    device = CPU

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __enter__(self) -> NullStream:
        return self

    def __exit__(self, *exc: object) -> None: ...

    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def record_event(self, event: Any = None) -> NullStream:
        return self

    def synchronize(self) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0


def install_cpu_redirection() -> bool:
    """Redirect CUDA calls to the CPU where CUDA is absent. (Random-number state follows when megatron is imported.)

    Returns:
        True if the redirection is in place (now or from before), False with CUDA (nothing was touched).
    """
    global _installed
    if use_cuda():
        return False
    if not _installed:
        _redirect_cuda_module()
        _redirect_factories()
        _redirect_tensor_methods()
        _installed = True
    return True


def _redirect_cuda_module() -> None:
    """``torch.cuda.*`` functions that ask where tensors live, wait for the device, or mark ranges for a profiler."""

    def answer(name: str, make: Callable[[], Any]) -> None:
        def redirected(*args: Any, **kwargs: Any) -> Any:
            REDIRECTED[f"torch.cuda.{name}"] += 1
            return make()

        setattr(torch.cuda, name, redirected)

    answer("current_device", lambda: CPU)
    answer("device_count", lambda: 0)
    answer("get_device_capability", lambda: (0, 0))
    for name in ("synchronize", "empty_cache", "set_device"):
        answer(name, lambda: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        answer(name, lambda: 0)
    for name in ("current_stream", "default_stream"):
        answer(name, NullStream)
    answer("stream", contextlib.nullcontext)
    torch.cuda.Stream = NullStream  # type: ignore[misc,assignment]
    torch.cuda.Event = NullStream  # type: ignore[misc,assignment]
    nvtx = types.ModuleType("torch.cuda.nvtx")
    for name in ("range_push", "range_pop", "mark"):
        setattr(nvtx, name, lambda *args, **kwargs: None)
    nvtx.range = lambda *args, **kwargs: contextlib.nullcontext()  # type: ignore[attr-defined]
    torch.cuda.nvtx = nvtx  # type: ignore[assignment]
    sys.modules["torch.cuda.nvtx"] = nvtx


def _names_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _redirect_factories() -> None:
    """``device="cuda"`` literals and pinned memory in tensor factories."""
    from torch.utils._device import _device_constructors

    _device_constructors()  # caches the original factories, so that `with torch.device(...)` keeps working

    def wrap(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def redirected(*args: Any, **kwargs: Any) -> Any:
            if _names_cuda(kwargs.get("device")):
                REDIRECTED[f"torch.{name}"] += 1
                kwargs["device"] = CPU
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
            return function(*args, **kwargs)

        return redirected

    for name in _FACTORIES:
        setattr(torch, name, wrap(getattr(torch, name), name))


def _redirect_tensor_methods() -> None:
    """``Tensor.cuda()``, ``Tensor.to("cuda")``, ``Module.cuda()`` and the ``Tensor.type()`` strings that megatron
    compares with.
    """
    original_to, original_type = torch.Tensor.to, torch.Tensor.type

    def cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        REDIRECTED["Tensor.cuda"] += 1
        return self

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _names_cuda(args[0]):
            REDIRECTED["Tensor.to"] += 1
            args = (CPU, *args[1:])
        if _names_cuda(kwargs.get("device")):
            REDIRECTED["Tensor.to"] += 1
            kwargs["device"] = CPU
        return original_to(self, *args, **kwargs)

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original_type(self, *args, **kwargs)
        asks = not args and not kwargs and result.startswith("torch.") and not result.startswith("torch.cuda")
        if asks and "megatron" in sys._getframe(1).f_code.co_filename:
            REDIRECTED["Tensor.type"] += 1
            return "torch.cuda." + result.removeprefix("torch.")
        return result

    torch.Tensor.cuda = cuda  # type: ignore[method-assign,assignment]
    torch.Tensor.to = to  # type: ignore[method-assign,assignment]
    torch.Tensor.type = type_  # type: ignore[method-assign,assignment]
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign,assignment]


def redirect_rng_state() -> None:
    """CUDA random-number state: the default CPU generator stands in for it. Once megatron-core is imported."""
    from megatron.core.tensor_parallel import random as megatron_random

    def get_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        REDIRECTED["torch.cuda.get_rng_state"] += 1
        return torch.random.get_rng_state()

    def set_state(new_state: torch.Tensor, device: Any = None, graph_safe: bool = False) -> None:
        REDIRECTED["torch.cuda.set_rng_state"] += 1
        torch.random.set_rng_state(new_state)

    def manual_seed(seed: int) -> None:
        REDIRECTED["torch.cuda.manual_seed"] += 1
        torch.random.default_generator.manual_seed(int(seed))

    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state = get_state  # type: ignore[assignment]
        module.set_rng_state = set_state  # type: ignore[assignment]
        module.manual_seed = manual_seed  # type: ignore[assignment]
    megatron_random._get_cuda_rng_state = get_state
    megatron_random._set_cuda_rng_state = set_state


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """``torch.compile`` as a no-op while megatron-core is imported: its fused elementwise kernels stay plain functions
    on the CPU.

    Narrower than switching off dynamo: other users of ``torch.compile`` in this process are left alone.
    """
    original = torch.compile
    torch.compile = lambda model=None, *args, **kwargs: model if model is not None else (lambda function: function)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = original
