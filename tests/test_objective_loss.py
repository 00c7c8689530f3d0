"""The loss against a naive float64 loop, finite differences, and the properties that training relies on."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from pact_nemo.objective.gate import anchored
from pact_nemo.objective.kl import kl_estimate
from pact_nemo.objective.loss import STREAMS, pact_loss
from pact_nemo.objective.surrogate import clipped_surrogate, truncated_importance
from pact_nemo.objective.weights import rl_weights, sft_weights

CLIP = {"clip_low": 0.2, "clip_high": 0.3}


def random_case(n: int, seed: int, old: bool = True) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    logprobs = -torch.rand(n, generator=g, dtype=torch.float64) * 3
    streams = {name: torch.randn(n, generator=g, dtype=torch.float64) for name in STREAMS}
    streams["ref_logprobs"] = -torch.rand(n, generator=g, dtype=torch.float64) * 3
    for name in STREAMS:
        if name.startswith("w_"):
            streams[name] = streams[name].abs() * (torch.rand(n, generator=g) < 0.6)
    streams["importance"] = streams["importance"].abs()
    if old:
        streams["old_logprobs"] = logprobs + 0.4 * torch.randn(n, generator=g, dtype=torch.float64)
    return logprobs, streams


def naive_loss(logprobs: torch.Tensor, s: dict[str, torch.Tensor]) -> float:
    total = 0.0
    for n in range(len(logprobs)):
        lp, old = float(logprobs[n]), float(s["old_logprobs"][n])
        r, a = math.exp(lp - old), float(s["advantages"][n])
        surrogate = -min(r * a, min(max(r, 1 - 0.2), 1 + 0.3) * a)
        d = float(s["ref_logprobs"][n]) - lp
        total += (float(s["w_rl_x"][n]) + float(s["w_rl_h"][n])) * float(s["importance"][n]) * surrogate
        total -= (float(s["w_sft_reasoning"][n]) + float(s["w_sft_call"][n])) * lp
        total += float(s["w_kl"][n]) * (math.exp(d) - d - 1)
    return total


@pytest.mark.parametrize("seed", range(5))
def test_equals_a_naive_loop_in_float64(seed: int) -> None:
    logprobs, streams = random_case(50, seed)
    loss, _ = pact_loss(logprobs, streams, **CLIP)
    assert float(loss) == pytest.approx(naive_loss(logprobs, streams), rel=1e-12)


def test_gradient_equals_finite_differences() -> None:
    logprobs, streams = random_case(24, 11)
    assert torch.autograd.gradcheck(lambda lp: pact_loss(lp, streams, **CLIP)[0], (logprobs.requires_grad_(),), eps=1e-7, atol=1e-6)


def test_first_on_policy_step_has_ratio_one_and_the_policy_gradient() -> None:
    logprobs, streams = random_case(40, 3, old=False)
    for name in ("w_sft_reasoning", "w_sft_call", "w_kl"):
        streams[name].zero_()
    logprobs.requires_grad_()
    loss, metrics = pact_loss(logprobs, streams, **CLIP)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert float(metrics["max/ratio_h"]) == 1.0 and float(metrics["clip/h"]) == 0.0
    expected = -(streams["w_rl_x"] + streams["w_rl_h"]) * streams["importance"] * streams["advantages"]
    torch.testing.assert_close(gradient, expected, rtol=1e-14, atol=0)  # r is 1 exactly; products are taken in another order
    explicit = dict(streams, old_logprobs=logprobs.detach().clone())
    (again,) = torch.autograd.grad(pact_loss(logprobs, explicit, **CLIP)[0], logprobs)
    assert torch.equal(again, gradient)


@pytest.mark.parametrize("seed", range(3))
def test_any_split_of_the_tokens_adds_up(seed: int) -> None:
    logprobs, streams = random_case(64, seed)
    whole, metrics = pact_loss(logprobs, streams, **CLIP)
    cuts = torch.randperm(64, generator=torch.Generator().manual_seed(seed)).split([7, 0, 30, 27])
    parts = [pact_loss(logprobs[i], {k: v[i] for k, v in streams.items()}, **CLIP) for i in cuts]
    assert float(sum(p[0] for p in parts)) == pytest.approx(float(whole), rel=1e-12)
    for key, value in metrics.items():
        values = [float(p[1][key]) for p in parts]
        assert (max if key.startswith("max/") else sum)(values) == pytest.approx(float(value), rel=1e-12), key


def test_tokens_without_weight_are_exactly_nothing_even_when_not_finite() -> None:
    logprobs = torch.tensor([-1.0, -math.inf, math.nan], requires_grad=True)
    streams = {name: torch.zeros(3) for name in STREAMS} | {"importance": torch.ones(3)}
    streams["w_sft_call"] = torch.tensor([1.0, 0.0, 0.0])
    loss, metrics = pact_loss(logprobs, streams, **CLIP)
    loss.backward()
    assert loss.item() == 1.0 and logprobs.grad is not None and logprobs.grad.tolist() == [-1.0, 0.0, 0.0]
    assert all(float(v) == 0 for k, v in metrics.items() if k.startswith("nonfinite/"))
    streams["w_rl_h"] = torch.tensor([0.0, 0.0, 1.0])
    assert float(pact_loss(logprobs, streams, **CLIP)[1]["nonfinite/rl_h"]) == 1.0


def test_an_empty_micro_batch_gives_zero_attached_to_the_graph() -> None:
    source = torch.ones(3, requires_grad=True)
    loss, _ = pact_loss(source[:0], {name: torch.zeros(0) for name in STREAMS}, **CLIP)
    loss.backward()
    assert float(loss) == 0.0 and source.grad is not None and source.grad.tolist() == [0, 0, 0]


def test_clipping_stops_the_gradient_on_the_right_side_only() -> None:
    logprobs = torch.log(torch.tensor([1.5, 1.5, 0.5, 0.5])).requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    values, clipped = clipped_surrogate(logprobs, torch.zeros(4), advantages, 0.2, 0.3)
    assert values.tolist() == pytest.approx([-1.3, 1.5, -0.5, 0.8]) and clipped.tolist() == [True, False, False, True]
    values.sum().backward()
    assert logprobs.grad is not None and logprobs.grad.tolist() == pytest.approx([0.0, 1.5, -0.5, 0.0])
    wild, _ = clipped_surrogate(torch.tensor([0.0]), torch.tensor([-1e4]), torch.tensor([-1.0]), 0.2, 0.2)
    assert torch.isfinite(wild).all()


def test_importance_is_truncated_and_kl_estimators_agree_in_expectation() -> None:
    weights = truncated_importance(torch.tensor([0.0, -1.0]), torch.tensor([-3.0, -1.5]), 2.0)
    assert weights.tolist() == pytest.approx([2.0, math.exp(0.5)])
    p, q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)
    exact = float((p * (p / q).log()).sum())
    for estimator in ("k1", "k3"):
        assert float((p * kl_estimate(p.log(), q.log(), estimator)).sum()) == pytest.approx(exact, rel=1e-12)
    with pytest.raises(ValueError, match="k9"):
        kl_estimate(p.log(), q.log(), "k9")


def test_rl_weights_by_hand() -> None:
    counts, usable = [[2, 3], [5, 4]], [[True, True], [True, False]]
    assert rl_weights(counts, usable, num_prompts=2) == [[1 / 8, 1 / 12], [1 / 10, 0.0]]
    assert rl_weights(counts, usable, num_prompts=2, aggregation="token-mean") == [[0.1, 0.1], [0.1, 0.0]]
    assert rl_weights(counts, usable, num_prompts=2, aggregation="constant-length", constant_length=10) == [[1 / 40, 1 / 40], [1 / 20, 0.0]]
    with pytest.raises(ValueError, match="median"):
        rl_weights(counts, usable, num_prompts=2, aggregation="median")


def test_sft_weights_are_a_weighted_mean_and_z_zero_is_skipped() -> None:
    masks = [np.array([1.0, 0.0, 0.5]), np.zeros(3), np.ones(2), np.zeros(0)]
    weights = sft_weights(masks, [False, False, True, False], num_prompts=4, beta=0.1)
    assert weights[0] == pytest.approx(0.1 * np.array([1.0, 0.0, 0.5]) / 1.5 / 4)
    assert [w.tolist() for w in weights[1:]] == [[0.0] * 3, [0.0] * 2, []]


def test_gate_is_a_function_of_its_key_with_the_right_frequency() -> None:
    # literal draws: a resumed run, another process or another platform must see these same ones
    assert [int(anchored(7, step, "multi_turn_base_3", 0.4)) for step in range(12)] == [0, 1, 0, 0, 1, 1, 0, 0, 1, 0, 0, 1]
    share = np.mean([anchored(1, s, f"p{i}", 0.4) for s in range(40) for i in range(100)])
    assert abs(share - 0.4) < 4 * math.sqrt(0.24 / 4000)
    assert not any(anchored(1, s, "p", 0.0) for s in range(50)) and all(anchored(1, s, "p", 1.0) for s in range(50))
    assert len({tuple(anchored(seed, s, "p", 0.5) for s in range(30)) for seed in range(5)}) == 5


def test_the_package_imports_nothing_of_ours() -> None:
    package = Path(__file__).resolve().parents[1] / "pact_nemo" / "objective"
    files = list(package.glob("*.py"))
    assert len(files) >= 8
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert not name.startswith("pact_nemo") or name.startswith("pact_nemo.objective"), f"{file.name} imports {name}"
                assert not name.startswith("megatron"), f"{file.name} imports {name}"
