"""The elementwise parts of a layer as one autograd function each, where Transformer Engine has none for the machine.

Composed of torch's operators, a norm, a gated activation and a rotation each write half a dozen tensors of the size of
their input, and on a CPU those writes, not the arithmetic, are what they cost. These write what they return and keep
what the backward pass can't recompute cheaply.

Shapes: T tokens, n heads, d head size, H hidden size, F feed-forward width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def _exact(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        exact = _exact(x)
        inverse = torch.linalg.vector_norm(exact, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        normalised = exact.mul_(inverse) if exact is not x else exact * inverse
        return normalised.mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        grad, exact = _exact(grad_outputs[0]), _exact(x)
        normalised = exact.mul_(inverse) if exact is not x else exact * inverse
        del exact
        product = grad * normalised
        grad_weight = product.reshape(-1, product.shape[-1]).sum(0).to(weight.dtype)
        # d/dx of x_i w_i r(x): r (w g - x r mean(w g x r))
        along = (
            torch.mv(product.reshape(-1, product.shape[-1]), weight.to(product.dtype))
            .div_(-x.shape[-1])
            .reshape(inverse.shape)
        )
        torch.mul(grad, weight, out=product)
        return product.addcmul_(normalised, along).mul_(inverse).to(x.dtype), grad_weight, None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, computed in at least float32; the dtype of
    ``x``.
    """
    return _RMSNorm.apply(x, weight, eps)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(both)
        gate, up = both.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> torch.Tensor:
        (both,) = ctx.saved_tensors
        grad = grad_outputs[0]
        gate, up = both.chunk(2, dim=-1)
        out = torch.empty_like(both)
        grad_gate, grad_up = out.chunk(2, dim=-1)
        torch.ops.aten.silu.out(gate, out=grad_up)
        grad_up *= grad
        torch.mul(grad, up, out=grad_gate)
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        return out


class SwiGLU(torch.nn.Module):
    """``silu(gate) * up`` of [..., 2 F] = gate, up; megatron's place for an activation module
    (``use_te_activation_func``).
    """

    def __init__(self, config: Any):
        super().__init__()

    def forward(self, both: torch.Tensor) -> torch.Tensor:
        return _SwiGLU.apply(both)  # type: ignore[no-any-return]

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Nothing: megatron's MLPs ask each of their modules for its part of a checkpoint."""
        return {}


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cosine, sine)
        return _rotated(x, cosine, sine, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cosine, sine = ctx.saved_tensors
        return _rotated(grad_outputs[0], cosine, sine, -1.0), None, None


def _rotated(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, sign: float) -> torch.Tensor:
    half = cosine.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    left, right = x[..., :half], x[..., half : 2 * half]
    torch.mul(left, cosine, out=out[..., :half]).addcmul_(right, sine, value=-sign)
    torch.mul(right, cosine, out=out[..., half : 2 * half]).addcmul_(left, sine, value=sign)
    if 2 * half < x.shape[-1]:
        out[..., 2 * half :] = x[..., 2 * half :]
    return out


def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of [T, 1, n, d] in rotate-half layout; cosine and sine [T, 1, 1, r / 2] turn the first r of d
    numbers.
    """
    return _Rotate.apply(x, cosine, sine)


class _Embedded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, main_grad: torch.Tensor
    ) -> torch.Tensor:
        ctx.ids, ctx.main_grad, ctx.weight = ids, main_grad, weight
        return rows.view_as(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad = grad_outputs[0]
        ctx.main_grad.index_add_(0, ctx.ids.reshape(-1), grad.reshape(-1, grad.shape[-1]).to(ctx.main_grad.dtype))
        return None, torch.empty_like(ctx.weight), None, None


def embedded(rows: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, main_grad: torch.Tensor) -> torch.Tensor:
    """``rows`` [T, 1, H], looked up without a gradient, with one: added to ``main_grad`` [V, H] row by row, where
    autograd would fill a matrix of the vocabulary's size with zeros for every micro-batch. Autograd receives an
    uninitialised placeholder, for hooks that wait for one.
    """
    return _Embedded.apply(rows, weight, ids, main_grad)
