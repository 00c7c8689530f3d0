"""AdamW through megatron's optimizers, its learning-rate schedule, and the step that refuses non-finite numbers."""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import Any

import torch

from pact_nemo.policy import device as devices
from pact_nemo.policy.config import OptimizerConfig
from pact_nemo.policy.megatron_import import prepare_megatron

prepare_megatron()

from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig  # noqa: E402
from megatron.core.optimizer import get_megatron_optimizer  # noqa: E402
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32  # noqa: E402
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer  # noqa: E402

# the distributed optimizer's float32 parameters are views of the model's: megatron asks each for .grad and checks for
# None itself
warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf", module="megatron")
# torch 2.13 renames the collectives that megatron-core calls
warnings.filterwarnings("ignore", message=".*(reduce_scatter_tensor|all_gather_into_tensor)", category=FutureWarning)


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step ``step`` (1-based) of ``total_steps``; after the last step it stays at its end
    value.
    """
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.lr
    span = max(total_steps - config.warmup_steps, 1)
    done = min((step - config.warmup_steps) / span, 1.0)
    remaining = 1.0 - done if config.lr_schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return config.min_lr + (config.lr - config.min_lr) * remaining


def wrap_data_parallel(
    chunks: list[Any], *, distributed_optimizer: bool, overlap: bool
) -> list[DistributedDataParallel]:
    """Megatron's DDP around each chunk: float32 gradient buffers that hold plain sums over micro-batches and ranks."""
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap,
        use_distributed_optimizer=distributed_optimizer,
        check_for_nan_in_grad=False,
    )
    model_config = chunks[0].config
    # with ``calculate_per_token_loss`` megatron would divide by the token count that it passes here
    model_config.finalize_model_grads_func = lambda model, num_tokens=None, **kwargs: finalize_model_grads(
        model, None, **kwargs
    )
    # one bucket per chunk where nothing is overlapped: fewer and larger reductions
    wrapped = [
        DistributedDataParallel(model_config, settings, chunk, disable_bucketing=not overlap) for chunk in chunks
    ]
    if overlap:
        functions = [chunk.no_sync for chunk in wrapped]
        model_config.no_sync_func = functions if len(functions) > 1 else functions[0]
    for chunk in wrapped:
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
            _count_padding_between_buckets(buffer)
        if not overlap:
            for group in [*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups]:
                _skip_collectives_of_one(group)
    return wrapped


def _skip_collectives_of_one(group: Any) -> None:
    """Where a buffer belongs to one rank alone there is nothing to sum or gather; gloo would copy all gradients twice
    and all weights once.
    """
    ranks = (
        group.intra_distributed_optimizer_instance_group
        if group.ddp_config.use_distributed_optimizer
        else group.data_parallel_group
    )
    if ranks.size() == 1 and all(bucket.gradient_scaling_factor == 1.0 for bucket in group.buckets):
        group.start_grad_sync = group.start_param_sync = lambda *args, **kwargs: None


def _count_padding_between_buckets(buffer: Any) -> None:
    """Make a gradient buffer's bucket sizes agree with its parameter offsets.

    A tied embedding always gets a bucket of its own. megatron-core 0.16 pads every bucket, and parameter offsets
    include that padding, but the code that gathers optimizer state for a checkpoint joins the buckets without it: all
    parameters after the first bucket are then saved shifted, silently. Counting the padding as part of each bucket but
    the last puts every parameter where it is looked for.
    """
    for bucket in buffer.buckets[:-1]:
        bucket.numel_unpadded = bucket.grad_data.numel()
    last = buffer.buckets[-1]
    buffer.numel_unpadded = last.offset + last.numel_unpadded


def build_optimizer(
    config: OptimizerConfig, wrapped: list[DistributedDataParallel], *, bf16: bool, distributed_optimizer: bool
) -> Any:
    """AdamW over the wrapped chunks, with float32 main weights if ``bf16``."""
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            # the rate of each step is set by apply_step; megatron-core 0.19 finds a checkpoint's parameter groups by
            # these two, so they are the same in every run: a run may be resumed with another learning rate
            lr=1.0,
            min_lr=0.0,
            weight_decay=config.weight_decay,
            adam_beta1=config.betas[0],
            adam_beta2=config.betas[1],
            adam_eps=config.eps,
            clip_grad=config.clip_grad,
            bf16=bf16,
            params_dtype=torch.bfloat16 if bf16 else torch.float32,
            use_distributed_optimizer=distributed_optimizer,
        ),
        wrapped,
        use_gloo_process_groups=False,
    )
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, torch.optim.AdamW):
            for group in part.optimizer.param_groups:
                # torch's one-pass kernel, also on the CPU; its default there goes over memory a dozen times
                group["fused"] = True
        if isinstance(part, DistributedOptimizer) and part.data_parallel_group.size() == 1:
            part.get_parameter_state_dp_zero = partial(_state_without_gathering, part)
    return optimizer


class _ByStart:
    """What megatron slices a gathered buffer for, ``buffer[start:end]``, answered with the parameter's own state that
    begins at ``start``.
    """

    def __init__(self, tensors: dict[int, torch.Tensor]):
        self._tensors = tensors

    def __getitem__(self, where: slice) -> torch.Tensor:
        return self._tensors[where.start]


def _state_without_gathering(
    part: DistributedOptimizer, use_gloo_comm: bool = True, empty_data: bool = False, return_on_all_ranks: bool = False
) -> Any:
    """``get_parameter_state_dp_zero`` of an optimizer that isn't sharded: its state by reference.

    Megatron's own gathers from a group of one through four copies of the whole state, which takes longer than writing
    the checkpoint.
    """
    if empty_data:  # loading: the buffers that will be filled
        return DistributedOptimizer.get_parameter_state_dp_zero(part, use_gloo_comm, empty_data, return_on_all_ranks)
    state: dict[Any, Any] = {"buckets_coalesced": True}
    for index, (buffer, by_dtype) in enumerate(zip(part.buffers, part.gbuf_ranges, strict=True)):
        tensors: dict[str, dict[int, torch.Tensor]] = {"param": {}, "exp_avg": {}, "exp_avg_sq": {}}
        for parameter, (start, _, _) in buffer.param_index_map.items():
            own = part._get_main_param_and_optimizer_states(parameter)
            for key, by_start in tensors.items():
                by_start[start] = own[key].detach().float().cpu()
        state[index] = {dtype: {key: _ByStart(by_start) for key, by_start in tensors.items()} for dtype in by_dtype}
    return state


def gradient_norm(optimizer: Any) -> float:
    """Hand the reduced gradients to the optimizer and return their global L2 norm, the same on every rank (NaN or Inf
    included).
    """
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


def _own_gradients(part: Any) -> list[torch.Tensor]:
    """This rank's gradients, each parameter's on one of the ranks that norms are summed over. Its name changed with
    megatron-core 0.19.
    """
    find = getattr(part, "get_grads_for_grad_norm", None) or part.get_main_grads_for_grad_norm
    found: list[torch.Tensor] = find()
    return found


class KeptGradient:
    """This rank's share of the gradient that :func:`gradient_norm` was called for, copied, to compare a later one
    with.
    """

    def __init__(self, optimizer: Any):
        self._optimizer = optimizer
        self._parts = [
            [grad.detach().clone() for grad in _own_gradients(part)] for part in optimizer.chained_optimizers
        ]

    @torch.no_grad()
    def dot(self, device: torch.device) -> float:
        """Inner product with the gradient that the optimizer holds now, over all parameters of all ranks, in float64.
        Collective.
        """
        total = 0.0
        for part, kept in zip(self._optimizer.chained_optimizers, self._parts, strict=True):
            local = torch.zeros((), dtype=torch.float64, device=device)
            for before, now in zip(kept, _own_gradients(part), strict=True):
                local += (before.double() * now).sum()
            torch.distributed.all_reduce(
                local, group=part.get_grad_stats_parallel_group()
            )  # the ranks that grad norms are summed over
            total += float(local)
        return total


class MovedWeights:
    """How many weights an optimizer step changes in bfloat16, by a sample of the float32 main weights.

    A weight of 0.1 has a step of 5e-4 in bfloat16: what an update adds to its main weight shows in the model only once
    it comes to half of that.

    Args:
        optimizer: before the step.
    """

    _PER_TENSOR = 4096

    def __init__(self, optimizer: Any):
        self._optimizer = optimizer
        self._before = [
            [self._sample(weights) for weights in part.get_parameters()] for part in optimizer.chained_optimizers
        ]

    def _sample(self, weights: torch.Tensor) -> torch.Tensor:
        every = max(1, weights.numel() // self._PER_TENSOR)
        return weights.detach().reshape(-1)[::every].bfloat16()  # a copy: they are float32

    @torch.no_grad()
    def share(self, device: torch.device) -> float:
        """Share of the trained weights of all ranks that changed, a tensor's weight being its size. Collective."""
        both = torch.zeros(2, dtype=torch.float64, device=device)  # moved, all
        for part, kept in zip(self._optimizer.chained_optimizers, self._before, strict=True):
            local = torch.zeros_like(both)
            for weights, before in zip(part.get_parameters(), kept, strict=True):
                if before.numel():
                    local[0] += weights.numel() * (self._sample(weights) != before).double().mean()
                    local[1] += weights.numel()
            torch.distributed.all_reduce(local, group=part.get_grad_stats_parallel_group())
            both += local
        moved, total = both.tolist()
        return float(moved / total) if total else 0.0


def apply_step(
    optimizer: Any, *, lr: float, weight_decay: float, clip_grad: float, grad_norm: float, bf16: bool
) -> float | None:
    """Clip by the given global norm and update the weights. Call after :func:`gradient_norm`. Collective if ``bf16``.

    Returns:
        share of the bfloat16 weights that changed (:class:`MovedWeights`); None without main weights.
    """
    moved = MovedWeights(optimizer) if bf16 else None
    for part in optimizer.chained_optimizers:
        if getattr(part, "is_stub_optimizer", False):
            continue
        for group in part.optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)
        if clip_grad > 0.0 and part.get_parameters():
            clip_grad_by_total_norm_fp32(part.get_parameters(), max_norm=clip_grad, total_norm=grad_norm)
    optimizer.step_with_ready_grads()
    return moved.share(devices.local_device()) if moved is not None else None
