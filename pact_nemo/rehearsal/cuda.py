"""What ``torch.cuda`` and torch's CUDA kernels answer in a rehearsal. A rehearsal has its process to itself: nothing
here is undone.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
import torch._subclasses.fake_tensor as fake_tensor
import torch.nn.functional as F

from pact_nemo.policy.without_cuda import NullStream
from pact_nemo.rehearsal import observed

#: of the GPU that is rehearsed on: an H100
CAPABILITY, NAME, PROCESSORS, MEMORY = (9, 0), "NVIDIA H100 80GB HBM3", 132, 80 * 10**9
DEVICES = 8  # of a node


class LowerRight:
    """In place of torch's ``CausalBias``, a tensor subclass that fake tensors can't be: causal, aligned to the lower
    right corner."""


def lower_right(queries: int, keys: int) -> LowerRight:
    """``torch.nn.attention.bias.causal_lower_right``."""
    return LowerRight()


class Stream(NullStream):
    """A stream or event of a device that does nothing."""

    device = torch.device("cuda", 0)
    device_index = 0
    cuda_stream = 0
    stream_id = 0


def pretend_cuda(local_rank: int) -> None:
    """Have this process find a node of H100s. Before megatron is imported."""
    device = {"current": local_rank}
    properties = types.SimpleNamespace(
        name=NAME, multi_processor_count=PROCESSORS, total_memory=MEMORY, major=CAPABILITY[0], minor=CAPABILITY[1]
    )
    answers: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "current_device": lambda: device["current"],
        "set_device": lambda chosen: device.update(current=torch.device(chosen).index if chosen != device else 0),
        "device_count": lambda: DEVICES,
        "get_device_capability": lambda *args: CAPABILITY,
        "get_device_name": lambda *args: NAME,
        "get_device_properties": lambda *args: properties,
        "is_bf16_supported": lambda *args, **kwargs: True,
        "synchronize": lambda *args: None,
        "empty_cache": lambda: None,
        "memory_allocated": lambda *args: 0,
        "memory_reserved": lambda *args: 0,
        "max_memory_allocated": lambda *args: 0,
        "max_memory_reserved": lambda *args: 0,
        "reset_peak_memory_stats": lambda *args: None,
        "current_stream": lambda *args: Stream(),
        "default_stream": lambda *args: Stream(),
        "stream": lambda *args: contextlib.nullcontext(),
        "is_current_stream_capturing": lambda: False,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda *args, **kwargs: torch.random.get_rng_state(),
        "set_rng_state": lambda *args, **kwargs: None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    torch.cuda.Stream = torch.cuda.Event = Stream  # type: ignore[misc,assignment]
    nvtx = types.ModuleType("torch.cuda.nvtx")
    for name in ("range_push", "range_pop", "mark"):
        setattr(nvtx, name, lambda *args, **kwargs: None)
    torch.cuda.nvtx = sys.modules["torch.cuda.nvtx"] = nvtx  # type: ignore[assignment]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self.to(torch.device("cuda", device["current"]))  # type: ignore[method-assign,assignment]
    torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[method-assign,assignment]
    fake_tensor.init_gpu_context = lambda chosen: None  # type: ignore[assignment]
    # kernels would be compiled for a GPU; what they compute is run operation by operation instead
    torch.compile = lambda model=None, *args, **kwargs: (
        observed.compiled(model) if model is not None else observed.compiled
    )  # type: ignore[assignment]  # noqa: E501
    _move_modules_in_place()
    _choose_flash_attention()


def _move_modules_in_place() -> None:
    """``Module.to`` for fake parameters, whose data can't be exchanged: those elsewhere are made anew, with their
    marks; those that are there stay."""

    def to(self: torch.nn.Module, device: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        wanted = torch.device(device)
        for module in self.modules():
            for store in (module._parameters, module._buffers):
                for name, tensor in store.items():
                    if tensor is None or tensor.device == wanted:
                        continue
                    moved = tensor.detach().to(wanted)
                    if isinstance(tensor, torch.nn.Parameter):
                        moved = torch.nn.Parameter(moved, requires_grad=tensor.requires_grad)
                    for mark in ("sequence_parallel", "tensor_model_parallel", "allreduce", "partition_dim"):
                        if hasattr(tensor, mark):
                            setattr(moved, mark, getattr(tensor, mark))
                    store[name] = moved
        return self

    def bfloat16(self: torch.nn.Module) -> torch.nn.Module:
        odd = next((name for name, value in self.named_parameters() if value.dtype != torch.bfloat16), None)
        if odd is not None:
            raise RuntimeError(f"{odd} would be made anew in bfloat16: a rehearsal can't exchange a parameter's data")
        return self

    torch.nn.Module.to = to  # type: ignore[method-assign,assignment]
    torch.nn.Module.bfloat16 = bfloat16  # type: ignore[method-assign,assignment]


def _choose_flash_attention() -> None:
    """Attention as a GPU computes it: the flash kernel where it can, which keeps a log-sum a query and no scores."""
    original = F.scaled_dot_product_attention

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        corner = isinstance(attn_mask, LowerRight)
        flash = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] <= 256
        if flash and (corner or attn_mask is None):
            found = torch.ops.aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal or corner, scale=scale
            )
            return found[0]  # type: ignore[no-any-return]
        if corner:  # torch makes the mask where no kernel knows it
            shape = query.shape[-2], key.shape[-2]
            attn_mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril(shape[1] - shape[0])
        return original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    F.scaled_dot_product_attention = attend  # type: ignore[assignment]
