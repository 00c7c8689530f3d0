"""``transformer_engine`` in a rehearsal: the modules that megatron-core imports, with the signatures of version 2.12
and without kernels. Its attention is not among them.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.metadata
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from typing import Any

import torch

from pact_nemo.errors import ConfigError
from pact_nemo.policy.fused import rms_norm
from pact_nemo.rehearsal.engine_layers import GroupedLinear, LayerNormLinear, Linear
from pact_nemo.rehearsal.engine_products import State

VERSION = "2.12.0"
_NAME = "transformer-engine"


class Norm(torch.nn.Module):
    """RMSNorm, and the place of LayerNorm, which no model here has."""

    def __init__(
        self,
        normalized_shape: Any = None,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        **kwargs: Any,
    ):
        super().__init__()
        width = normalized_shape if normalized_shape is not None else hidden_size
        device = torch.device("cuda", torch.cuda.current_device())
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(width, dtype=params_dtype, device=device))
        self.weight.sequence_parallel = bool(sequence_parallel)  # type: ignore[attr-defined]

    def forward(self, inp: torch.Tensor) -> torch.Tensor:
        return rms_norm(inp, self.weight, self.eps)


class Padding(torch.nn.Module):
    """Rows of each expert up to what an FP8 product needs."""

    def __init__(self, num_gemms: int, align_size: int | None = None):
        super().__init__()
        self.num_gemms, self.align_size = num_gemms, align_size or 16  # 32 under mxfp8, which no H100 has

    def forward(self, inp: torch.Tensor, m_splits: list[int]) -> tuple[torch.Tensor, list[int]]:
        padded = [-(-count // self.align_size) * self.align_size for count in m_splits]
        parts = zip(torch.split(inp, m_splits), padded, strict=True)
        rows = [torch.nn.functional.pad(part, (0, 0, 0, count - part.shape[0])) for part, count in parts]
        return torch.cat(rows), padded


class Unpadding(Padding):
    def forward(self, inp: torch.Tensor, m_splits: list[int]) -> torch.Tensor:  # type: ignore[override]
        padded = [-(-count // self.align_size) * self.align_size for count in m_splits]
        parts = zip(torch.split(inp, padded), m_splits, strict=True)
        return torch.cat([part[:count] for part, count in parts])


class DotProductAttention(torch.nn.Module):
    def __init__(self, *args: Any, **kwargs: Any):
        raise ConfigError("policy.attention=te can't be rehearsed: its kernels are Transformer Engine's own")


class FusedAdam(torch.optim.Optimizer):
    """Float32 moments, made at the first step, and no temporary tensor."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
        set_grad_none: bool | None = None,
    ):
        self.use_decoupled_grad, self.dtypes = use_decoupled_grad, (exp_avg_dtype, exp_avg_sq_dtype)
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: Any = None, grad_scaler: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for param in group["params"]:
                grad = getattr(param, "decoupled_grad", None) if self.use_decoupled_grad else param.grad
                if grad is None:
                    continue
                state = self.state[param]
                if not state:
                    for name, dtype in zip(("exp_avg", "exp_avg_sq"), self.dtypes, strict=True):
                        state[name] = torch.zeros_like(param, dtype=dtype)
                state["exp_avg"].lerp_(grad, 0.1)
                state["exp_avg_sq"].mul_(0.999).addcmul_(grad, grad)
                param.addcdiv_(state["exp_avg"], state["exp_avg_sq"])


class MultiTensorApply:
    def __init__(self, chunk_size: int):
        self.chunk_size = chunk_size

    def __call__(self, op: Callable[..., Any], noop_flag_buffer: Any, tensor_lists: Any, *args: Any) -> Any:
        return op(self.chunk_size, noop_flag_buffer, tensor_lists, *args)


def multi_tensor_l2norm(chunk_size: int, noop_flag: Any, tensor_lists: Any, per_tensor: bool = False) -> Any:
    """The norm, on the GPU."""
    return torch.zeros(1, device=tensor_lists[0][0].device), None


def multi_tensor_scale(chunk_size: int, noop_flag: Any, tensor_lists: Any, scale: float) -> None:
    for source, target in zip(*tensor_lists, strict=True):
        torch.mul(source, scale, out=target) if source.dtype == target.dtype else target.copy_(source)


class FP8GlobalStateManager:
    """What layers and megatron ask of the surrounding ``fp8_autocast``."""

    is_fp8_enabled = staticmethod(lambda: State.enabled)
    get_fp8_recipe = staticmethod(lambda: State.recipe)
    is_fp8_calibration = staticmethod(lambda: False)
    reset = staticmethod(lambda: None)


@contextlib.contextmanager
def fp8_autocast(
    enabled: bool = True,
    calibrating: bool = False,
    fp8_recipe: Any = None,
    fp8_group: Any = None,
    _graph: bool = False,
) -> Iterator[None]:
    """Products of layers within are in FP8."""
    assert not enabled or isinstance(fp8_recipe, Recipe), fp8_recipe
    before = State.enabled, State.recipe
    State.enabled, State.recipe = enabled, fp8_recipe
    try:
        yield
    finally:
        State.enabled, State.recipe = before


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Recomputed going backward, under the FP8 that was set going forward."""
    enabled, recipe = State.enabled, State.recipe

    def run(*values: Any) -> Any:
        with fp8_autocast(enabled=enabled, fp8_recipe=recipe):
            return function(*values)

    return torch.utils.checkpoint.checkpoint(run, *args, use_reentrant=True, preserve_rng_state=False)


@contextlib.contextmanager
def activation_recompute_forward(activation_recompute: bool = False, recompute_phase: bool = False) -> Iterator[None]:
    yield


class CudaRNGStatesTracker:
    def __init__(self) -> None:
        self.states_: dict[str, Any] = {}


class Format(Enum):
    E4M3 = "e4m3"
    E5M2 = "e5m2"
    HYBRID = "hybrid"


class Recipe:
    """A recipe, and what it was made with."""

    def __init__(self, fp8_format: Format = Format.HYBRID, **settings: Any):
        assert isinstance(fp8_format, Format)
        self.fp8_format, self.settings = fp8_format, settings


RECIPES = ("DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling", "NVFP4BlockScaling")


ROUTER = ("fused_compute_score_for_moe_aux_loss", "fused_moe_aux_loss", "fused_topk_with_score_function")


def contents() -> dict[str, dict[str, Any]]:
    """Module -> its public names."""
    layers = dict(Linear=Linear, LayerNormLinear=LayerNormLinear, GroupedLinear=GroupedLinear)
    layers |= dict(
        Fp8Padding=Padding,
        Fp8Unpadding=Unpadding,
        RMSNorm=Norm,
        LayerNorm=Norm,
        DotProductAttention=DotProductAttention,
    )
    empty = {name: type(name, (torch.nn.Module,), {}) for name in ("TransformerLayer", "LayerNormMLP")}
    recipes = {name: type(name, (Recipe,), {}) for name in RECIPES}
    quantized = type("QuantizedTensor", (torch.Tensor,), {})
    operations = [
        "Sequential",
        "FusibleOperation",
        "Linear",
        "RMSNorm",
        "LayerNorm",
        "Quantize",
        "BasicLinear",
        "SwiGLU",
    ]
    operations += ["MakeExtraOutput", "AddExtraInput", "Dropout", "ConstantScale"]
    return {
        "transformer_engine": {"__version__": VERSION},
        "transformer_engine.common": {"recipe": None},
        "transformer_engine.common.recipe": {"Format": Format, "Recipe": Recipe, **recipes},
        "transformer_engine.pytorch": {
            **layers,
            **empty,
            "fp8_autocast": fp8_autocast,
            "fp8_model_init": contextlib.nullcontext,
        },
        # megatron wants them to be there; policy/provider.py switches fused routing off
        "transformer_engine.pytorch.router": dict.fromkeys(ROUTER),
        "transformer_engine.pytorch.fp8": {
            "FP8GlobalStateManager": FP8GlobalStateManager,
            "fp8_autocast": fp8_autocast,
            "fp8_model_init": contextlib.nullcontext,
        },
        "transformer_engine.pytorch.distributed": {
            "activation_recompute_forward": activation_recompute_forward,
            "checkpoint": checkpoint,
            "is_fp8_activation_recompute_enabled": lambda: False,
            "CudaRNGStatesTracker": CudaRNGStatesTracker,
        },
        "transformer_engine.pytorch.optimizers": {
            "FusedAdam": FusedAdam,
            "FusedSGD": torch.optim.SGD,
            "multi_tensor_applier": MultiTensorApply(2048 * 32),
            "multi_tensor_l2norm": multi_tensor_l2norm,
            "multi_tensor_scale": multi_tensor_scale,
        },
        "transformer_engine.pytorch.tensor": {"QuantizedTensor": quantized},
        "transformer_engine.pytorch.float8_tensor": {"Float8Tensor": type("Float8Tensor", (quantized,), {})},
        "transformer_engine.pytorch.ops": {name: type(name, (torch.nn.Module,), {}) for name in operations},
    }


class _Distribution(importlib.metadata.Distribution):
    """What Megatron-Bridge asks for the version."""

    def read_text(self, filename: str) -> str | None:
        return f"Metadata-Version: 2.1\nName: {_NAME}\nVersion: {VERSION}\n" if filename == "METADATA" else None

    def locate_file(self, path: Any) -> Any:
        raise FileNotFoundError(f"{path}: the stand-in has no files")


class _Finder(importlib.metadata.DistributionFinder):
    """Finds that distribution, and no module."""

    def find_spec(self, *_: Any) -> None:
        return None

    def find_distributions(self, context: Any = None) -> Iterable[importlib.metadata.Distribution]:
        return [_Distribution()] if context is not None and context.name == _NAME else []


def install() -> None:
    """Before megatron is imported."""
    sys.meta_path.append(_Finder())
    for name, public in contents().items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__path__ = []
        vars(module).update(public)
        sys.modules[name] = module
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], own, module)
