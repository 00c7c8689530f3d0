"""Adapters: settings and models that are refused by name, and what a refit brings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pact_nemo.checkpoints.adapter_exports import BASE_KEY, adapted_matrices, base_digest, check_fits, is_adapter
from pact_nemo.checkpoints.hf import export_version
from pact_nemo.checkpoints.manifest import prune_exports, read_manifest, verify_manifest
from pact_nemo.checkpoints.quantised import materialise
from pact_nemo.config.load import load_config
from pact_nemo.config.lora import adapter_room, refit_kind
from pact_nemo.config.recipes import recipe
from pact_nemo.errors import CheckpointError, ConfigError
from pact_nemo.objective.schedules import StepClock
from pact_nemo.planning.from_config import run_plan
from pact_nemo.policy.config import ADAPTER, MERGED, LoraConfig, PolicyConfig
from pact_nemo.preflight.checks import check_layout
from pact_nemo.rehearsal.case import SETTINGS
from pact_nemo.runtime.tensor_files import read_tensors
from pact_nemo.tracking.run_folder import Workspace
from pact_nemo.training.served_weights import ServedWeights
from pact_nemo.training.state import RunState
from pact_nemo.training.time_sharing import TimeSharing
from tests.test_policy_lora import lora
from tests.workers.small_policy import build


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": -1}, r"policy\.lora\.rank=-1"),
        ({"alpha": 0.0}, r"policy\.lora\.alpha"),
        ({"dropout": 0.1}, r"policy\.lora\.dropout=0\.1: .*only 0"),
        ({"experts": True}, r"policy\.lora\.experts"),
        ({"targets": []}, "at least one"),
        ({"targets": ["linear_qkv", "linear_qkv"]}, "each once"),
        ({"targets": ["q_proj"]}, "choose among linear_qkv"),
        ({"targets": ["lm_head"]}, "take it out"),
    ],
)
def test_settings_that_are_not_computed_are_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PolicyConfig(lora=LoraConfig(**{"rank": 4, **fields})).validate_values()


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        (
            "qwen3_30b_a3b_16xh100_bf16",
            ["policy.lora.rank=8"],
            r"are experts in this model .*\[linear_qkv,linear_proj\]",
        ),
        (
            "qwen3_4b_1xh100_lora",
            ["policy.lora.rank=4096", "rollout.lora_refit=merged"],
            r"policy\.lora\.rank=4096 is above the rank that linear_qkv itself can have, 2560; lower it",
        ),
    ],
)
def test_what_a_model_has_no_place_for_is_refused_before_its_weights_are_read(
    name: str, words: list[str], message: str
) -> None:
    """By a dry run's check of the layout, and by the planner."""
    config = load_config([SETTINGS, recipe(name)], words)
    with pytest.raises(ConfigError, match=message):
        check_layout(config, None)
    with pytest.raises(ConfigError, match=message):
        run_plan(config, world=recipe(name).world_size)


def test_pairs_of_settings_that_are_not_computed_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="multiple"):
        PolicyConfig(lora=LoraConfig(rank=3), tensor_parallel=2).validate_values()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["policy.lora.rank=513"], r"policy\.lora\.rank=513: .*rollout\.lora_refit=merged"),
        (["rollout.export_dtype=fp8_block"], r"rollout\.export_dtype=fp8_block .*rollout\.lora_refit=merged"),
        (["rollout.lora_refit=whole"], "must be one of adapter, merged"),
        (["rollout.server.extra_args=[--max-loras=4]"], "extra_args holds --max-loras"),
    ],
)
def test_what_a_server_cant_serve_beside_its_base_is_refused_by_name(words: list[str], message: str) -> None:
    preset = Path(__file__).parents[1] / "conf" / "pact_bfcl_lora-smollm2_135m-cpu.yaml"
    found = load_config([preset], [])
    assert [refit_kind(found, cuda=cuda) for cuda in (True, False)] == [ADAPTER, MERGED]
    assert refit_kind(load_config([preset], ["rollout.lora_refit=adapter"]), cuda=False) == ADAPTER
    assert refit_kind(load_config([preset], ["policy.lora.rank=0"]), cuda=True) == MERGED
    with pytest.raises(ConfigError, match=message):
        load_config([preset], words)
    if words[0].startswith(("policy", "rollout.export")):
        assert adapter_room(load_config([preset], [*words, "rollout.lora_refit=merged"]), cuda=True) is None


@pytest.mark.parametrize("family", ["llama", "llama3", "qwen3_moe"])
def test_an_adapter_is_exported_with_the_base_that_it_belongs_to(
    family: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    base, policy = models(family), build(models(family), lora=lora(family))
    folder = export_version(policy, tmp_path / "exports", 3, kind=ADAPTER)
    manifest = verify_manifest(folder, expect_version=3)
    assert is_adapter(manifest)
    assert sorted(manifest.files) == ["adapter_config.json", "adapter_model.safetensors"]
    assert manifest.extra[BASE_KEY] == base_digest(base)
    check_fits(folder, base)
    copy = materialise(base, tmp_path / "cache", "bfloat16")  # what servers start from, where the base is FP8
    assert base_digest(copy) == base_digest(base)
    check_fits(folder, copy)
    merged = export_version(policy, tmp_path / "exports", 4)
    assert not is_adapter(verify_manifest(merged))
    with pytest.raises(CheckpointError, match="was trained on another base than"):
        check_fits(folder, merged)  # it is rounded to bfloat16
    other = LoraConfig(**{**vars(lora(family)), "targets": ["linear_proj"]})
    smaller = export_version(build(base, lora=other), tmp_path / "exports", 5, kind=ADAPTER)
    assert set(adapted_matrices(read_tensors(smaller))) < set(adapted_matrices(read_tensors(folder)))
    with pytest.raises(CheckpointError, match="exists already"):
        export_version(policy, tmp_path / "exports", 3, kind=ADAPTER)


def test_what_a_refit_brings_follows_the_setting_and_is_kept_and_removed_alike(
    models: Callable[[str], Path], tmp_path: Path
) -> None:
    """Also where a run is resumed with another one: version 1 of before is an adapter then."""
    preset = Path(__file__).parents[1] / "conf" / "pact_bfcl_lora-smollm2_135m-cpu.yaml"
    policy = build(models("llama"), lora=lora())
    weights = ServedWeights(
        load_config([preset], ["rollout.lora_refit=adapter"]),
        Workspace(tmp_path),
        policy,
        generator=None,  # type: ignore[arg-type]
        source=models("llama"),
        state=RunState(1, StepClock(1)),
        note=print,
        sharing=TimeSharing(None, None, on=False),  # type: ignore[arg-type]
    )
    folder = weights.export(1)
    written = (folder / "manifest.json").stat().st_mtime_ns
    assert is_adapter(read_manifest(folder)) and weights.export(1) == folder
    assert (folder / "manifest.json").stat().st_mtime_ns == written, "it was there already"
    adapters = weights.config
    weights.config = load_config([preset], ["rollout.lora_refit=merged"])
    assert weights.export(1) == folder and not is_adapter(verify_manifest(folder, expect_version=1))
    weights.config = adapters
    assert is_adapter(read_manifest(weights.export(1)))
    weights.export(2)
    weights.forget_exports_after(1)
    assert [path.name for path in tmp_path.glob("exports/*")] == ["v000001"]
    assert prune_exports(tmp_path / "exports", keep=1) == [] and weights.export(2).is_dir()
    assert prune_exports(tmp_path / "exports", keep=1) == [1]


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("llama", {"rank": 65}, "linear_qkv itself can have, 64"),
        ("qwen3_moe", {"targets": ["linear_qkv", "linear_fc1"]}, r"linear_fc1, which are experts"),
    ],
)
def test_a_model_without_a_place_for_them_is_refused(
    family: str, fields: dict[str, Any], message: str, models: Callable[[str], Path]
) -> None:
    with pytest.raises(ConfigError, match=message):
        build(models(family), lora=lora(family, **fields))


def test_without_adapters_there_is_none_to_export(models: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"policy\.lora\.rank is 0"):
        build(models("llama")).export_adapter(tmp_path)
