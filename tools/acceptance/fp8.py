"""The second step: Transformer Engine's layers, its attention, and its FP8 recipes."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tools.acceptance.hardware import machine
from tools.acceptance.kit import Settings, checks_of
from tools.acceptance.models import (
    difference,
    forget_peak,
    lengths,
    memory_gib,
    random_model,
    rows,
    step_config,
    step_groups,
)
from tools.acceptance.trainer import families, kernels

RECIPES = ("tensorwise", "blockwise")


def _policy(settings: Settings, **policy: Any) -> Any:
    """A policy of the recipe's model whose weights no step changes, and its config."""
    from tools.benches.kit import still_policy

    if settings.small and policy.get("fp8") is not None and not torch.cuda.is_available():
        policy.update(fp8_emulate=True, recompute="none", fp8_bf16_layers=0)
    config = step_config(settings)
    config = replace(config, policy=replace(config.policy, **policy))
    return still_policy(config, random_model(settings)), config


def layers(settings: Settings) -> dict[str, Any]:
    """Which modules the model consists of, and that an FP8 recipe without kernels here is refused by name."""
    from pact_nemo.errors import ConfigError

    policy, _ = _policy(settings)
    layer = policy.chunks[0].decoder.layers[0]
    found: dict[str, Any] = {
        "modules": sorted({type(module).__name__ for module in layer.modules()}),
        "final_norm": type(policy.chunks[0].decoder.final_layernorm).__name__,
    }
    try:
        _policy(settings, fp8="mxfp8")
        found["mxfp8"] = "accepted"
    except ConfigError as error:
        found["mxfp8"] = str(error)
    return found


def _recipe(settings: Settings, name: str | None) -> dict[str, Any]:
    """One FP8 recipe, or bf16: log-probs, first ratios, gradient norm, seconds of a step, peak memory, plan.

    The log-probs are kept in the scratch folder; the others are compared with those of bf16.
    """
    from pact_nemo.planning.from_config import run_plan
    from tools.benches.kit import stand_in, timed_step
    from tools.benches.packing import trees_of

    policy, config = _policy(settings, fp8=name)
    groups = step_groups(config, settings)
    trees = trees_of(groups, config)[:2]
    logprobs, again = (rows(policy.logprobs(trees)) for _ in range(2))
    _weigh_evenly(trees)
    result = policy.update(trees, _loss)
    reference = settings.folder / "bf16_logprobs.safetensors"
    if name is None:
        save_file({"logprobs": logprobs}, reference)
    run = stand_in(config, policy)
    run.state.step = 1
    forget_peak()
    timed = [timed_step(run, groups) for _ in range(3)][1:]
    plan = run_plan(config, world=1, lengths=lengths(settings))
    return {
        "ran": policy.fp8,
        "against_bf16": difference(logprobs, load_file(reference)["logprobs"]) if reference.is_file() else None,
        "again": difference(again, logprobs),
        "first_ratio": difference(rows(result.logprobs), logprobs),
        "grad_norm": result.grad_norm,
        **{key: statistics.median(row[key] for row in timed) for key in ("score", "update", "tokens")},
        "memory_gib": memory_gib(),
        "plan_gib": {key: value / 2**30 for key, value in plan.memory.parts.items()},
        "plan_seconds": dict(plan.phases),
    }


def bf16(settings: Settings) -> dict[str, Any]:
    return _recipe(settings, None)


def tensorwise(settings: Settings) -> dict[str, Any]:
    return _recipe(settings, "tensorwise")


def blockwise(settings: Settings) -> dict[str, Any]:
    return _recipe(settings, "blockwise")


def _loss(logprob: torch.Tensor, streams: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return -(logprob * streams["weight"]).sum(), {}


def _weigh_evenly(trees: list[Any]) -> None:
    """Give each tree the stream that :func:`_loss` reads."""
    for tree in trees:
        tree.streams = {"weight": torch.full((tree.num_scored,), 1.0 / tree.num_scored)}


def _first_step(
    policy: Any, trees: list[Any], loss: Any, expected: torch.Tensor | None
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Log-probs before an update, and how far they are from ``expected`` (None: from themselves) and from the update's
    own, whose first ratios they give.
    """
    logprobs = rows(policy.logprobs(trees))
    result = policy.update(trees, loss)
    return logprobs, {
        **difference(logprobs, logprobs if expected is None else expected),
        "first_ratio": difference(rows(result.logprobs), logprobs),
        "grad_norm": result.grad_norm,
    }


def attention(settings: Settings) -> dict[str, Any]:
    """Transformer Engine's own attention on separate sequences against torch's on the tree."""
    if not torch.cuda.is_available():
        return {"skipped": "no GPU"}
    from tools.benches.kit import stand_in, timed_step
    from tools.benches.packing import trees_of

    found: dict[str, Any] = {}
    expected: torch.Tensor | None = None
    for name, words in (
        ("tree_sdpa", {}),
        ("separate", {"share_prefix": False}),
        ("te", {"share_prefix": False, "attention": "te"}),
    ):
        policy, config = _policy(settings, **words)
        groups = step_groups(config, settings, prompts=1)
        logprobs = rows(policy.logprobs(trees_of(groups, config)[:1]))
        expected = logprobs if expected is None else expected
        timed = [timed_step(stand_in(config, policy), groups) for _ in range(2)][-1]
        found[name] = {**difference(logprobs, expected), "update": timed["update"], "tokens": timed["tokens"]}
        del policy
        torch.cuda.empty_cache()
    return found


def experts(settings: Settings) -> dict[str, Any]:
    """A mixture of experts under each FP8 recipe: runs, and how far from bf16."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    from tests.workers.policy_kit import loss_fn, make_trees
    from tests.workers.small_policy import build

    folder = settings.folder / "experts"
    config = Qwen3MoeConfig(
        vocab_size=131,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=512,
        moe_intermediate_size=256,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}\n')
    trees, found, expected = make_trees(6, seed=11, scale=3), {}, None
    for recipe in (None, *RECIPES):
        words: dict[str, Any] = {"fp8_emulate": True} if settings.small and recipe is not None else {}
        try:
            precision = "bf16" if torch.cuda.is_available() else "fp32"
            policy = build(folder, precision=precision, micro_batch_tokens=512, fp8=recipe, **words)
            logprobs, figures = _first_step(policy, trees, loss_fn, expected)
            expected = logprobs if expected is None else expected
            found[str(recipe)] = {
                **figures,
                "experts": sorted(
                    {type(module).__name__ for module in policy.chunks[0].decoder.layers[0].mlp.modules()}
                ),
            }
        except Exception as error:
            found[str(recipe)] = {"error": f"{type(error).__name__}: {error}"[:1500]}
    return found


def adapters(settings: Settings) -> dict[str, Any]:
    """Adapters on a base in FP8: how far from bf16, the first ratios, and the gradient that reaches the adapters."""
    from pact_nemo.policy.config import LoraConfig
    from tools.benches.packing import trees_of

    found: dict[str, Any] = {}
    expected: torch.Tensor | None = None
    for recipe in (None, *RECIPES):
        policy, config = _policy(settings, fp8=recipe, lora=LoraConfig(rank=32))
        trees = trees_of(step_groups(config, settings, prompts=1), config)[:1]
        _weigh_evenly(trees)
        logprobs, figures = _first_step(policy, trees, _loss, expected)
        expected = logprobs if expected is None else expected
        found[str(recipe)] = {**figures, "memory_gib": memory_gib()}
        del policy
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return found


GROUPS = (
    checks_of("layers", 60, machine, layers),
    checks_of("attention", 130, attention),
    checks_of("bf16", 110, bf16),
    checks_of("blockwise", 110, blockwise),
    checks_of("tensorwise", 110, tensorwise),
    checks_of("kernels", 60, kernels),
    checks_of("experts", 60, experts),
    checks_of("adapters", 60, adapters),
    checks_of("families", 100, families),
)
