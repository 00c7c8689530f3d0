"""Norm, SwiGLU, rotation and embedding as single functions: values and gradients of torch's own operators, in float64
and in lower precision.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from pact_nemo.policy import fused


def rotated(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """As megatron does it: x cos + rotate_half(x) sin over the first numbers, the others as they are."""
    size = 2 * cosine.shape[-1]
    turned, rest = x[..., :size], x[..., size:]
    left, right = turned.chunk(2, dim=-1)
    both = torch.cat([-right, left], dim=-1)
    return torch.cat([turned * cosine.repeat(1, 1, 1, 2) + both * sine.repeat(1, 1, 1, 2), rest], dim=-1)


def angles(tokens: int, half: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    found = torch.outer(torch.arange(tokens, dtype=torch.float64), torch.rand(half, dtype=torch.float64))[
        :, None, None, :
    ]
    return found.cos().to(dtype), found.sin().to(dtype)


def swiglu(both: torch.Tensor) -> torch.Tensor:
    gate, up = both.chunk(2, dim=-1)
    return F.silu(gate) * up


def cases(
    dtype: torch.dtype,
) -> dict[str, tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor], list[torch.Tensor]]]:
    """name -> ours, torch's, differentiable inputs."""
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    whole, part = angles(6, 4, dtype), angles(6, 3, dtype)
    module = fused.SwiGLU(None)
    return {
        "norm": (
            lambda x, w: fused.rms_norm(x, w, 1e-5),
            lambda x, w: F.rms_norm(x, (x.shape[-1],), w, 1e-5),
            [random(6, 1, 10), 1 + random(10) / 4],
        ),
        "swiglu": (module, swiglu, [random(6, 1, 14)]),
        "rotation": (lambda x: fused.rotate(x, *whole), lambda x: rotated(x, *whole), [random(6, 1, 3, 8)]),
        "partial rotation of a strided tensor": (
            lambda x: fused.rotate(x.transpose(0, 2), *part),
            lambda x: rotated(x.transpose(0, 2), *part),
            [random(3, 1, 6, 8)],
        ),
    }


@pytest.mark.parametrize("name", list(cases(torch.float64)))
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 4e-2)])
def test_values_and_gradients_are_torchs(name: str, dtype: torch.dtype, tolerance: float) -> None:
    ours, theirs, inputs = cases(dtype)[name]
    found, expected = [], []
    for function, results in ((ours, found), (theirs, expected)):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = function(*leaves)
        assert out.dtype == dtype
        out.backward(torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(dtype))
        results += [out.detach(), *(leaf.grad for leaf in leaves)]
    for a, b in zip(found, expected, strict=True):
        assert a is not None and b is not None
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("name", list(cases(torch.float64)))
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    ours, _, inputs = cases(torch.float64)[name]
    assert torch.autograd.gradcheck(ours, [x.clone().requires_grad_() for x in inputs])


def test_the_gradient_of_embedded_tokens_is_added_where_it_belongs() -> None:
    weight = torch.randn(7, 4, requires_grad=True)
    ids = torch.tensor([[3, 0, 3, 6]])
    rows = F.embedding(ids, weight.detach()).transpose(0, 1)
    upstream = torch.randn(4, 1, 4)
    F.embedding(ids, weight).transpose(0, 1).backward(upstream)
    assert weight.grad is not None
    main = torch.ones(7, 4)
    out = fused.embedded(rows, weight, ids, main)
    assert torch.equal(out, rows)
    out.backward(upstream)
    torch.testing.assert_close(main, 1 + weight.grad.new_zeros(7, 4).index_add_(0, ids[0], upstream[:, 0]))
