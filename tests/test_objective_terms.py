"""The terms of the loss one by one: the clipped surrogate, importance, the KL estimators and the SFT term."""

from __future__ import annotations

import math

import pytest
import torch

from pact_nemo.objective.kl import kl_estimate
from pact_nemo.objective.sft import token_nll
from pact_nemo.objective.surrogate import Clip, clipped_surrogate, truncated_importance


def test_clipping_stops_the_gradient_on_the_right_side_only() -> None:
    logprobs = torch.log(torch.tensor([1.5, 1.5, 0.5, 0.5])).requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    values, clipped = clipped_surrogate(logprobs, torch.zeros(4), advantages, Clip(0.2, 0.3))
    assert values.tolist() == pytest.approx([-1.3, 1.5, -0.5, 0.8]) and clipped.tolist() == [True, False, False, True]
    values.sum().backward()
    assert logprobs.grad is not None and logprobs.grad.tolist() == pytest.approx([0.0, 1.5, -0.5, 0.0])
    old = torch.zeros(4, requires_grad=True)  # pi_old is a constant even when it comes with a graph
    values, _ = clipped_surrogate(logprobs.detach(), old, advantages, Clip(0.2, 0.3))
    assert not values.requires_grad
    wild, _ = clipped_surrogate(torch.tensor([0.0]), torch.tensor([-1e4]), torch.tensor([-1.0]), Clip(0.2, 0.2))
    assert torch.isfinite(wild).all()


def test_importance_is_truncated_and_detached() -> None:
    old = torch.tensor([0.0, -1.0], requires_grad=True)
    weights = truncated_importance(old, torch.tensor([-3.0, -1.5]), 2.0)
    assert weights.tolist() == pytest.approx([2.0, math.exp(0.5)]) and not weights.requires_grad
    assert truncated_importance(torch.tensor([-math.inf]), torch.tensor([-1.0]), 2.0).item() == pytest.approx(
        math.exp(-20)
    )
    with pytest.raises(FloatingPointError, match="NaN"):
        truncated_importance(torch.tensor([math.nan]), torch.tensor([-1.0]), 2.0)
    with pytest.raises(ValueError, match="cap"):
        truncated_importance(old, old, 0.0)


def test_kl_estimators_in_expectation_and_by_finite_differences() -> None:
    logits, q = (
        torch.tensor([0.1, -0.4, 0.7, 0.0], dtype=torch.float64, requires_grad=True),
        torch.tensor([0.4, 0.3, 0.2, 0.1]).double(),
    )
    p = torch.softmax(logits, 0)
    exact = (p * (p / q).log()).sum()
    for estimator in ("k1", "k3"):  # unbiased
        assert (p * kl_estimate(p.log(), q.log(), estimator)).sum().item() == pytest.approx(exact.item(), rel=1e-6)
    true_gradient = torch.autograd.grad(exact, logits, retain_graph=True)[0]
    for estimator, expected in (
        ("k1", torch.zeros(4).double()),
        ("k2", true_gradient),
    ):  # what the docstring says of their gradients
        surrogate = (p.detach() * kl_estimate(p.log(), q.log(), estimator)).sum()
        torch.testing.assert_close(
            torch.autograd.grad(surrogate, logits, retain_graph=True)[0], expected, rtol=1e-9, atol=1e-12
        )
    current = -torch.rand(12, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).mul(3).requires_grad_()
    reference = -torch.rand(12, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 3
    for estimator in ("k1", "k2", "k3"):
        assert torch.autograd.gradcheck(
            lambda lp, e=estimator: kl_estimate(lp, reference, e), (current.detach().requires_grad_(),)
        )
    assert (kl_estimate(current, reference) >= 0).all() and torch.equal(
        kl_estimate(current, current.detach()), torch.zeros(12).double()
    )
    with pytest.raises(ValueError, match="k9"):
        kl_estimate(current, reference, "k9")


def test_surrogate_gradients_equal_finite_differences() -> None:
    g = torch.Generator().manual_seed(5)
    old = -torch.rand(40, generator=g, dtype=torch.float64) * 3
    current, advantages = (
        old + torch.randn(40, generator=g, dtype=torch.float64) * 0.4,
        torch.randn(40, generator=g, dtype=torch.float64),
    )
    ratio = (current - old).exp()
    smooth = ((ratio - 0.8).abs() > 1e-4) & ((ratio - 1.3).abs() > 1e-4)  # a kink has no derivative to compare with
    assert smooth.sum() > 35
    assert torch.autograd.gradcheck(
        lambda lp: clipped_surrogate(lp, old[smooth], advantages[smooth], Clip(0.2, 0.3))[0],
        (current[smooth].requires_grad_(),),
    )
    _, clipped = clipped_surrogate(current, old, advantages, Clip(0.2, 0.3))
    naive = [
        (r > 1.3 and a > 0) or (r < 0.8 and a < 0) for r, a in zip(ratio.tolist(), advantages.tolist(), strict=True)
    ]
    assert clipped.tolist() == naive and 0 < sum(naive) < 40


def test_token_nll_is_weighted_and_masked() -> None:
    logprobs = torch.tensor([-0.5, -math.inf, math.nan, -2.0], dtype=torch.float64, requires_grad=True)
    values = token_nll(logprobs, torch.tensor([0.5, 0.0, 0.0, 0.25], dtype=torch.float64))
    values.sum().backward()
    assert (
        values.tolist() == [0.25, 0.0, 0.0, 0.5]
        and logprobs.grad is not None
        and logprobs.grad.tolist() == [-0.5, 0.0, 0.0, -0.25]
    )


@pytest.mark.parametrize("dual", [1.5, 3.0])
def test_dual_clip_bounds_the_loss_of_bad_tokens_only(dual: float) -> None:
    g = torch.Generator().manual_seed(8)
    old = -torch.rand(200, generator=g, dtype=torch.float64) * 3
    current = (old + torch.randn(200, generator=g, dtype=torch.float64)).requires_grad_()
    advantages = torch.randn(200, generator=g, dtype=torch.float64)
    values, stopped = clipped_surrogate(current, old, advantages, Clip(0.2, 0.3, dual))
    (slope,) = torch.autograd.grad(values.sum(), current)
    seen = 0
    ratios = (current.detach() - old).exp().tolist()
    for n, (r, a) in enumerate(zip(ratios, advantages.tolist(), strict=True)):
        plain = max(-a * r, -a * min(max(r, 0.8), 1.3))
        expected = min(-a * dual, plain) if a < 0 else plain  # as verl writes it
        assert values[n].item() == pytest.approx(expected, rel=1e-12)
        flat = (a < 0 and (r < 0.8 or r > dual)) or (a > 0 and r > 1.3)
        assert bool(stopped[n]) == flat and float(slope[n]) == pytest.approx(0.0 if flat else -a * r, rel=1e-12)
        seen += a < 0 and r > dual
    assert seen > 2


@pytest.mark.parametrize("wrong", [(0.2, None), (None, 0.2), (0.2, 0.3, 1.3), (None, None, 1.0), (1.5, 0.2)])
def test_a_clip_range_that_is_none_is_refused(wrong: tuple[float | None, ...]) -> None:
    with pytest.raises(ValueError, match="clip"):
        Clip(*wrong)
