"""Fake tensors under observation: living bytes of the GPU and their peak, and every number that the host reads back."""

from __future__ import annotations

import functools
import math
import sys
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

BLOCK = 512  # torch's allocator on CUDA rounds up to this
READS: Counter[str] = Counter()  #: lines that read a number back from the GPU -> how often
SELECTED: list[int] = []  #: elements that a mask selects, where something knows it (:mod:`pact_nemo.rehearsal.experts`)
_ROOT = str(Path(__file__).resolve().parents[2])
_ASYNCHRONOUS = (
    torch.ops.c10d.reduce_scatter_tensor_coalesced_.default,
    torch.ops.c10d.allgather_into_tensor_coalesced_.default,
)


class Mode(FakeTensorMode):
    """Fake tensors whose numbers, read back to the host, are 1. Reads of GPU tensors are counted by the line of code
    that asks.

    Tensors of two devices in one operation raise, as they do on a GPU.
    """

    avoid_device_init = True  # torch.tensor(..., device="cuda") is made on the host and moved

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and getattr(args[0], "constant", None) is None:
            if not isinstance(args[0], FakeTensor):
                with unset_fake_temporarily():
                    return func(*args)
            if _on_gpu(args[0]):
                READS[asking_line()] += 1
            return 1.0 if args[0].dtype.is_floating_point else True if args[0].dtype is torch.bool else 1
        if func is torch.ops.aten.masked_select.default and SELECTED and _on_gpu(args[0]):
            return args[0].new_empty(SELECTED[0])
        if func in _ASYNCHRONOUS:  # torch's fake process group has no meta kernel for them
            from torch._C._distributed_c10d import FakeWork

            return FakeWork().boxed()
        return super().__torch_dispatch__(func, types, args, kwargs)


def even_counts(shape: tuple[int, ...]) -> torch.Tensor:
    """Integers of ``shape``, as equal as can be, that add up to the elements that are selected."""
    found = torch.full(shape, SELECTED[0] // max(1, math.prod(shape)), dtype=torch.int64)
    found.view(-1)[: SELECTED[0] % max(1, math.prod(shape))] += 1
    return found


def _on_gpu(tensor: Any) -> bool:
    return isinstance(tensor, FakeTensor) and tensor.fake_device.type == "cuda"


def read_lists() -> None:
    """``torch.tensor([tensor, ...])`` and ``Tensor.tolist()`` read tensors below where modes can see it. Integers
    that are not known are counts of routed tokens.
    """
    original, to_list = torch.tensor, torch.Tensor.tolist

    def tolist(self: torch.Tensor) -> Any:
        fake = isinstance(self, FakeTensor)
        if _on_gpu(self):
            READS[asking_line()] += 1
        with unset_fake_temporarily():
            if fake and SELECTED and not self.dtype.is_floating_point:
                return to_list(even_counts(tuple(self.shape)))
            return to_list(torch.ones(tuple(self.shape), dtype=self.dtype) if fake else self)

    torch.Tensor.tolist = FakeTensor.tolist = tolist  # type: ignore[method-assign]

    def tensor(data: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        def numbers(value: Any) -> Any:
            if isinstance(value, FakeTensor) and value.numel() == 1:
                return value.item()
            return [numbers(each) for each in value] if isinstance(value, (list, tuple)) else value

        return original(numbers(data) if isinstance(data, (list, tuple)) else data, *args, **kwargs)

    torch.tensor = tensor


def asking_line() -> str:
    """File and line of the nearest caller that is neither torch nor the rehearsal."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/torch/" not in name and not name.startswith(str(Path(__file__).parent)):
            short = name.split("site-packages/")[-1].removeprefix(f"{_ROOT}/")
            return f"{short}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


_COMPILED: list[Any] = []  #: functions at work whose operations are one kernel


def compiled(function: Any) -> Any:
    """In place of ``torch.compile``: the function as it is, and of its tensors only the results are memory."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        _COMPILED.append(function)
        try:
            found = function(*args, **kwargs)
        finally:
            _COMPILED.pop()
        for memory in Memory.watching:
            for tensor in tree_leaves(found):
                memory.add(tensor)
        return found

    return run


class Memory(TorchDispatchMode):
    """Bytes of living storages on the GPU.

    Attributes:
        now: of all that live.
        peak: the largest sum since :meth:`forget_peak`.
        operations: how many were dispatched, by name.
    """

    watching: list[Memory] = []  #: those that are entered

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.operations: Counter[str] = Counter()
        self._known: Any = WeakIdKeyDictionary()

    def forget_peak(self) -> None:
        self.peak = self.now
        self.operations.clear()

    def __enter__(self) -> Any:
        Memory.watching.append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        Memory.watching.remove(self)
        super().__exit__(*error)

    def add(self, tensor: Any) -> None:
        """Count the storage of ``tensor``, where that is on the GPU and new, as long as it lives."""
        if not _on_gpu(tensor) or _COMPILED:
            return
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        self._known[storage] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.operations[str(func)] += 1
        for tensor in tree_leaves(found):
            self.add(tensor)
        return found
