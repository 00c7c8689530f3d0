"""bfloat16 attention on the CPU against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pact_nemo.policy.attention import CpuAttention, lower_right_mask

SCALE = 0.2


def inputs(queries: int, keys: int) -> tuple[list[torch.Tensor], torch.Tensor | None, torch.Tensor]:
    """[q, k, v] of nine heads in three groups, the mask, and a gradient of the output."""
    torch.manual_seed(queries)
    shapes = ((1, 9, queries, 64), (1, 3, keys, 64), (1, 3, keys, 64))
    tensors = [torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    mask = None if queries == keys else lower_right_mask(queries, keys, torch.bfloat16)
    return tensors, mask, torch.randn(shapes[0], dtype=torch.bfloat16)


def errors(found: tuple[torch.Tensor, ...], exact: tuple[torch.Tensor, ...]) -> list[float]:
    return [
        float((a.detach().double() - b.detach()).norm() / b.detach().norm()) for a, b in zip(found, exact, strict=True)
    ]


@pytest.mark.parametrize(("queries", "keys"), [(50, 50), (20, 90), (1, 7)])
def test_output_and_gradients_are_those_of_float64(queries: int, keys: int) -> None:
    tensors, mask, gradient = inputs(queries, keys)
    output = CpuAttention.apply(*tensors, mask, SCALE)
    found = (output, *torch.autograd.grad(output, tensors, gradient))
    assert all(tensor.dtype == torch.bfloat16 for tensor in found)
    doubles = [tensor.detach().double().requires_grad_() for tensor in tensors]
    wanted = F.scaled_dot_product_attention(
        *doubles,
        attn_mask=None if mask is None else mask.double(),
        is_causal=mask is None,
        scale=SCALE,
        enable_gqa=True,
    )
    exact = (wanted, *torch.autograd.grad(wanted, doubles, gradient.double()))
    assert max(errors(found, exact)) < 4e-3, "half a step of bfloat16 is 4e-3"


def test_what_is_kept_for_the_backward_pass_is_bfloat16() -> None:
    tensors, mask, _ = inputs(20, 90)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        CpuAttention.apply(*tensors, mask, SCALE)
    large = [tensor.dtype for tensor in kept if tensor.dim() == 4]
    assert large == [torch.bfloat16] * 4, "q, k, v and the output"
