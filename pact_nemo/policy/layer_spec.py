"""What megatron's transformer layers are built of.

They are Transformer Engine's modules or local ones, with our attention, norms and biases.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F

from pact_nemo.errors import ConfigError
from pact_nemo.policy import fused
from pact_nemo.policy.architectures import Architecture
from pact_nemo.policy.attention import TreeCoreAttention
from pact_nemo.policy.fused import SwiGLU
from pact_nemo.policy.megatron_import import prepare_megatron

prepare_megatron()

from megatron.core.models.gpt.gpt_layer_specs import (  # noqa: E402
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec  # noqa: E402


class PlainRMSNorm(torch.nn.Module):
    """Torch's RMSNorm for specs without Transformer Engine; unlike megatron's wrapper of it, it works under sequence
    parallelism.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # megatron sums the gradients of parameters so marked over the tensor-parallel ranks
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class RMSNorm(PlainRMSNorm):
    """The same in one autograd function."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return fused.rms_norm(x, self.weight, self.eps)


def layer_spec(
    provider: Any, architecture: Architecture, *, transformer_engine: bool, attention: str, fused_elementwise: bool
) -> ModuleSpec:
    """Layer spec with our core attention: Transformer Engine modules if asked for, local ones with our RMSNorm and
    activation otherwise.
    """
    moe = dict(
        num_experts=provider.num_moe_experts,
        moe_grouped_gemm=provider.moe_grouped_gemm,
        qk_layernorm=provider.qk_layernorm,
    )
    if transformer_engine:
        spec = get_gpt_layer_with_transformer_engine_spec(**moe)
    else:
        spec = get_gpt_layer_local_spec(**{**moe, "moe_grouped_gemm": False}, normalization=provider.normalization)
        norm = RMSNorm if fused_elementwise else PlainRMSNorm
        spec.submodules.input_layernorm = norm
        spec.submodules.pre_mlp_layernorm = norm
        if provider.qk_layernorm:
            _submodules(spec.submodules.self_attention).q_layernorm = norm
            _submodules(spec.submodules.self_attention).k_layernorm = norm
        if provider.use_te_activation_func:
            _set_activation(spec.submodules.mlp)
    if attention != "te":
        _submodules(spec.submodules.self_attention).core_attention = TreeCoreAttention
    if architecture.output_bias:
        inner = _submodules(spec.submodules.self_attention)
        inner.linear_proj = _with_bias(inner.linear_proj)
    if architecture.mlp_bias:
        inner = _submodules(spec.submodules.mlp)
        inner.linear_fc1, inner.linear_fc2 = _with_bias(inner.linear_fc1), _with_bias(inner.linear_fc2)
    return spec


def _with_bias(linear: Any) -> type:
    """A linear layer's class that has a bias whatever it is told: megatron has one flag for all of them, models have
    several.

    The class keeps its name, by which Megatron-Bridge knows how a layer is cut over ranks.

    Raises:
        ConfigError: this version of megatron-core builds linear layers from something else than classes.
    """
    if not isinstance(linear, type):
        raise ConfigError(
            f"this megatron-core builds linear layers from {type(linear).__name__}; use the versions of"
            " requirements.txt"
        )

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        linear.__init__(self, *args, **{**kwargs, "bias": True})  # type: ignore[misc]

    return type(linear.__name__, (linear,), {"__init__": __init__, "__module__": linear.__module__})


def _submodules(builder: Any) -> Any:
    """The submodules that a layer's part is built with: megatron-core says them in a ModuleSpec (0.16) or in a
    ``functools.partial`` (0.19).

    Raises:
        ConfigError: neither, so this version of megatron-core says them in a way that isn't known here.
    """
    found = (
        builder.keywords.get("submodules")
        if isinstance(builder, functools.partial)
        else getattr(builder, "submodules", None)
    )
    if found is None:
        raise ConfigError(
            f"this megatron-core describes a layer's parts by {type(builder).__name__}; use the versions of"
            " requirements.txt"
        )
    return found


def _set_activation(builder: Any) -> None:
    """Put our SwiGLU where MLPs look for an activation module: the dense one's, or that of routed and shared
    experts.
    """
    submodules = _submodules(builder)
    if hasattr(submodules, "activation_func"):
        submodules.activation_func = SwiGLU
        return
    for name in ("experts", "shared_experts"):
        inner = getattr(submodules, name, None)
        if inner is not None:
            _set_activation(inner)
