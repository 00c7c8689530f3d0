"""Products of Transformer Engine's layers without their kernels: what they gather, save and reduce, and torch's
operators in between.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from pact_nemo.rehearsal.observed import compiled

PRODUCTS: Counter[str] = Counter()  #: forward products of layers by format, ``fp8`` or ``bf16``
FP8 = torch.float8_e4m3fn


class State:
    """What ``fp8_autocast`` has set; ``FP8GlobalStateManager`` reads it."""

    enabled = False
    recipe: Any = None


def device_of(device: Any) -> torch.device:
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


def gathered(tensor: torch.Tensor, group: Any, size: int) -> torch.Tensor:
    out = tensor.new_empty((tensor.shape[0] * size, *tensor.shape[1:]))
    dist.all_gather_into_tensor(out, tensor.contiguous(), group=group)
    return out


def scattered(tensor: torch.Tensor, group: Any, size: int) -> torch.Tensor:
    out = tensor.new_empty((tensor.shape[0] // size, *tensor.shape[1:]))
    dist.reduce_scatter_tensor(out, tensor.contiguous(), group=group)
    return out


class Product(torch.autograd.Function):
    """A parallel linear layer: gather, product, scatter. Saves its part of the input, in FP8 where it computes so and
    not at all beside a frozen weight. Returns the product and, where the layer hands it out, its whole input.
    """

    @staticmethod
    def forward(
        ctx: Any, part: torch.Tensor, weight: torch.Tensor, bias: Any, layer: Any, fp8: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        ctx.layer, ctx.fp8, ctx.has_bias, ctx.weight, ctx.dtype = layer, fp8, bias is not None, weight, part.dtype
        kept = part.to(FP8) if fp8 and not layer.save_original_input else part
        ctx.save_for_backward(kept if weight.requires_grad else None, weight)
        whole = layer.gathered(part) if layer.parallel_mode == "column" else part
        out = whole @ weight.t()
        if bias is not None:
            out += bias
        out = layer.reduced(out) if layer.parallel_mode == "row" else out
        return out, whole if layer.hands_out_gathered else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        part, weight = ctx.saved_tensors
        layer, grad = ctx.layer, grads[0]
        if layer.parallel_mode == "row":
            grad = layer.gathered(grad)
        back = grad @ weight
        if layer.hands_out_gathered:
            back += grads[1]
        if layer.parallel_mode == "column":
            back = layer.reduced(back)
        rows = grad.reshape(-1, grad.shape[-1])
        if part is None:
            return back, None, rows.sum(0) if ctx.has_bias else None, None, None
        whole = layer.gathered(part) if layer.parallel_mode == "column" else part
        own = _weight_gradient(ctx.weight, rows, whole.reshape(-1, whole.shape[-1]).to(grad.dtype), layer.fuse_wgrad)
        return back, own, rows.sum(0) if ctx.has_bias else None, None, None


class GroupedProduct(torch.autograd.Function):
    """A product of each expert with its rows; results lie in one tensor from the start."""

    @staticmethod
    def forward(
        ctx: Any, inp: torch.Tensor, splits: list[int], layer: Any, fp8: bool, *weights: torch.Tensor
    ) -> torch.Tensor:
        ctx.layer, ctx.splits, ctx.weights = layer, splits, weights
        ctx.save_for_backward(inp.to(FP8) if fp8 and not layer.save_original_input else inp)
        return _by_expert(inp, splits, [weight.t() for weight in weights])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        (inp,), grad, fuse = ctx.saved_tensors, grads[0], ctx.layer.fuse_wgrad
        back = _by_expert(grad, ctx.splits, list(ctx.weights))
        pairs = zip(torch.split(grad, ctx.splits), torch.split(inp.to(grad.dtype), ctx.splits), strict=True)
        own = [_weight_gradient(weight, *pair, fuse) for weight, pair in zip(ctx.weights, pairs, strict=True)]
        return back, None, None, None, *own


@compiled
def _by_expert(rows: torch.Tensor, splits: list[int], matrices: list[torch.Tensor]) -> torch.Tensor:
    parts = torch.split(rows, splits)
    return torch.cat([part @ matrix for part, matrix in zip(parts, matrices, strict=True)])


@compiled  # the product adds to float32 by itself
def _weight_gradient(weight: torch.Tensor, grad: torch.Tensor, inputs: torch.Tensor, fuse: bool) -> torch.Tensor:
    """Added to megatron's buffer by the product itself, or returned."""
    if not fuse:
        return grad.t() @ inputs
    torch.addmm(weight.main_grad, grad.t().float(), inputs.float(), out=weight.main_grad)  # type: ignore[attr-defined]
    if hasattr(weight, "grad_added_to_main_grad"):
        weight.grad_added_to_main_grad = True
    return torch.empty_like(weight)
