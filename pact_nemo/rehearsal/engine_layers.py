"""Transformer Engine's layers without their kernels: the constructor and forward signatures of version 2.12, and their
parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from pact_nemo.policy.fused import rms_norm
from pact_nemo.rehearsal.engine_products import (
    FP8,
    PRODUCTS,
    GroupedProduct,
    Product,
    State,
    device_of,
    gathered,
    scattered,
)


class _Base(torch.nn.Module):
    """What the linear layers share."""

    parallel_mode: str | None
    sequence_parallel: bool
    tp_size: int
    fuse_wgrad: bool
    hands_out_gathered = False  #: its input, of all ranks of the sequence
    save_original_input: bool  #: not in FP8: megatron asks for that where another layer keeps the same tensor

    def set_up(
        self, parallel_mode: str | None, sequence_parallel: bool, tp_group: Any, tp_size: int, fuse: bool
    ) -> None:
        assert parallel_mode in (None, "column", "row"), parallel_mode
        self.parallel_mode, self.tp_group, self.tp_size = parallel_mode, tp_group, tp_size
        self.sequence_parallel = sequence_parallel and tp_size > 1
        self.fuse_wgrad = fuse
        self._cached: list[torch.Tensor] = []

    def set_tensor_parallel_group(self, tp_group: Any) -> None:
        self.tp_group = tp_group

    def gathered(self, tensor: torch.Tensor) -> torch.Tensor:
        if not self.sequence_parallel:
            return tensor
        whole = gathered(tensor.view(torch.uint8) if tensor.dtype is FP8 else tensor, self.tp_group, self.tp_size)
        return whole.view(FP8) if tensor.dtype is FP8 else whole

    def reduced(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.sequence_parallel:
            return scattered(tensor, self.tp_group, self.tp_size)
        if self.tp_size > 1:
            dist.all_reduce(tensor, group=self.tp_group)
        return tensor

    def new_weight(self, rows: int, columns: int, dtype: torch.dtype, device: Any, init: Any) -> torch.nn.Parameter:
        weight = torch.nn.Parameter(torch.empty(rows, columns, dtype=dtype, device=device_of(device)))
        if init is not None:
            init(weight)
        split = self.parallel_mode is not None
        weight.tensor_model_parallel = split  # type: ignore[attr-defined]
        weight.partition_dim = 1 if self.parallel_mode == "row" else 0  # type: ignore[attr-defined]
        weight.partition_stride = 1  # type: ignore[attr-defined]
        return weight

    def new_bias(self, rows: int, dtype: torch.dtype, device: Any) -> torch.nn.Parameter:
        bias = torch.nn.Parameter(torch.zeros(rows, dtype=dtype, device=device_of(device)))
        if self.parallel_mode == "row":
            bias.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]
        elif self.parallel_mode == "column":
            bias.tensor_model_parallel, bias.partition_dim, bias.partition_stride = True, 0, 1  # type: ignore[attr-defined]
        return bias

    def in_fp8(self, rows: int, weights: list[torch.Tensor], is_first_microbatch: bool | None) -> bool:
        """Whether this product is in FP8; keeps the weights' casts, as they are and transposed, for all rows of a step.

        Raises:
            ValueError: sizes that have no FP8 product.
        """
        PRODUCTS["fp8" if State.enabled else "bf16"] += 1
        if not State.enabled:
            return False
        for weight in weights:
            if rows % 8 or weight.shape[0] % 16 or weight.shape[1] % 16:
                raise ValueError(f"FP8 has no product of {rows} rows and a weight of {tuple(weight.shape)}")
        if is_first_microbatch is not None and not self._cached:
            self._cached = [torch.empty_like(weight, dtype=torch.uint8) for weight in weights for _ in range(2)]
        return True

    def get_extra_state(self) -> Any:
        return torch.empty(0)

    def set_extra_state(self, state: Any) -> None: ...


class Linear(_Base):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[..., Any] | None = None,
        rng_tracker_name: str | None = None,
        init_method: Callable[..., Any] | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        parameters_split: Any = None,
        device: Any = "cuda",
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        save_original_input: bool = False,
        name: str | None = None,
    ):
        super().__init__()
        self.set_up(parallel_mode, sequence_parallel, tp_group, tp_size, fuse_wgrad_accumulation)
        rows = out_features // tp_size if parallel_mode == "column" else out_features
        columns = in_features // tp_size if parallel_mode == "row" else in_features
        dtype = params_dtype or torch.get_default_dtype()
        self.in_features, self.out_features, self.save_original_input = columns, rows, save_original_input
        self.use_bias, self.return_bias = bias, return_bias
        self.weight = self.new_weight(rows, columns, dtype, device, init_method)
        self.bias = (
            self.new_bias(rows, dtype, device) if bias else torch.empty(0, dtype=dtype, device=device_of(device))
        )

    def product(self, inp: torch.Tensor, is_first_microbatch: bool | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The result, and the whole input where the layer hands it out."""
        rows = (
            inp.numel()
            // inp.shape[-1]
            * (self.tp_size if self.parallel_mode == "column" and self.sequence_parallel else 1)
        )
        fp8 = self.in_fp8(rows, [self.weight], is_first_microbatch)
        added = self.bias if self.use_bias and not self.return_bias else None
        out, whole = Product.apply(inp, self.weight, added, self, fp8)
        return out, whole

    def forward(
        self,
        inp: torch.Tensor,
        is_first_microbatch: bool | None = None,
        fp8_output: bool | None = False,
        fp8_grad: bool | None = False,
    ) -> Any:
        out, _ = self.product(inp, is_first_microbatch)
        return (out, self.bias) if self.return_bias else out


class LayerNormLinear(Linear):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[..., Any] | None = None,
        init_method: Callable[..., Any] | None = None,
        bias: bool = True,
        normalization: str = "LayerNorm",
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        return_layernorm_output: bool = False,
        return_layernorm_output_gathered: bool = False,
        parameters_split: Any = None,
        zero_centered_gamma: bool = False,
        device: Any = "cuda",
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        name: str | None = None,
    ):
        assert normalization == "RMSNorm", "no model of this project has another"
        super().__init__(
            in_features,
            out_features,
            sequence_parallel,
            fuse_wgrad_accumulation,
            tp_group,
            tp_size,
            init_method=init_method,
            bias=bias,
            return_bias=return_bias,
            params_dtype=params_dtype,
            parallel_mode=parallel_mode,
            device=device,
        )
        self.eps = eps
        # Megatron-Bridge sets both later, for an adapter to read what the product reads
        self.return_layernorm_output = return_layernorm_output
        self.return_layernorm_output_gathered = return_layernorm_output_gathered
        self.layer_norm_weight = torch.nn.Parameter(torch.ones_like(self.weight[0]))
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    @property
    def hands_out_gathered(self) -> bool:  # type: ignore[override]
        return self.return_layernorm_output and self.return_layernorm_output_gathered

    def forward(
        self,
        inp: torch.Tensor,
        is_first_microbatch: bool | None = None,
        fp8_output: bool | None = False,
        fp8_grad: bool | None = False,
    ) -> Any:
        normed = rms_norm(inp, self.layer_norm_weight, self.eps)
        out, whole = self.product(normed, is_first_microbatch)
        handed = (whole if self.hands_out_gathered else normed,) if self.return_layernorm_output else ()
        parts = (out, self.bias, *handed) if self.return_bias else (out, *handed)
        return parts if len(parts) > 1 else out


class GroupedLinear(_Base):
    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[..., Any] | None = None,
        rng_tracker_name: str | None = None,
        init_method: Callable[..., Any] | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: Any = "cuda",
        ub_overlap_rs: bool = False,
        ub_overlap_ag: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        save_original_input: bool = False,
        name: str | None = None,
    ):
        super().__init__()
        assert not bias, "no model of this project has experts with biases"
        # an expert is never cut: megatron leaves the exchange to the dispatcher
        self.set_up(None, False, None, 1, fuse_wgrad_accumulation)
        dtype = params_dtype or torch.get_default_dtype()
        self.num_gemms, self.use_bias, self.return_bias = num_gemms, bias, return_bias
        self.save_original_input = save_original_input
        for index in range(num_gemms):
            weight = self.new_weight(out_features, in_features, dtype, device, init_method)
            self.register_parameter(f"weight{index}", weight)

    def forward(self, inp: torch.Tensor, m_splits: list[int], is_first_microbatch: bool | None = None) -> Any:
        assert len(m_splits) == self.num_gemms and sum(m_splits) == inp.shape[0], (sum(m_splits), inp.shape)
        weights = [getattr(self, f"weight{index}") for index in range(self.num_gemms)]
        fp8 = self.in_fp8(8, weights, is_first_microbatch)
        if fp8 and any(count % 16 for count in m_splits):
            raise ValueError(f"FP8 has no grouped product of {m_splits} rows")
        out = GroupedProduct.apply(inp, m_splits, self, fp8, *weights)
        return (out, [None] * self.num_gemms) if self.return_bias else out
