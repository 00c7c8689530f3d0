"""FP8: the rounding itself, and what it does to log-probs, ratios and gradients of a PACT batch, by emulation on the
CPU.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pact_nemo.errors import ConfigError
from pact_nemo.methods.registry import method_named
from pact_nemo.policy.config import FP8_RECIPES, LoraConfig, OptimizerConfig, PolicyConfig
from pact_nemo.policy.fp8 import ALIGNMENT, E4M3, E5M2, Caster, round_in_blocks, round_to_fp8, scale_for
from pact_nemo.policy.policy import MegatronPolicy
from pact_nemo.policy.trees import Segment, TokenTree
from tests.workers.pact_kit import OBJECTIVE, make_pact_trees
from tests.workers.policy_kit import make_model


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("hf"), "qwen2")


def build(path: Path, **config: Any) -> MegatronPolicy:
    fp8 = {"fp8_bf16_layers": 0} if config.get("fp8") == "delayed" else {}
    settings = PolicyConfig(
        **{"precision": "fp32", "micro_batch_tokens": 256, "logprob_chunk": 64, "fp8_emulate": True, **fp8, **config}
    )
    policy = MegatronPolicy(settings, OptimizerConfig(lr=1e-3), path, seed=1, total_steps=4)
    policy.load_reference(path)
    return policy


#: all weights, or adapters on a base whose products are in FP8; theirs are not
ranks = pytest.mark.parametrize("rank", [0, 4])

#: the paper's terms at temperature 1: what the bounds below were measured on
PAPERS = replace(OBJECTIVE, entropy_coef=0.0, dual_clip=None)
pact_terms = method_named("pact", PAPERS).loss


def plain_trees(count: int = 6) -> list[TokenTree]:
    return make_pact_trees(count, objective=PAPERS, temperature=1.0)


def joined(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(rows)


# ------------------------------------------------------------------ rounding


@pytest.mark.parametrize(("dtype", "bits"), [(E4M3, 3), (E5M2, 2)])
def test_rounding_errs_by_half_a_step_of_the_mantissa_and_saturates(dtype: torch.dtype, bits: int) -> None:
    values = torch.exp2(torch.linspace(-4.0, 6.0, 10001))
    rounded = round_to_fp8(values, torch.ones(()), dtype)
    assert ((rounded - values).abs() / values).max() == pytest.approx(
        2.0 ** -(bits + 1) / (1 + 2.0 ** -(bits + 1)), rel=0.01
    )
    assert torch.equal(round_to_fp8(rounded, torch.ones(()), dtype), rounded)
    assert round_to_fp8(torch.tensor([1e9, -1e9]), torch.ones(()), dtype).tolist() == [
        torch.finfo(dtype).max,
        -torch.finfo(dtype).max,
    ]


def test_the_scale_takes_the_largest_magnitude_to_the_largest_value() -> None:
    values = torch.tensor([-3.7, 0.01, 2.0])
    assert round_to_fp8(values, scale_for(values.abs().amax(), E4M3, power_of_two=False), E4M3)[0] == pytest.approx(
        -3.7, rel=1e-6
    )
    scale = scale_for(torch.tensor([3.7, 448.0, 449.0, 0.0, float("inf")]), E4M3, power_of_two=True)
    assert scale.tolist() == [64.0, 1.0, 0.5, 1.0, 1.0]
    broken = round_in_blocks(torch.tensor([[1.0, float("inf"), float("nan")]]), 1, 32, E4M3)
    assert broken[0, 1] == float("inf") and torch.isnan(broken[0, 2]), "nothing that isn't finite is hidden"


def test_blocks_do_not_see_each_other() -> None:
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(3, 300, generator=draw)
    lone = values.clone()
    lone[1, 130] = 1e4
    for rows, columns in ((1, 128), (1, 32)):
        plain, disturbed = round_in_blocks(values, rows, columns, E4M3), round_in_blocks(lone, rows, columns, E4M3)
        block = slice(130 // columns * columns, (130 // columns + 1) * columns)
        untouched = torch.ones_like(values, dtype=torch.bool)
        untouched[1, block] = False
        assert torch.equal(plain[untouched], disturbed[untouched]) and not torch.equal(
            plain[1, block], disturbed[1, block]
        )
        assert (plain - values).abs().max() / values.abs().max() < 2.0**-4
    square = round_in_blocks(lone, 128, 128, E4M3)
    assert torch.equal(square[:, :128], round_in_blocks(values, 128, 128, E4M3)[:, :128])


def test_delayed_scales_come_from_earlier_training_passes() -> None:
    caster = Caster("delayed")
    values = torch.tensor([1000.0, 1.0])
    assert caster(values, E4M3)[0] == 448.0  # nothing seen yet: scale 1, saturated
    assert caster(values, E4M3)[0] == 448.0  # the same pass
    caster.next_pass()
    assert caster(values, E4M3)[0] == pytest.approx(1000.0, rel=1e-6)
    caster(values * 4, E4M3, record=False)  # scoring leaves no mark
    caster.next_pass()
    assert caster(values * 4, E4M3)[0] == pytest.approx(1000.0, rel=1e-6)


# ------------------------------------------------------------------ the policy


@ranks
def test_it_is_what_rounding_the_linear_layers_of_a_transformers_model_gives(
    rank: int, hf: Path, tmp_path: Path
) -> None:
    """MX blocks lie within a row, so it doesn't matter that megatron joins q, k, v and gate, up into one matrix.
    Adapters read what isn't rounded.
    """
    from transformers import AutoModelForCausalLM

    def mx(values: torch.Tensor) -> torch.Tensor:  # written again, block by block, with Python's numbers
        out = values.detach().clone().reshape(-1, values.shape[-1])
        for row in out:
            for start in range(0, row.shape[0], 32):
                block = row[start : start + 32]
                scale = 2.0 ** math.floor(math.log2(448.0 / float(block.abs().max())))
                block.copy_((block * scale).to(torch.float8_e4m3fn).float() / scale)
        return out.reshape(values.shape)

    policy, adapters = build(hf, fp8="mxfp8", lora=LoraConfig(rank=rank)), {}
    if rank:
        for _ in range(2):
            policy.update(plain_trees(), pact_terms)
        policy.export_adapter(tmp_path)
        adapters = load_file(tmp_path / "adapter_model.safetensors")
    scale = policy.config.lora.alpha / max(rank, 1)

    def forward(name: str, linear: torch.nn.Linear, rounds: bool, values: torch.Tensor) -> torch.Tensor:
        part = torch.nn.functional.linear(mx(values), mx(linear.weight)) if rounds else linear(values)
        part = part if linear.bias is None or not rounds else part + linear.bias
        first, second = (adapters.get(f"base_model.model.{name}.lora_{factor}.weight") for factor in "AB")
        return part if first is None else part + scale * values @ first.T @ second.T

    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    last = len(model.model.layers) - 1
    for name, module in list(model.model.layers.named_modules()):
        if isinstance(module, torch.nn.Linear):
            rounds = int(name.split(".")[0]) not in (0, last)
            plain = copy.copy(module)
            module.forward = partial(forward, f"model.layers.{name}", plain, rounds)
    tokens = [3, 17, 100, 5, 64, 9, 120, 44, 2, 81]
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    expected = logits[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    tree = TokenTree([Segment(tokens, -1, [False] + [True] * 9)])
    torch.testing.assert_close(policy.logprobs([tree])[0], expected, rtol=0, atol=2e-5)


@ranks
@pytest.mark.parametrize("recipe", FP8_RECIPES)
def test_ratios_of_an_on_policy_step_are_exactly_1(recipe: str, rank: int, hf: Path) -> None:
    """The old policy is scored in the update's precision; under the delayed recipe, too, until the next pass."""
    policy, trees = build(hf, fp8=recipe, lora=LoraConfig(rank=rank)), plain_trees()
    if rank and recipe != "delayed":  # B is 0 before
        policy.update(plain_trees(), pact_terms)
    for tree, now in zip(trees, policy.logprobs(trees), strict=True):
        tree.streams["old_logprobs"] = now
    metrics = policy.update(trees, pact_terms).metrics
    assert (
        metrics["max/ratio_h"] == 1.0
        and metrics["max/ratio_x"] == 1.0
        and metrics["clip/h"] == metrics["clip/x"] == 0.0
    )


def test_old_policy_in_another_precision_would_bend_the_ratios(hf: Path) -> None:
    """Why it isn't scored in full precision: the ratio would carry the rounding."""
    policy, exact = build(hf, fp8="tensorwise"), build(hf)
    trees = plain_trees()
    for tree, now in zip(trees, exact.logprobs(trees), strict=True):
        tree.streams["old_logprobs"] = now
    metrics = policy.update(trees, pact_terms).metrics
    assert metrics["max/ratio_h"] > 1.01 and metrics["approx_kl/h"] > 0


@ranks
@pytest.mark.parametrize("recipe", FP8_RECIPES)
def test_what_fp8_does_to_a_pact_batch(recipe: str, rank: int, hf: Path) -> None:
    """Log-probs move, but by little; the gradient keeps its direction; the reference is not touched."""
    lora = LoraConfig(rank=rank)
    policy, exact = build(hf, fp8=recipe, lora=lora), build(hf, lora=lora)
    for either in (
        policy,
        exact,
    ):  # a pass without effect on the weights, from which the delayed recipe takes its scales
        either.update(plain_trees(), pact_terms, lr=0.0)
    trees = plain_trees()
    rounded, plain = joined(policy.logprobs(trees)), joined(exact.logprobs(trees))
    error = (rounded - plain).abs()
    assert 1e-4 < error.mean() < 0.15 and error.max() < 1.0, (error.mean(), error.max())
    assert torch.equal(joined(policy.reference_logprobs(trees)), joined(exact.reference_logprobs(trees)))
    assert torch.equal(joined(policy.logprobs(trees)), rounded), "the reference pass leaves the switch where it was"
    ours, theirs = policy.update(trees, pact_terms), exact.update(trees, pact_terms)
    assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=0.15) and ours.grad_norm != theirs.grad_norm


def gradient(policy: MegatronPolicy, trees: list[TokenTree]) -> torch.Tensor:
    policy.update(trees, pact_terms, lr=0.0)
    return torch.cat([param.main_grad.flatten() for param in policy.chunks[0].parameters() if param.requires_grad])


@ranks
def test_the_gradient_keeps_its_direction(rank: int, hf: Path) -> None:
    lora = LoraConfig(rank=rank)
    exact = gradient(build(hf, lora=lora), plain_trees())
    for recipe in ("tensorwise", "blockwise", "mxfp8"):
        rounded = gradient(build(hf, fp8=recipe, lora=lora), plain_trees())
        assert torch.nn.functional.cosine_similarity(rounded, exact, dim=0) > 0.97, recipe


def test_layers_kept_in_bf16_are_untouched(hf: Path) -> None:
    trees = plain_trees(3)
    exact = joined(build(hf).logprobs(trees))
    errors = [
        float((joined(build(hf, fp8="tensorwise", fp8_bf16_layers=kept).logprobs(trees)) - exact).abs().mean())
        for kept in (0, 1)
    ]
    assert errors[0] > errors[1] > 0
    with pytest.raises(ConfigError, match="leaves none of 4 layers"):
        build(hf, fp8="tensorwise", fp8_bf16_layers=2)


@pytest.mark.parametrize("recipe", FP8_RECIPES)
def test_padding_changes_nothing(recipe: str, hf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales are taken over real tokens: rows padded to 512 tokens give the log-probs and the loss of rows padded to
    the recipe's multiple.
    """
    trees = plain_trees(5)
    policy = build(hf, fp8=recipe)
    plain, result = joined(policy.logprobs(trees)), build(hf, fp8=recipe).update(trees, pact_terms)
    monkeypatch.setitem(ALIGNMENT, recipe, 512)
    padded = build(hf, fp8=recipe)
    assert padded.alignment == 512
    torch.testing.assert_close(joined(padded.logprobs(trees)), plain, rtol=0, atol=2e-6)
    again = padded.update(trees, pact_terms)
    assert again.loss == pytest.approx(result.loss, abs=1e-6) and again.grad_norm == pytest.approx(
        result.grad_norm, rel=1e-5
    )


def test_without_transformer_engine_it_says_so_and_goes_on(hf: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = build(hf, fp8="blockwise", fp8_emulate=False)
    assert plain.fp8 is None and "policy.fp8=blockwise needs a GPU with FP8 and Transformer Engine" in caplog.text
    trees = plain_trees(3)
    assert torch.equal(joined(plain.logprobs(trees)), joined(build(hf).logprobs(trees)))


@pytest.mark.parametrize(
    ("capability", "asked", "runs"),
    [
        ((8, 0), "auto", None),
        ((8, 0), "tensorwise", None),
        ((8, 9), "auto", "tensorwise"),
        ((9, 0), "auto", "blockwise"),
        ((9, 0), "tensorwise", "tensorwise"),
        ((10, 0), "auto", "mxfp8"),
        (None, "auto", None),
    ],
)
def test_the_hardware_decides(capability: tuple[int, int] | None, asked: str, runs: str | None) -> None:
    assert PolicyConfig(fp8=asked).resolved_fp8(capability=capability, has_te=True) == runs
    assert PolicyConfig(fp8=asked).resolved_fp8(capability=capability, has_te=False) is None


def test_a_recipe_that_this_gpu_has_not_is_refused_by_name() -> None:
    with pytest.raises(
        ConfigError, match=r"mxfp8 has no kernels on compute capability \(9, 0\); it has tensorwise, blockwise"
    ):
        PolicyConfig(fp8="mxfp8").resolved_fp8(capability=(9, 0), has_te=True)


def test_scales_that_move_with_every_micro_batch_are_refused_where_they_are_real() -> None:
    delayed = PolicyConfig(fp8="delayed", fp8_bf16_layers=0)
    with pytest.raises(ConfigError, match="policy.fp8=delayed scales by what earlier micro-batches held"):
        delayed.resolved_fp8(capability=(9, 0), has_te=True)
    assert delayed.resolved_fp8(capability=(9, 0), has_te=False) is None
    assert replace(delayed, fp8_emulate=True).resolved_fp8(capability=None, has_te=False) == "delayed"
