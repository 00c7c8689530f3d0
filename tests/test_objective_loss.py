"""The loss against a naive float64 loop, finite differences, and the properties that training relies on."""

from __future__ import annotations

import ast
import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pact_nemo.objective.loss import STREAMS, batch_loss
from pact_nemo.objective.surrogate import Clip, clipped_surrogate

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


def test_without_a_clip_range_the_surrogate_is_the_importance_weighted_advantage() -> None:
    logprobs, streams = random_case(40, 12)
    logprobs.requires_grad_()
    values, stopped = clipped_surrogate(logprobs, streams["old_logprobs"], streams["advantages"], Clip(None, None))
    expected = -(logprobs - streams["old_logprobs"]).exp() * streams["advantages"]
    torch.testing.assert_close(values, expected, rtol=1e-14, atol=0)
    assert not stopped.any()


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
