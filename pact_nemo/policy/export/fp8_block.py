"""Block-scaled FP8 weights in the public format of DeepSeek-V3 and Qwen3-FP8 (``quant_method: fp8``), which vLLM and
transformers load.

A weight W [N, K] becomes float8_e4m3fn values and ``<name>_scale_inv`` [ceil(N/128), ceil(K/128)] float32: W ~ value *
scale of its 128 x 128 block, scale = largest magnitude of the block / 448. Only the linear layers inside the decoder
are converted; embeddings, output head, norms, biases and routers stay in bfloat16.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F

FP8_BLOCK = "fp8_block"  #: the export dtype's name in settings
BLOCK = 128  #: rows and columns that share a scale
SCALE_SUFFIX = "_scale_inv"
_LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448
_DECODER_LINEAR = re.compile(
    r"\.layers\.\d+\.(?:.+\.)?\w+_proj\.weight"
)  # q k v o gate up down, of experts too; a router is `mlp.gate`


def is_converted(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a weight of a Hugging Face folder is stored in FP8."""
    return len(shape) == 2 and _DECODER_LINEAR.search(name) is not None and name.endswith("_proj.weight")


def scale_shape(shape: tuple[int, ...], block: tuple[int, int] = (BLOCK, BLOCK)) -> tuple[int, int]:
    """Shape of the scales of a weight [N, K]."""
    rows, columns = shape
    return -(-rows // block[0]), -(-columns // block[1])


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [N, K] float8_e4m3fn and scales [ceil(N/128), ceil(K/128)] float32 of a weight [N, K] in any float
    type.
    """
    rows, columns = weight.shape
    padded = F.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.view(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)
    scale = blocks.abs().amax(dim=(1, 3)) / _LARGEST
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # a block of zeros
    values = (blocks / scale[:, None, :, None]).clamp(-_LARGEST, _LARGEST).view_as(padded)[:rows, :columns]
    return values.to(torch.float8_e4m3fn), scale


def dequantise(values: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] = (BLOCK, BLOCK)) -> torch.Tensor:
    """Weight [N, K] float32 that values and scales stand for, one scale a block of ``block`` rows and columns."""
    rows, columns = values.shape
    spread = scale.float().repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return values.float() * spread


def quantization_config(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Entry ``quantization_config`` of ``config.json`` for a model with these weights."""
    kept = {
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if name.endswith(".weight") and not is_converted(name, shape)
    }
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": sorted(
            kept | {"lm_head"}
        ),  # a head tied to the embeddings has no weight of its own, yet is a module
    }
