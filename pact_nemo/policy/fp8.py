"""FP8 for the decoder's linear layers, and what it does to numbers, emulated where there is no FP8 unit.

Transformer Engine does the real thing through megatron-core's own switches (``TransformerConfig.fp8``, ``fp8_recipe``,
``first_last_layers_bf16``). The emulation hangs on the same switches: it rounds the two operands of every linear
layer's product, and the gradient that comes back into it, to FP8 values and computes on with those in the policy's own
precision. Attention, norms, the router, the embeddings, the vocabulary head and the loss are never in FP8.

Recipes (Transformer Engine's ``common.recipe``; values of a block share one scale that maps their largest magnitude to
the largest FP8 value):

================  ======================================  ==========================  ===============
recipe            block                                   scale from                  gradients
================  ======================================  ==========================  ===============
``delayed``       the tensor                              largest of earlier passes   E5M2
``tensorwise``    the tensor                              itself                      E5M2
``blockwise``     1 x 128 (weights 128 x 128)             itself, a power of two      E4M3
``mxfp8``         1 x 32                                  itself, a power of two      E4M3
================  ======================================  ==========================  ===============
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from pact_nemo.policy import device as devices
from pact_nemo.policy.config import PolicyConfig

logger = logging.getLogger(__name__)

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
#: rows are padded to multiples of this many tokens: what the products of the recipe need
ALIGNMENT = {"delayed": 16, "tensorwise": 16, "blockwise": 128, "mxfp8": 32}
HISTORY = 1024  # passes that the delayed recipe looks back on


def recipe_here(config: PolicyConfig, *, bf16: bool) -> str | None:
    """The FP8 recipe that runs on this machine; None = none, which is said where one was asked for.

    Raises:
        ConfigError: see ``PolicyConfig.resolved_fp8``.
    """
    found = config.resolved_fp8(capability=devices.compute_capability(), has_te=devices.has_transformer_engine())
    if config.fp8 is not None and found is None:
        logger.warning(
            "policy.fp8=%s needs a GPU with FP8 and Transformer Engine, which are not here: running in %s",
            config.fp8,
            "bf16" if bf16 else "fp32",
        )
    return found


def number_format(recipe: str) -> str:
    """megatron's name of the formats: ``hybrid`` = E4M3 forward and E5M2 for gradients, ``e4m3`` = E4M3 for both (fine
    scales need no range).
    """
    return "hybrid" if recipe in ("delayed", "tensorwise") else "e4m3"


@contextlib.contextmanager
def switched_off(chunks: list[Any]) -> Iterator[None]:
    """The chunks' next passes in bf16 (megatron asks its configuration for FP8 at every forward)."""
    formats = [chunk.config.fp8 for chunk in chunks]
    try:
        for chunk in chunks:
            chunk.config.fp8 = None
        yield
    finally:
        for chunk, name in zip(chunks, formats, strict=True):
            chunk.config.fp8 = name


def round_to_fp8(values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``values`` as they are after a saturating cast to ``dtype`` under ``scale`` (broadcast; FP8 value = value x
    scale), in their own dtype. Infinities and NaN stay what they are: the step that meets them has to be refused."""
    largest = torch.finfo(dtype).max
    rounded = (values.float() * scale).clamp(-largest, largest).to(dtype).float() / scale
    return torch.where(torch.isfinite(values), rounded, values.float()).to(values.dtype)


def scale_for(largest: torch.Tensor, dtype: torch.dtype, *, power_of_two: bool) -> torch.Tensor:
    """The scale that takes magnitudes up to ``largest`` to the largest value of ``dtype``; 1 where everything is 0."""
    scale = torch.finfo(dtype).max / largest.float()
    if power_of_two:
        scale = torch.exp2(torch.floor(torch.log2(scale)))
    return torch.where((largest > 0) & torch.isfinite(largest) & torch.isfinite(scale), scale, torch.ones_like(scale))


def round_in_blocks(values: torch.Tensor, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Round a tensor, seen as a matrix of its last dimension, with one power-of-two scale for every block of ``rows`` x
    ``columns`` values.
    """
    matrix = values.reshape(-1, values.shape[-1])
    height, width = matrix.shape
    padded = F.pad(matrix, (0, -width % columns, 0, -height % rows))
    blocks = padded.reshape(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
    scale = scale_for(blocks.abs().amax(dim=(1, 3), keepdim=True), dtype, power_of_two=True)
    return round_to_fp8(blocks, scale, dtype).reshape(padded.shape)[:height, :width].reshape(values.shape)


class Caster:
    """Rounds one operand of one linear layer, pass after pass.

    Args:
        recipe: one of ``policy.config.FP8_RECIPES``.
        weight: the operand is a weight matrix (square blocks under ``blockwise``).
    """

    def __init__(self, recipe: str, *, weight: bool = False):
        self.recipe, self.weight = recipe, weight
        self.history: deque[torch.Tensor] = deque(maxlen=HISTORY)
        self.current: torch.Tensor | None = None

    def __call__(self, values: torch.Tensor, dtype: torch.dtype, *, record: bool = True) -> torch.Tensor:
        """``values`` rounded; ``record``: a training pass, whose magnitudes the delayed recipe remembers."""
        if self.recipe == "blockwise":
            return round_in_blocks(values, 128 if self.weight else 1, 128, dtype)
        if self.recipe == "mxfp8":
            return round_in_blocks(values, 1, 32, dtype)
        largest = values.detach().abs().amax() if values.numel() else torch.zeros((), device=values.device)
        if self.recipe == "tensorwise":
            return round_to_fp8(values, scale_for(largest, dtype, power_of_two=False), dtype)
        if record:
            self.current = largest if self.current is None else torch.maximum(self.current, largest)
        scale = (
            scale_for(torch.stack(list(self.history)).amax(), dtype, power_of_two=False)
            if self.history
            else largest.new_ones(())
        )
        return round_to_fp8(values, scale, dtype)

    def next_pass(self) -> None:
        """A training pass has ended: the delayed recipe scales the next ones by what it saw."""
        if self.current is not None:
            self.history.append(self.current)
        self.current = None


class _Operand(torch.autograd.Function):
    """Rounded forward; the gradient passes as it is (it is the gradient of the product with the rounded operand)."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, caster: Caster, record: bool) -> torch.Tensor:
        return caster(values, E4M3, record=record)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        return grads[0], None, None


class _Gradient(torch.autograd.Function):
    """The identity, whose gradient is rounded."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, caster: Caster, dtype: torch.dtype) -> torch.Tensor:
        ctx.caster, ctx.dtype = caster, dtype
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        return ctx.caster(grads[0], ctx.dtype), None, None


class EmulatedLinear:
    """Takes the place of a megatron linear layer's ``_forward_impl``; off while ``config.fp8`` is None and in layers
    that stay in bf16.
    """

    def __init__(self, original: Any, config: Any, layer_index: int):
        recipe = str(getattr(config.fp8_recipe, "value", config.fp8_recipe))
        self.original, self.config, self.layer_index = original, config, layer_index
        self.casters = {name: Caster(recipe, weight=name == "weight") for name in ("input", "weight", "gradient")}
        self.gradient_dtype = E5M2 if number_format(recipe) == "hybrid" else E4M3

    def __call__(self, *, input: torch.Tensor, weight: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        from megatron.core.fp8_utils import is_first_last_bf16_layer

        if self.config.fp8 is None or is_first_last_bf16_layer(self.config, self.layer_index):
            return self.original(input=input, weight=weight, **kwargs)
        record = torch.is_grad_enabled()
        input = _Operand.apply(input, self.casters["input"], record)
        weight = _Operand.apply(weight, self.casters["weight"], record)
        return _Gradient.apply(
            self.original(input=input, weight=weight, **kwargs), self.casters["gradient"], self.gradient_dtype
        )


def emulate(chunk: Any, config: Any) -> None:
    """Give every linear layer of a model chunk's decoder the emulation. The chunk must have been built from local
    (non-TE) layers.
    """
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    for layer in chunk.decoder.layers:
        for module in layer.modules():
            if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
                module._forward_impl = EmulatedLinear(module._forward_impl, config, layer.layer_number - 1)


def end_pass(chunks: list[Any]) -> None:
    """Tell every emulated layer that a training pass has ended. (Transformer Engine rolls its scales itself, at every
    micro-batch.)
    """
    for chunk in chunks:
        for module in chunk.modules():
            implementation = getattr(module, "_forward_impl", None)
            if isinstance(implementation, EmulatedLinear):
                for caster in implementation.casters.values():
                    caster.next_pass()
