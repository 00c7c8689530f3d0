"""The loss against a naive float64 loop, finite differences, and the properties that training relies on."""

from __future__ import annotations

import ast
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pact_nemo.objective.gate import anchored, uniform
from pact_nemo.objective.kl import kl_estimate
from pact_nemo.objective.loss import STREAMS, batch_loss
from pact_nemo.objective.sft import token_nll
from pact_nemo.objective.surrogate import Clip, clipped_surrogate, truncated_importance
from pact_nemo.objective.weights import rl_weights, sft_weights

CLIP = {"surrogate": Clip(0.2, 0.3)}


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
    loss, _ = batch_loss(logprobs, streams, **CLIP)
    assert float(loss) == pytest.approx(naive_loss(logprobs, streams), rel=1e-12)


def test_gradient_equals_finite_differences() -> None:
    logprobs, streams = random_case(24, 11)
    assert torch.autograd.gradcheck(
        lambda lp: batch_loss(lp, streams, **CLIP)[0], (logprobs.requires_grad_(),), eps=1e-7, atol=1e-6
    )


def test_first_on_policy_step_has_ratio_one_and_the_policy_gradient() -> None:
    logprobs, streams = random_case(40, 3, old=False)
    for name in ("w_sft_reasoning", "w_sft_call", "w_kl"):
        streams[name].zero_()
    logprobs.requires_grad_()
    loss, metrics = batch_loss(logprobs, streams, **CLIP)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert float(metrics["max/ratio_h"]) == 1.0 and float(metrics["clip/h"]) == 0.0
    expected = -(streams["w_rl_x"] + streams["w_rl_h"]) * streams["importance"] * streams["advantages"]
    torch.testing.assert_close(
        gradient, expected, rtol=1e-14, atol=0
    )  # r is 1 exactly; products are taken in another order
    explicit = dict(streams, old_logprobs=logprobs.detach().clone())
    (again,) = torch.autograd.grad(batch_loss(logprobs, explicit, **CLIP)[0], logprobs)
    assert torch.equal(again, gradient)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.integers(0, 5), min_size=64, max_size=64), st.booleans())
def test_any_split_of_the_tokens_adds_up(seed: int, part_of: list[int], old: bool) -> None:
    logprobs, streams = random_case(64, seed, old)
    logprobs.requires_grad_()
    whole, metrics = batch_loss(logprobs, streams, **CLIP)
    (gradient,) = torch.autograd.grad(whole, logprobs)
    cuts = [torch.tensor([n for n in range(64) if part_of[n] == part], dtype=torch.long) for part in range(6)]
    parts = [batch_loss(logprobs[i], {k: v[i] for k, v in streams.items()}, **CLIP) for i in cuts]
    total = torch.stack([p[0] for p in parts]).sum()
    assert abs(total.item() - whole.item()) < 1e-12
    torch.testing.assert_close(torch.autograd.grad(total, logprobs)[0], gradient, rtol=0, atol=1e-15)
    for key, value in metrics.items():
        values = [float(p[1][key]) for p in parts]
        assert (max if key.startswith("max/") else sum)(values) == pytest.approx(float(value), rel=1e-12, abs=1e-12), (
            key
        )
        assert not value.requires_grad and value.shape == () and value.dtype == logprobs.dtype


def test_tokens_without_weight_are_exactly_nothing_even_when_not_finite() -> None:
    logprobs = torch.tensor([-1.0, -math.inf, math.nan], requires_grad=True)
    streams = {name: torch.zeros(3) for name in STREAMS} | {"importance": torch.ones(3)}
    streams["w_sft_call"] = torch.tensor([1.0, 0.0, 0.0])
    loss, metrics = batch_loss(logprobs, streams, **CLIP)
    loss.backward()
    assert loss.item() == 1.0 and logprobs.grad is not None and logprobs.grad.tolist() == [-1.0, 0.0, 0.0]
    assert all(float(v) == 0 for k, v in metrics.items() if k.startswith("nonfinite/"))
    streams["w_rl_h"] = torch.tensor([0.0, 0.0, 1.0])
    assert float(batch_loss(logprobs, streams, **CLIP)[1]["nonfinite/rl_h"]) == 1.0


@pytest.mark.parametrize("bad", ["old_logprobs", "ref_logprobs", "advantages", "importance"])
def test_garbage_in_any_stream_of_an_unweighted_token_does_no_harm_and_on_a_weighted_one_names_the_term(
    bad: str,
) -> None:
    logprobs = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    base = {name: torch.zeros(3) for name in (*STREAMS, "old_logprobs")}
    base |= {"importance": torch.ones(3), "advantages": torch.ones(3)}
    base |= {"w_rl_h": torch.tensor([1.0, 0.0, 0.0]), "w_kl": torch.tensor([1.0, 0.0, 0.0])}
    for value in (math.nan, math.inf, -math.inf):
        clean, _ = batch_loss(logprobs, base, **CLIP)
        dirty_stream = base[bad].clone()
        dirty_stream[1:] = value
        dirty, metrics = batch_loss(logprobs, base | {bad: dirty_stream}, **CLIP)
        assert torch.equal(dirty, clean)
        assert torch.equal(torch.autograd.grad(dirty, logprobs)[0], torch.autograd.grad(clean, logprobs)[0])
        assert all(math.isfinite(float(v)) for v in metrics.values())
    dirty_stream = base[bad].clone()
    dirty_stream[0] = math.nan
    _, metrics = batch_loss(logprobs, base | {bad: dirty_stream}, **CLIP)
    term = "kl" if bad == "ref_logprobs" else "rl_h"
    named = {key: float(v) for key, v in metrics.items() if key.startswith("nonfinite/")}
    assert named == {f"nonfinite/{t}": float(t == term) for t in ("rl_x", "rl_h", "sft_reasoning", "sft_call", "kl")}
    assert math.isnan(float(metrics[f"loss/{term}"]))


def test_metrics_by_hand() -> None:
    logprobs = torch.log(torch.tensor([0.6, 0.15, 0.25, 0.25], dtype=torch.float64))
    streams = {name: torch.zeros(4, dtype=torch.float64) for name in (*STREAMS, "old_logprobs")}
    streams["importance"] += 1
    streams["advantages"] = torch.tensor([1.0, -1.0, 2.0, 0.0], dtype=torch.float64)
    streams["old_logprobs"] = torch.log(torch.tensor([0.3, 0.6, 0.5, 0.9], dtype=torch.float64))  # ratios 2, 1/4, 1/2
    streams["ref_logprobs"] = torch.log(torch.tensor([0.6, 0.3, 0.9, 0.9], dtype=torch.float64))
    streams["w_rl_x"] = torch.tensor([0.5, 0.5, 0.0, 0.0], dtype=torch.float64)
    streams["w_rl_h"] = torch.tensor([0.0, 0.0, 0.25, 0.0], dtype=torch.float64)
    streams["w_kl"] = torch.tensor([0.1, 0.1, 0.0, 0.0], dtype=torch.float64)
    streams["w_sft_reasoning"] = torch.tensor([0.0, 0.0, 0.0, 0.5], dtype=torch.float64)
    loss, metrics = batch_loss(logprobs, streams, **CLIP)
    expected = {
        "loss/rl_x": 0.5 * -1.3 + 0.5 * 0.8,
        "clip/x": 2,
        "tokens/x": 2,
        "max/ratio_x": 2,
        "approx_kl/x": (2 - 1 - math.log(2)) + (0.25 - 1 + math.log(4)),
        "loss/rl_h": 0.25 * -2 * 0.5,
        "clip/h": 0,
        "tokens/h": 1,
        "max/ratio_h": 0.5,
        "approx_kl/h": 0.5 - 1 + math.log(2),
        "loss/sft_reasoning": 0.5 * math.log(4),
        "tokens/sft_reasoning": 1,
        "loss/sft_call": 0,
        "tokens/sft_call": 0,
        "loss/kl": 0.1 * (2 - 1 - math.log(2)),
        "kl/sum": 2 - 1 - math.log(2),
        "kl/count": 2,
        "nonfinite/rl_x": 0,
        "nonfinite/rl_h": 0,
        "nonfinite/sft_reasoning": 0,
        "nonfinite/sft_call": 0,
        "nonfinite/kl": 0,
    }
    assert {key: float(value) for key, value in metrics.items()} == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert loss.item() == pytest.approx(
        sum(value for key, value in expected.items() if key.startswith("loss/")), rel=1e-12
    )


def test_wild_tokens_stay_finite_in_float32() -> None:
    logprobs = torch.tensor([-0.01, -300.0, -0.01, -300.0], requires_grad=True)
    streams = {name: torch.zeros(4) for name in (*STREAMS, "old_logprobs")} | {"importance": torch.ones(4)}
    streams |= {"advantages": torch.tensor([1.0, 1.0, -1.0, -1.0]), "w_rl_h": torch.ones(4), "w_kl": torch.ones(4)}
    streams |= {
        "old_logprobs": torch.tensor([-300.0, -0.01, -300.0, -0.01]),
        "ref_logprobs": torch.tensor([-300.0, -0.01, -300.0, -0.01]),
    }
    loss, metrics = batch_loss(logprobs, streams, **CLIP)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert torch.isfinite(loss) and torch.isfinite(gradient).all() and all(torch.isfinite(v) for v in metrics.values())
    assert (
        float(metrics["max/ratio_h"]) == pytest.approx(math.exp(20), rel=1e-6) and float(metrics["max/ratio_x"]) == 0.0
    )
    # a log-prob of -Inf gives a finite surrogate (its ratio is 0), and is counted all the same
    impossible = torch.tensor([-math.inf, -300.0, -0.01, -300.0])
    loss, metrics = batch_loss(impossible, streams | {"w_kl": torch.zeros(4)}, **CLIP)
    assert torch.isfinite(loss) and float(metrics["nonfinite/rl_h"]) == 1.0


def test_a_stream_of_another_shape_or_a_missing_one_is_refused() -> None:
    logprobs, streams = random_case(4, 0)
    with pytest.raises(ValueError, match="importance"):
        batch_loss(logprobs, streams | {"importance": torch.ones(1)}, **CLIP)
    with pytest.raises(KeyError, match="w_kl"):
        batch_loss(logprobs, {name: stream for name, stream in streams.items() if name != "w_kl"}, **CLIP)
    with pytest.raises(ValueError, match="clip range"):
        batch_loss(logprobs, streams, surrogate=Clip(-0.1, 0.2))


def test_an_empty_micro_batch_gives_zero_attached_to_the_graph() -> None:
    source = torch.ones(3, requires_grad=True)
    loss, _ = batch_loss(source[:0], {name: torch.zeros(0) for name in STREAMS}, **CLIP)
    loss.backward()
    assert loss.item() == 0.0 and source.grad is not None and source.grad.tolist() == [0, 0, 0]


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


def test_rl_weights_by_hand() -> None:
    counts, usable = [[2, 3], [5, 4]], [[True, True], [True, False]]
    assert rl_weights(counts, usable, num_prompts=2) == [[1 / 8, 1 / 12], [1 / 10, 0.0]]
    assert rl_weights(counts, usable, num_prompts=2, aggregation="token-mean") == [[0.1, 0.1], [0.1, 0.0]]
    assert rl_weights(counts, usable, num_prompts=2, aggregation="constant-length", constant_length=10) == [
        [1 / 40, 1 / 40],
        [1 / 20, 0.0],
    ]
    with pytest.raises(ValueError, match="median"):
        rl_weights(counts, usable, num_prompts=2, aggregation="median")


def test_failed_and_empty_rollouts_leave_the_mean_over_k_and_a_dead_prompt_stays_in_the_batch() -> None:
    counts, usable = [[4, 0, 2, 9], [3, 3]], [[True, True, True, False], [False, False]]
    assert rl_weights(counts, usable, num_prompts=2) == [[1 / 16, 0.0, 1 / 8, 0.0], [0.0, 0.0]]
    assert rl_weights(counts, usable, num_prompts=2, aggregation="token-mean") == [[1 / 6, 0.0, 1 / 6, 0.0], [0.0, 0.0]]
    assert rl_weights([[0]], [[True]], num_prompts=1, aggregation="token-mean") == [[0.0]]
    with pytest.raises(ValueError, match="shorter|longer"):
        rl_weights([[1, 2]], [[True]], num_prompts=1)
    with pytest.raises(ValueError, match="num_prompts"):
        rl_weights(counts, usable, num_prompts=0)


def test_sft_weights_are_a_weighted_mean_and_z_zero_is_skipped() -> None:
    masks = [np.array([1.0, 0.0, 0.5]), np.zeros(3), np.ones(2), np.zeros(0)]
    weights = sft_weights(masks, [False, False, True, False], num_prompts=4, beta=0.1)
    assert weights[0] == pytest.approx(0.1 * np.array([1.0, 0.0, 0.5]) / 1.5 / 4)
    assert [w.tolist() for w in weights[1:]] == [[0.0] * 3, [0.0] * 2, []]
    for bad in (math.nan, -1.0):
        with pytest.raises(ValueError, match="m_n"):
            sft_weights([np.array([1.0, bad])], [False], num_prompts=1, beta=0.1)


def test_gate_is_a_function_of_its_key_with_the_right_frequency() -> None:
    # literal draws: a resumed run, another process or another platform must see these same ones
    assert [int(anchored(7, step, "multi_turn_base_3", 0.4)) for step in range(12)] == [
        0,
        1,
        0,
        0,
        1,
        1,
        0,
        0,
        1,
        0,
        0,
        1,
    ]
    share = np.mean([anchored(1, s, f"p{i}", 0.4) for s in range(40) for i in range(100)])
    assert abs(share - 0.4) < 4 * math.sqrt(0.24 / 4000)
    assert not any(anchored(1, s, "p", 0.0) for s in range(50)) and all(anchored(1, s, "p", 1.0) for s in range(50))
    assert len({tuple(anchored(seed, s, "p", 0.5) for s in range(30)) for seed in range(5)}) == 5


def test_gate_is_the_same_in_another_process_and_in_any_order() -> None:
    prompts = ("a", "multi_turn_base_12#3", "é\u2028", "1,2", "1")
    keys = [(seed, step, prompt) for seed in (0, 7) for step in (0, 1, 23) for prompt in prompts]
    here = [anchored(*key, 0.4) for key in keys]
    assert [anchored(*key, 0.4) for key in reversed(keys)] == here[::-1]
    code = f"from pact_nemo.objective.gate import anchored; print([anchored(*k, 0.4) for k in {keys!a}])"
    root = Path(__file__).resolve().parents[1]
    for hash_seed in ("1", "2"):
        environment = dict(os.environ, PYTHONHASHSEED=hash_seed)
        there = subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True, check=True
        )
        assert there.stdout == f"{here}\n"
    assert len({uniform("gate", *key) for key in keys}) == len(keys) and uniform("a", 1, 23) != uniform("a", 12, 3)
    with pytest.raises(ValueError, match="q=1.5"):
        anchored(0, 0, "p", 1.5)


def test_q_zero_is_never_even_for_the_smallest_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pact_nemo.objective.gate.uniform", lambda *key: 0.0)
    assert not anchored(0, 0, "p", 0.0) and anchored(0, 0, "p", 2**-53)


def test_the_gate_is_not_biased_along_steps_or_prompts() -> None:
    draws = np.array([[uniform("gate", 3, step, f"p{i}") for i in range(60)] for step in range(60)])
    assert 0.0 <= draws.min() and draws.max() < 1.0
    counts = np.histogram(draws, bins=10, range=(0, 1))[0]
    assert ((counts - 360) ** 2 / 360).sum() < 27.9  # chi-square, 9 degrees of freedom, p = 0.001
    for axis in (0, 1):
        assert np.abs(draws.mean(axis=axis) - 0.5).max() < 5 * math.sqrt(1 / 12 / 60)


def test_the_package_imports_nothing_of_ours() -> None:
    package = Path(__file__).resolve().parents[1] / "pact_nemo" / "objective"
    files = list(package.glob("*.py"))
    assert {"rewards", "advantages", "surrogate", "kl", "sft", "schedules", "gate", "weights", "latent", "loss"} <= {
        f.stem for f in files
    }
    allowed = sys.stdlib_module_names | {"numpy", "scipy", "torch"}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file.name}: a relative import"
                names = [node.module or ""]
            for name in names:
                assert name.startswith("pact_nemo.objective.") or name.split(".")[0] in allowed, (
                    f"{file.name} imports {name}"
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


def test_without_a_clip_range_the_surrogate_is_the_importance_weighted_advantage() -> None:
    logprobs, streams = random_case(40, 12)
    logprobs.requires_grad_()
    values, stopped = clipped_surrogate(logprobs, streams["old_logprobs"], streams["advantages"], Clip(None, None))
    expected = -(logprobs - streams["old_logprobs"]).exp() * streams["advantages"]
    torch.testing.assert_close(values, expected, rtol=1e-14, atol=0)
    assert not stopped.any()


@pytest.mark.parametrize("wrong", [(0.2, None), (None, 0.2), (0.2, 0.3, 1.3), (None, None, 1.0), (1.5, 0.2)])
def test_a_clip_range_that_is_none_is_refused(wrong: tuple[float | None, ...]) -> None:
    with pytest.raises(ValueError, match="clip"):
        Clip(*wrong)


def test_the_entropy_bonus_is_weighted_masked_and_finite_differenced() -> None:
    logprobs, streams = random_case(24, 21)
    streams["w_entropy"] = 0.1 * (torch.arange(24) % 3 != 0).double()
    streams["entropy"] = torch.rand(24, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 4
    loss, metrics = batch_loss(logprobs, streams, **CLIP)
    bonus = sum(float(w) * float(h) for w, h in zip(streams["w_entropy"], streams["entropy"], strict=True))
    assert float(metrics["loss/entropy"]) == pytest.approx(-bonus) and float(metrics["tokens/entropy"]) == 16
    without = {name: value for name, value in streams.items() if name not in ("w_entropy", "entropy")}
    assert float(loss) == pytest.approx(float(batch_loss(logprobs, without, **CLIP)[0]) - bonus, rel=1e-12)
    entropy = streams["entropy"].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda h: batch_loss(logprobs, {**streams, "entropy": h}, **CLIP)[0], (entropy,))
    streams["entropy"][0], streams["entropy"][1] = math.nan, math.inf  # of weight 0, of weight 0.1
    named = batch_loss(logprobs, streams, **CLIP)[1]
    assert float(named["nonfinite/entropy"]) == 1.0 and math.isinf(float(named["loss/entropy"]))
    with pytest.raises(KeyError, match="entropy"):
        batch_loss(logprobs, {name: value for name, value in streams.items() if name != "entropy"}, **CLIP)


def test_sft_tokens_can_share_one_denominator_over_the_mini_batch() -> None:
    masks = [np.array([1.0, 0.5, 0.0]), np.array([1.0]), np.array([2.0]), np.zeros(2), np.zeros(0)]
    found = sft_weights(masks, [False, False, True, False, True], num_prompts=5, beta=0.4, aggregation="token-mean")
    assert [row.tolist() for row in found] == [
        pytest.approx([0.16, 0.08, 0.0]),
        pytest.approx([0.16]),
        [0.0],
        [0.0, 0.0],
        [],
    ]
    with pytest.raises(ValueError, match="SFT aggregation"):
        sft_weights(masks, [False] * 5, num_prompts=5, beta=0.4, aggregation="mean")
