"""Quantised model folders: block FP8 is computed as its values times its scales, exported in every dtype and refused
where the scales do not fit; every other quantisation is refused by name.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pact_nemo.checkpoints.manifest import verify_manifest
from pact_nemo.checkpoints.quantised import materialise
from pact_nemo.errors import CheckpointError, ConfigError
from pact_nemo.policy.expected_weights import EMBEDDING
from pact_nemo.policy.export import fp8_block
from pact_nemo.policy.model_folder import check_model_folder
from pact_nemo.serving.refit import check_same_tensors
from tests.workers.folder_kit import build, copy, drop, models, ours, shard, theirs
from tests.workers.policy_kit import VOCAB

__all__ = ["models"]  # the fixture


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose matrices are no multiples of a block."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=40,
        intermediate_size=200,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("wide")
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    return folder


def plain(folder: Path, target: Path) -> Path:
    """An FP8 folder's weights as they are meant: value times scale of its block, element by element."""
    stored = load_file(folder / "model.safetensors")
    block = json.loads((folder / "config.json").read_text())["quantization_config"]["weight_block_size"]
    weights = {}
    for name, values in stored.items():
        if name.endswith("_scale_inv"):
            continue
        weights[name] = values.float()
        if f"{name}_scale_inv" in stored:
            rows, columns = (torch.arange(size) // by for size, by in zip(values.shape, block, strict=True))
            weights[name] = values.float() * stored[f"{name}_scale_inv"].float()[rows][:, columns]
    return copy(folder, target, weights, quantization_config=...)


@pytest.mark.parametrize("sharded", [False, True], ids=["one_file", "shards"])
def test_block_fp8_is_dequantised_whatever_the_shapes(sharded: bool, wide: Path, tmp_path: Path) -> None:
    folder = copy(wide, tmp_path / "fp8")
    shutil.copytree(materialise(wide, tmp_path / "cache", "fp8_block"), folder, dirs_exist_ok=True)
    want = theirs(plain(folder, tmp_path / "plain"))
    assert (want - theirs(wide)).abs().max() > 1e-3, "FP8 is not the same model"
    source = shard(folder, tmp_path / "sharded") if sharded else folder
    torch.testing.assert_close(ours(source), want, rtol=0, atol=1e-4)
    assert check_model_folder(source).quantised


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_block_fp8_gives_what_transformers_dequantises(
    family: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    """As published folders have it: scales in bfloat16."""
    from transformers import FineGrainedFP8Config

    made = materialise(models(family), tmp_path / "cache", "fp8_block")
    stored = load_file(made / "model.safetensors")
    scaled = {name: tensor.bfloat16() if name.endswith("_scale_inv") else tensor for name, tensor in stored.items()}
    folder = copy(made, tmp_path / "fp8", scaled)
    want = theirs(folder, quantization_config=FineGrainedFP8Config(dequantize=True))
    torch.testing.assert_close(ours(folder), want, rtol=0, atol=1e-4)


def test_exports_of_an_fp8_source_are_right_in_every_dtype(wide: Path, tmp_path: Path) -> None:
    source = materialise(wide, tmp_path / "cache", "fp8_block")
    policy, meant = build(source), load_file(plain(source, tmp_path / "plain") / "model.safetensors")
    for dtype in ("float32", "bfloat16", "fp8_block"):
        folder = tmp_path / dtype
        policy.export_hf(folder, dtype=dtype)
        started = materialise(source, tmp_path / "cache", dtype)  # what the server starts from
        verify_manifest(started)
        check_same_tensors(folder, started)
        assert ("quantization_config" in json.loads((folder / "config.json").read_text())) == (dtype == "fp8_block")
        got, served = load_file(folder / "model.safetensors"), load_file(started / "model.safetensors")
        assert got.keys() == served.keys() and all(
            torch.equal(got[name].float(), served[name].float()) for name in got
        ), dtype
        if dtype != "fp8_block":
            kind = getattr(torch, dtype)
            assert got.keys() == meant.keys() and all(torch.equal(got[name], meant[name].to(kind)) for name in got)
        torch.testing.assert_close(ours(folder), ours(source), rtol=0, atol=0.05 if dtype == "bfloat16" else 1e-5)


def test_a_copy_of_weights_that_are_not_finite_is_refused_and_leaves_nothing(wide: Path, tmp_path: Path) -> None:
    weights = load_file(wide / "model.safetensors")
    weights[EMBEDDING][0, 0] = torch.inf
    folder = copy(wide, tmp_path / "model", weights)
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight holds NaN or Inf"):
        materialise(folder, tmp_path / "cache", "fp8_block")
    assert not list((tmp_path / "cache").iterdir())


def test_scales_that_do_not_fit_are_refused_by_name(wide: Path, tmp_path: Path) -> None:
    source = materialise(wide, tmp_path / "cache", "fp8_block")
    stored = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    scale = f"{name}_scale_inv"
    for number, (match, weights) in enumerate(
        {
            f"{name} is F8_E4M3 without scales": drop(stored, scale),
            f"{scale} has shape": stored | {scale: stored[scale][:1]},
            f"{scale} stands beside": stored | {name: stored[name].bfloat16()},
            f"{scale} is I8": stored | {scale: stored[scale].to(torch.int8)},
            r"model\.norm\.weight_scale_inv stands beside": stored | {"model.norm.weight_scale_inv": torch.ones(1, 1)},
            f"lacks {name}": drop(stored, name),
        }.items()
    ):
        with pytest.raises(CheckpointError, match=match):
            check_model_folder(copy(source, tmp_path / str(number), weights))
    with pytest.raises(CheckpointError, match=r"_scale_inv is no weight .*quantization_config"):
        check_model_folder(copy(source, tmp_path / "unsaid", stored, quantization_config=...))
    said = json.loads((source / "config.json").read_text())["quantization_config"]
    with pytest.raises(CheckpointError, match="quantization_config says FP8, yet no weight"):
        check_model_folder(
            copy(wide, tmp_path / "stale", load_file(wide / "model.safetensors"), quantization_config=said)
        )


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq"},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"load_in_8bit": True},
        {"quant_method": "compressed-tensors"},
        {"quant_method": "mxfp4"},
        {"quant_method": "fp8"},
        {"quant_method": "fp8", "weight_block_size": [128]},
        {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "static"},
        {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e5m2"},
        {"quant_method": "fp8", "weight_block_size": [True, 128]},
        {},
        [],
        0,
    ],
)
def test_other_quantisations_are_refused_by_name(settings: Any, models: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy(
        models("qwen3"), tmp_path, load_file(models("qwen3") / "model.safetensors"), quantization_config=settings
    )
    with pytest.raises(ConfigError, match=r"config\.json: quantization_config.*unquantised weights"):
        check_model_folder(folder)


def test_fp8_blocks_of_another_size() -> None:
    weight = torch.randn(9, 14, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 4)
    got = fp8_block.dequantise(weight, scale, (4, 4))
    want = torch.tensor([[float(weight[i, j]) * float(scale[i // 4, j // 4]) for j in range(14)] for i in range(9)])
    torch.testing.assert_close(got, want)
