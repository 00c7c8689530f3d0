"""Every shortcut of a step against the same step without it: loss, gradients, log-probs before and after, with all four
terms.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pact_nemo.batches.prompt_groups import PromptGroup, has_advantage
from pact_nemo.batches.prompt_trees import grow_tree
from pact_nemo.config.schema import Config, ObjectiveConfig, TrainerConfig
from pact_nemo.methods.registry import make_method
from pact_nemo.planning.workload import Lengths
from pact_nemo.policy.config import LoraConfig, OptimizerConfig
from pact_nemo.policy.policy import MegatronPolicy
from pact_nemo.training.loop import observe
from pact_nemo.training.stopwatch import Stopwatch
from pact_nemo.training.update import update
from tests.workers.policy_kit import VOCAB, make_model
from tools.benches.kit import stand_in, synthetic_groups
from tools.comparisons.results import CURVES

PLAIN = {"share_prefix": False, "fused_elementwise": False, "score_first_update": True, "skip_zero_advantage": False}


def settings(mini_batch: int, **objective: Any) -> Config:
    config = Config()
    terms = {"kl_coef": 0.05, "sft_coef": 0.5, "entropy_coef": 0.05, "dual_clip": 3.0, "anchor_prob": 0.4, **objective}
    config.objective = ObjectiveConfig(group_size=3, **terms)
    config.rollout.sampling.temperature = 0.8
    config.trainer = TrainerConfig(steps=4, batch_size=4, mini_batch_size=mini_batch)
    config.policy = replace(config.policy, precision="fp32", micro_batch_tokens=128, logprob_chunk=16)
    return config


def batch(config: Config) -> list[PromptGroup]:
    groups = synthetic_groups(
        config, Lengths(12, 18, 9), config.trainer.batch_size, vocabulary=VOCAB, seed=3, spread=0.8
    )
    for k in range(3):  # one prompt whose rollouts all failed, one rollout at the mean
        groups[1].advantages[k][:] = 0.0
    groups[2].advantages[0][:] = 0.0
    return groups


def one_step(
    model: Path, config: Config, *, share_prefix: bool = True, fused_elementwise: bool = True, **trainer: bool
) -> dict[str, Any]:
    policy_config = replace(config.policy, share_prefix=share_prefix, fused_elementwise=fused_elementwise)
    config = replace(config, policy=policy_config, trainer=replace(config.trainer, **trainer))  # type: ignore[arg-type]
    policy = MegatronPolicy(config.policy, OptimizerConfig(lr=1e-3, eps=1e-5), model, seed=1, total_steps=4)
    policy.load_reference(model)
    trained = [parameter for parameter in policy.chunks[0].parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in trained:  # away from the reference, so that the KL term is not 0
            parameter.mul_(1.02).add_(0.01 if not parameter.any() else 0.0)
    run = stand_in(config, policy)
    record = update(run, batch(config), Stopwatch(run.progress))
    gradient = torch.cat([parameter.main_grad.flatten() for parameter in trained])
    weights = torch.cat([parameter.detach().flatten() for parameter in policy.chunks[0].parameters()])
    return {"record": record, "gradient": gradient.clone(), "weights": weights}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One with an output matrix of its own, one whose output matrix is the embedding."""
    return {family: make_model(tmp_path_factory.mktemp(family), family) for family in ("llama", "qwen3")}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize(("mini_batch", "rank"), [(4, 0), (2, 0), (2, 8)])
def test_fast_and_plain_steps_agree(family: str, mini_batch: int, rank: int, models: dict[str, Path]) -> None:
    config = settings(mini_batch)
    config.policy = replace(config.policy, lora=LoraConfig(rank=rank))
    assert config.rollout.importance == "tis"
    plain = one_step(models[family], config, **PLAIN)
    assert all(
        plain["record"][f"loss/{term}"] for term in ("rl_x", "rl_h", "sft_reasoning", "sft_call", "kl", "entropy")
    )
    for name in [*PLAIN, "all"]:
        fast = one_step(
            models[family], config, **{key: value != (name in (key, "all")) for key, value in PLAIN.items()}
        )
        compared = (
            "loss/total",
            "policy/grad_norm",
            "loss/rl_h",
            "loss/rl_x",
            "loss/kl",
            "loss/entropy",
            "policy/entropy",
        )
        for key in (*compared, "mismatch/mean_abs", "latent/trace_call"):
            assert fast["record"][key] == pytest.approx(plain["record"][key], rel=1e-5, abs=1e-6), (name, key)
        torch.testing.assert_close(fast["gradient"], plain["gradient"], rtol=0, atol=1e-5)
        torch.testing.assert_close(fast["weights"], plain["weights"], rtol=0, atol=1e-5)


def test_what_is_told_of_annealing_is_what_the_step_used(models: dict[str, Path]) -> None:
    """The adaptive clock observes a step after its update; weights, level and progress of a record are of one time."""
    config = settings(4)
    config.objective.schedule.kind = "adaptive"
    policy = MegatronPolicy(config.policy, OptimizerConfig(lr=1e-3), models["llama"], seed=1, total_steps=4)
    policy.load_reference(models["llama"])
    run: Any = stand_in(config, policy)
    run.state.clock.value, run.state.step = 0.45, 3
    run.dataset, run.total_steps = SimpleNamespace(dropped={}), 4
    run.progress.message = lambda text: None
    watch = Stopwatch(run.progress)
    record = update(run, batch(config), watch)
    record |= observe(run, [], {**record, "reward/success": 1.0}, watch)
    assert (record["anneal/progress"], record["anneal/prefix_level"]) == (0.45, 2)
    assert record["anneal/call_weight"] == pytest.approx(0.53)
    assert {"gate/anchored", *(key for key in record if key.startswith("anneal/"))} <= set(CURVES), (
        "comparisons keep it"
    )
    assert run.state.clock.value == 0.5  # half: the success; the first gap is as wide as any


def test_without_a_kl_term_the_prompt_only_pass_of_conditioned_prompts_can_be_left_out(models: dict[str, Path]) -> None:
    config = settings(4)
    config.objective.kl_coef, config.objective.entropy_coef, config.rollout.importance = 0.0, 0.0, "off"
    both, one = (one_step(models["llama"], config, both_contexts=flag) for flag in (True, False))
    assert one["record"]["tokens/trained"] < both["record"]["tokens/trained"]
    assert one["record"]["latent/gap_success"] is None and both["record"]["latent/gap_success"] is not None
    for key in ("loss/total", "policy/grad_norm", "loss/rl_h", "loss/rl_x"):
        assert one["record"][key] == pytest.approx(both["record"][key], rel=1e-5, abs=1e-6), key
    torch.testing.assert_close(one["gradient"], both["gradient"], rtol=0, atol=1e-5)
    config.rollout.importance = "tis"  # which needs pi_old(tau | x)
    assert (
        one_step(models["llama"], config, both_contexts=False)["record"]["tokens/trained"]
        == both["record"]["tokens/trained"]
    )


def test_only_rollouts_with_an_advantage_are_computed_under_the_trace(models: dict[str, Path]) -> None:
    config = settings(4)
    config.objective.anchor_prob = 0.0
    groups, method = batch(config), make_method(config)
    found = [grow_tree(g, [5, 5], method, contexts=("x", "h"), skip_zero_advantage=True) for g in groups]
    conditioned = [sorted(k for context, k in p.spans if context == "h") for p in found]
    assert conditioned == [[k for k in range(3) if has_advantage(g, k)] for g in groups]
    assert conditioned[1] == [] and 0 not in conditioned[2] and len(conditioned[0]) == 3
    assert all(
        ("sft", 0) in p.spans and len([1 for context, _ in p.spans if context == "x"]) == 3 for p in found
    )  # SFT and KL go on
    assert found[1].tree.num_tokens < grow_tree(groups[1], [5, 5], method, contexts=("x", "h")).tree.num_tokens
    record = one_step(models["llama"], config)["record"]
    skipped = 12 - sum(len(c) for c in conditioned)
    assert record["rollout/not_conditioned"] == skipped
    config.objective.kl_coef, config.objective.entropy_coef, config.rollout.importance = 0.0, 0.0, "off"
    alone = one_step(models["llama"], config, both_contexts=False)["record"]  # no rollout has a prompt-only pass
    assert alone["rollout/not_conditioned"] == skipped
    assert record["groups/zero_advantage"] == 1


def test_a_temperature_is_a_steeper_output_matrix_for_rollouts_and_changes_nothing_for_the_trace(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """Sampling at 1/2 is sampling at 1 from logits twice as large: pi_theta, pi_old, reference, entropies and mismatch
    all see it.
    """
    steeper = tmp_path / "steeper"
    shutil.copytree(models["qwen3"], steeper)  # whose output matrix is its own
    weights = load_file(steeper / "model.safetensors")
    weights["lm_head.weight"] *= 2.0
    save_file(weights, steeper / "model.safetensors", metadata={"format": "pt"})
    config = settings(4, sft_coef=0.0)  # the trace is scored at 1, whatever rollouts are sampled at
    config.rollout.sampling.temperature = 0.5
    cool = one_step(models["qwen3"], config, score_first_update=True)["record"]
    config.rollout.sampling.temperature = 1.0
    plain, steep = (one_step(model, config, score_first_update=True)["record"] for model in (models["qwen3"], steeper))
    for key in (
        "loss/rl_x",
        "loss/rl_h",
        "loss/kl",
        "loss/entropy",
        "policy/entropy",
        "mismatch/mean_abs",
        "latent/gap_success",
        "max/ratio_h",
    ):
        assert cool[key] == pytest.approx(steep[key], rel=1e-4, abs=1e-6), key
    assert abs(cool["policy/entropy"] - plain["policy/entropy"]) > 1e-3
    assert cool["latent/trace_call"] == pytest.approx(plain["latent/trace_call"], rel=1e-4)
