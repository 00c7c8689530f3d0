"""Runs from Megatron-Bridge checkpoints, and what is refused before one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pact_nemo.checkpoints.adapter_exports import check_fits
from pact_nemo.checkpoints.hf import export_version
from pact_nemo.checkpoints.megatron_bridge.hf_copy import copy_as_hf
from pact_nemo.checkpoints.megatron_bridge.reading import CheckpointWeights
from pact_nemo.checkpoints.megatron_bridge.settings import bridge_settings
from pact_nemo.checkpoints.megatron_bridge.writing import SAVE, export_bridge_to
from pact_nemo.errors import CheckpointError, ConfigError, PactError
from pact_nemo.policy.architectures import check_architecture
from pact_nemo.policy.config import ADAPTER, LoraConfig, OptimizerConfig, PolicyConfig
from pact_nemo.policy.model_source import model_source
from pact_nemo.policy.policy import MegatronPolicy
from tests.test_checkpoints_megatron_bridge import SLOW, Models, bridge_s_own, policy
from tests.workers.policy_kit import loss_fn, make_model, make_trees
from tests.workers.small_policy import build


@pytest.mark.parametrize("family", ["llama3", "qwen3_window"])
def test_what_megatron_bridge_has_no_setting_for_is_named_before_a_run(family: str, models: Models) -> None:
    with pytest.raises(ConfigError, match="has no Megatron-Bridge checkpoint"):
        bridge_settings(check_architecture(models(family)))


@SLOW
def test_published_rope_of_llama_3_is_a_setting(tmp_path: Path) -> None:
    hf = make_model(tmp_path / "hf", "llama3")
    config = json.loads((hf / "config.json").read_text())
    key = "rope_parameters" if "rope_parameters" in config else "rope_scaling"
    config[key] |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    (hf / "config.json").write_text(json.dumps(config))
    folder = export_bridge_to(policy(hf), tmp_path / "mb", version=0)
    assert bridge_s_own("logits", folder / SAVE, hf)["difference"] < 2e-5


@SLOW
@pytest.mark.parametrize("words", [[], ["policy.pipeline_parallel=2"]])
def test_a_run_from_a_checkpoint_is_the_run_from_its_hf_folder(words: list[str], stage: dict[str, Any]) -> None:
    from tests.workers.recipe_runs import recipe, records, weights

    ranks, cache = 1 + len(words), f"run.cache_dir={stage['folder'] / 'cache'}"
    first = recipe(stage, f"wrote{ranks}", "export.formats=[hf,megatron_bridge]", "trainer.steps=1")
    runs = [
        recipe(stage, f"{name}{ranks}", f"model.path={first / name}", "trainer.steps=1", cache, *words, ranks=ranks)
        for name in ("hf", "megatron_bridge")
    ]
    assert records(runs[0]) == records(runs[1])
    saved, text = first / "megatron_bridge" / SAVE, "one more test"
    from transformers import AutoTokenizer

    expected = AutoTokenizer.from_pretrained(first / "hf")(text)["input_ids"]
    assert bridge_s_own("tokenizer", saved, text)["tokens"] == expected
    one, other = map(weights, runs)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_checkpoint_of_adapters_is_not_written(models: Models, tmp_path: Path) -> None:
    config = PolicyConfig(precision="fp32", lora=LoraConfig(rank=2))
    adapted = MegatronPolicy(config, OptimizerConfig(), models("qwen3"), seed=1, total_steps=4)
    with pytest.raises(PactError, match="policy.lora trains adapters"):
        export_bridge_to(adapted, tmp_path / "mb", version=0)


def test_adapters_on_a_checkpoint_are_those_of_its_copy(models: Models, tmp_path: Path) -> None:
    """The trainer reads the checkpoint, rollout servers its copy in the cache: an adapter belongs to both."""
    source = model_source(export_bridge_to(policy(models("qwen3")), tmp_path / "mb", version=0))
    copy = copy_as_hf(source, tmp_path / "cache", PolicyConfig(precision="fp32", lora=LoraConfig(rank=4)), seed=1)
    trees, found = make_trees(3, seed=5), []
    for weights in (CheckpointWeights(source), None):
        adapted = build(copy, lora=LoraConfig(rank=4), policy={"weights": weights})
        adapted.load_reference(copy)
        for _ in range(2):
            adapted.update(trees, loss_fn)
        found.append([*adapted.logprobs(trees), *adapted.reference_logprobs(trees)])
        folder = export_version(adapted, tmp_path / "exports", len(found), kind=ADAPTER)
        check_fits(folder, copy)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    with pytest.raises(CheckpointError, match="was trained on another base"):
        check_fits(folder, models("llama"))
