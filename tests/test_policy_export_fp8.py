"""FP8 exports: the rounding, the public format of the folder, and what transformers computes with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pact_nemo.checkpoints.manifest import new_export, verify_manifest
from pact_nemo.checkpoints.quantised import materialise
from pact_nemo.errors import CheckpointError
from pact_nemo.policy.export import fp8_block
from pact_nemo.serving.refit import check_same_tensors
from tests.workers.policy_kit import loaded, make_model


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (200, 130), (1, 1), (127, 257)])
def test_fp8_values_are_within_the_types_rounding_and_scales_are_exact(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, shape[1])
    values, scale = fp8_block.quantise(weight)
    assert (
        values.dtype == torch.float8_e4m3fn
        and values.shape == weight.shape
        and tuple(scale.shape) == fp8_block.scale_shape(shape)
    )
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = weight[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
            assert scale[i, j] == block.abs().max() / 448
    spread = scale.repeat_interleave(128, 0)[: shape[0]].repeat_interleave(128, 1)[:, : shape[1]]
    error = (fp8_block.dequantise(values, scale) - weight).abs()
    # three bits of mantissa: half a step is 2^-4 of the value; below 2^-6 (subnormal) it is 2^-10 of the scale
    assert (error <= torch.maximum(weight.abs() * 2**-4, spread * 2**-10) * (1 + 1e-5)).all()


def test_fp8_blocks_of_zeros_stay_zero() -> None:
    values, scale = fp8_block.quantise(torch.zeros(130, 130))
    assert (scale == 1).all() and (fp8_block.dequantise(values, scale) == 0).all()


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_an_fp8_folder_holds_the_public_format(family: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    source = make_model(tmp_path / "model", family)
    folder = materialise(source, tmp_path / "cache", "fp8_block")
    assert (
        materialise(source, tmp_path / "cache", "fp8_block") == folder
        and verify_manifest(folder).extra["dtype"] == "fp8_block"
    )
    weights, stored = load_file(source / "model.safetensors"), loaded(folder)
    converted = {name.removesuffix("_scale_inv") for name in stored if name.endswith("_scale_inv")}
    assert converted == {name for name in weights if "_proj.weight" in name} and converted
    for name, weight in weights.items():
        if name in converted:
            values, scale = fp8_block.quantise(weight)
            assert torch.equal(stored[name].view(torch.uint8), values.view(torch.uint8)) and torch.equal(
                stored[name + "_scale_inv"], scale
            )
        else:
            assert torch.equal(stored[name], weight.bfloat16())
    settings = AutoConfig.from_pretrained(folder).quantization_config
    assert (
        settings["quant_method"] == "fp8"
        and settings["weight_block_size"] == [128, 128]
        and settings["activation_scheme"] == "dynamic"
    )
    kept = set(settings["modules_to_not_convert"])
    assert {"lm_head", "model.embed_tokens", "model.norm"} <= kept and not {
        name.removesuffix(".weight") for name in converted
    } & kept
    assert family != "qwen3_moe" or "model.layers.0.mlp.gate" in kept, "a router is not converted"

    # a server that was started from FP8 takes FP8 only, and the other way round
    plain = materialise_copy(source, tmp_path / "plain")
    check_same_tensors(folder, folder)
    for export, like in ((folder, plain), (plain, folder)):
        with pytest.raises(CheckpointError, match="_scale_inv"):
            check_same_tensors(export, like)


def materialise_copy(source: Path, root: Path) -> Path:
    with new_export(root, 0) as folder:
        save_file(load_file(source / "model.safetensors"), folder / "model.safetensors")
    return root / "v000000"


def test_transformers_computes_with_an_fp8_folder_what_the_dequantised_weights_give(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = make_model(tmp_path / "model", "llama")
    folder = materialise(source, tmp_path / "cache", "fp8_block")
    stored = loaded(folder)
    expected = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, param in expected.named_parameters():
            value = stored[name]
            param.copy_(
                fp8_block.dequantise(value, stored[name + "_scale_inv"]) if name + "_scale_inv" in stored else value
            )
    from transformers import FineGrainedFP8Config

    got = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=FineGrainedFP8Config(dequantize=True)
    ).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(got(ids).logits, expected(ids).logits, rtol=0.05, atol=0.05)
