"""Recipes at scale: exact parameter counts, layouts that divide and fit, and one definition behind every way to
launch.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pact_nemo.config.limits import evaluation_limits, training_limits
from pact_nemo.config.load import load_config
from pact_nemo.config.recipes import RECIPES, Recipe, recipe
from pact_nemo.config.schema import to_yaml
from pact_nemo.errors import ConfigError
from pact_nemo.planning.from_config import GIB, ModelShape, expected_lengths, model_shape, run_plan
from pact_nemo.planning.generation import OUTSIDE_SHARE

REPO = Path(__file__).resolve().parents[1]
FULL = REPO / "conf" / "pact_bfcl.yaml"
# what the model cards say, in billions
SAID = {"qwen3_0p6b": 0.6, "qwen3_1p7b": 1.7, "qwen3_4b": 4.0, "qwen3_8b": 8.2, "qwen3_14b": 14.8, "qwen3_32b": 32.8, "qwen3_30b_a3b": 30.5, "qwen2p5_72b": 72.7, "llama3p1_70b": 70.6}  # fmt: skip  # noqa: E501

every_recipe = pytest.mark.parametrize("name", RECIPES)


def hf_config(found: Recipe) -> object:
    shape = dict(found.shape)
    return AutoConfig.for_model(shape.pop("model_type"), **shape)


@every_recipe
def test_parameters_are_counted_exactly_as_transformers_builds_them(name: str) -> None:
    found = recipe(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config(found))
    if found.shape["tie_word_embeddings"]:
        model.tie_weights()
    built = sum(parameter.numel() for parameter in model.parameters())
    shape = ModelShape.from_hf(found.shape)
    assert shape.parameters == built
    if shape.experts:
        assert shape.expert_parameters == sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    assert built / 1e9 == pytest.approx(SAID[re.sub(r"_\d+xh100_.*", "", name)], abs=0.06)


@every_recipe
def test_a_layout_divides_model_and_ranks_and_fits_its_gpus_by_the_plan(name: str) -> None:
    found = recipe(name)
    config = load_config([FULL, found])
    shape, policy = model_shape(config), config.policy
    policy.validate(cuda=False, world_size=found.world_size)
    for size in (policy.tensor_parallel, found.server.tensor_parallel_size):
        assert shape.heads % size == 0 and shape.kv_heads % size == 0 and found.gpus_per_node % size == 0
    assert shape.layers % policy.pipeline_parallel == 0 and (
        not shape.experts or shape.experts % policy.expert_parallel == 0
    )
    assert found.server.max_model_len <= shape.positions
    data = found.world_size // (policy.tensor_parallel * policy.pipeline_parallel * policy.context_parallel)
    assert config.trainer.mini_batch_size % data == 0
    plan = run_plan(config)
    assert plan.fits and plan.hardware.memory == found.gpu_gib * 1e9 and plan.layout.world == found.world_size, (
        plan.memory
    )
    engines = found.world_size // found.server.tensor_parallel_size
    alone = run_plan(load_config([FULL, found], ["rollout.server.engines=1"]))
    assert (plan.server.servers, alone.server.servers) == (engines, 1), "engines on all GPUs"
    assert plan.step < 0.9 * alone.step if engines > 1 else plan.step == alone.step
    assert plan.memory.total == alone.memory.total, "the fullest GPU is the one beside an engine"
    card = found.gpu_gib * 1e9 / GIB
    assert plan.server.time_sharing and plan.server.share > 0.75
    server = plan.server.share * card
    assert plan.memory.server == OUTSIDE_SHARE  # asleep beside the trainer
    weights = 2 * shape.parameters / found.server.tensor_parallel_size / GIB
    token = (
        2 * 2 * shape.layers * shape.kv_heads * shape.head_dim / found.server.tensor_parallel_size / GIB
    )  # K and V, bf16
    assert (
        weights + 2.0 + 4 * found.server.max_model_len * token < server
    )  # at least four of the longest sequences at once


@every_recipe
def test_the_name_says_model_gpus_hardware_and_precision(name: str) -> None:
    found = recipe(name)
    assert found.name == name and f"_{found.world_size}xh100_" in name
    assert ("_lora" in name) == (found.policy.lora.rank > 0)
    precision = "_fp8" if found.policy.fp8 else f"_{found.policy.precision}"
    assert name.endswith((precision, "_lora") if found.policy.lora.rank else precision)


def test_adapters_learn_faster_than_all_weights_and_a_word_still_wins() -> None:
    name = "qwen3_32b_8xh100_lora"
    resolved = load_config([FULL, recipe(name)])
    assert (resolved.optimizer.lr, resolved.warmup.lr) == (1e-5, 2e-4)
    config = load_config([FULL, recipe(name)], ["optimizer.lr=3e-5", "policy.lora.rank=16"])
    assert (config.optimizer.lr, config.policy.lora.rank, config.policy.lora.alpha) == (3e-5, 16, 64.0)


def test_the_papers_runs_are_recipes_setting_for_setting() -> None:
    for name in ("qwen3_1p7b_4xh100_bf16", "qwen3_4b_4xh100_bf16"):
        config = load_config([FULL, recipe(name)])
        objective, trainer, sampling = config.objective, config.trainer, config.rollout.sampling
        assert (recipe(name).world_size, trainer.batch_size, trainer.mini_batch_size, objective.group_size) == (
            4,
            256,
            32,
            8,
        )
        assert (config.optimizer.lr, trainer.steps, objective.sft_coef, sampling.max_response_tokens) == (
            1e-6,
            24,
            0.1,
            23000,
        )
        assert (
            config.rollout.server.max_model_len
            == 30000
            == config.tasks.max_prompt_tokens + sampling.max_response_tokens
        )
        assert (config.optimizer.weight_decay, config.optimizer.betas, config.optimizer.clip_grad) == (
            0.01,
            [0.9, 0.999],
            1.0,
        )


@every_recipe
@pytest.mark.parametrize("benchmark", ["bfcl", "ftrl", "toolhop"])
def test_no_limit_cuts_a_thought_that_the_papers_setting_allows(name: str, benchmark: str) -> None:
    """One turn may take the whole response; the server holds a prompt and it, and waits for it at a tenth of a usual
    decoding speed.
    """
    words = [] if benchmark == "bfcl" else ["tasks.path=rows.jsonl"]
    config = load_config([REPO / "conf" / f"pact_{benchmark}.yaml", recipe(name)], words)
    for limits in (training_limits(config), evaluation_limits(config)):
        assert limits.max_turn_tokens == limits.max_response_tokens == 23000
        assert limits.max_model_len >= config.tasks.max_prompt_tokens + limits.max_response_tokens
    assert config.rollout.server.max_model_len <= model_shape(config).positions
    assert limits.max_turn_tokens / config.rollout.server.request_timeout_s < 8
    assert (
        expected_lengths(config).longest == 23000
        and config.trainer.steps == 24
        and config.optimizer.weight_decay == 0.01
    )


def test_files_and_overrides_win_over_a_recipe_and_it_round_trips(tmp_path: Path) -> None:
    config = load_config([FULL, recipe("qwen3_4b_4xh100_bf16")], ["policy.tensor_parallel=4", "trainer.steps=3"])
    assert (config.policy.tensor_parallel, config.trainer.steps, config.model.tool_format) == (4, 3, "hermes")
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(config))
    assert load_config(saved) == config
    with pytest.raises(ConfigError, match="no recipe 'qwen9'; known: qwen3_0p6b"):
        recipe("qwen9")


def test_the_70b_recipe_plans_without_weights_and_asks_for_them_before_it_runs(tmp_path: Path) -> None:
    command = [sys.executable, str(REPO / "recipes" / "pact_70b.py")]
    dry = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert dry.returncode == 0, dry.stderr
    assert "meta-llama/Llama-3.1-70B-Instruct: 70,554 M parameters" in dry.stdout
    assert "64 process(es): TP 4 x PP 4 x CP 1 x DP 4" in dry.stdout
    bare = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert bare.returncode == 2 and "model.path=/models/Llama-3.1-70B-Instruct" in bare.stderr
    assert not list(tmp_path.iterdir())
