"""Running packed micro-batches through megatron's pipeline schedules: forward only, or forward and backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from pact_nemo.policy.attention import TreeBatch, plan_attention
from pact_nemo.policy.config import PolicyConfig
from pact_nemo.policy.megatron_import import prepare_megatron
from pact_nemo.policy.packing import PackedMicroBatch, plan_rows, zigzag_positions
from pact_nemo.policy.trees import TokenTree
from pact_nemo.runtime.hangs import beat

prepare_megatron()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402

LossFn = Callable[[torch.Tensor, dict[str, torch.Tensor]], tuple[torch.Tensor, dict[str, torch.Tensor]]]
MAX_PREFIX = "max/"
TEMPERATURE = (  #: stream that carries the trees' temperatures through packing; taken out before the loss function
    "policy temperature"
)
ENTROPY = "entropy"  #: what the loss function finds the entropies under, where they are wanted


@dataclass
class LocalMicroBatch:
    """This rank's part of a micro-batch.

    Attributes:
        tokens: [1, T_local] int64.
        tree: attention plan, positions and scored tokens of this rank.
        streams: name -> [S_local].
        flat_index: [S_local] int64, see ``PackedMicroBatch``.
    """

    tokens: torch.Tensor
    tree: TreeBatch
    streams: dict[str, torch.Tensor]
    flat_index: torch.Tensor


@dataclass
class Collected:
    """What one rank's loss functions saw; empty on ranks that don't speak for their data-parallel and context-parallel
    share.
    """

    logprobs: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    entropies: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    losses: list[torch.Tensor] = field(default_factory=list)
    metrics: list[dict[str, torch.Tensor]] = field(default_factory=list)


def to_local(
    batch: PackedMicroBatch,
    *,
    device: torch.device,
    mask_dtype: torch.dtype | None,
    entropy: bool = False,
    varlen: bool = False,
    window: int | None = None,
) -> LocalMicroBatch:
    """Cut out this context-parallel rank's tokens and scored positions, and plan its attention.

    Args:
        batch: the whole row.
        device: where tensors go.
        mask_dtype: store attention masks of this dtype; None = leave them to the kernels.
        entropy: also compute entropies.
        varlen: describe the row as plain sequences side by side, for kernels that know no trees (all runs must be
            roots).
        window: positions that a token sees in the layers with a sliding window; None = no layer has one.
    """
    size, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    tokens, position_ids = batch.tokens, batch.position_ids
    source, target, flat, streams = batch.source_index, batch.target_ids, batch.flat_index, dict(batch.streams)
    key_order, mine = None, None
    if size > 1:
        length = tokens.shape[0]
        mine = zigzag_positions(length, rank, size)
        gathered = torch.cat([zigzag_positions(length, other, size) for other in range(size)])
        key_order = torch.argsort(gathered)
        local_of = torch.full((length,), -1)
        local_of[mine] = torch.arange(mine.shape[0])
        owned = local_of[source] >= 0
        tokens, position_ids = tokens[mine], position_ids[mine]
        source, target, flat = local_of[source][owned], target[owned], flat[owned]
        streams = {name: stream[owned] for name, stream in streams.items()}
    plan = plan_attention(batch.runs, mine)
    window_plan = None if window is None else plan_attention(batch.runs, mine, window=window)
    if mask_dtype is not None:
        plan.add_masks(mask_dtype)
        if window_plan is not None:
            window_plan.add_masks(mask_dtype)
    tree = TreeBatch(
        qkv_format="sbhd",
        position_ids=position_ids.to(device),
        plan=plan,
        window_plan=window_plan,
        key_order=None if key_order is None else key_order.to(device),
        source_index=source.to(device),
        target_ids=target.to(device),
        temperature=streams.pop(TEMPERATURE).to(device) if TEMPERATURE in streams else 1.0,
        wants_entropy=entropy,
    )
    if varlen:
        assert all(run.parent < 0 for run in batch.runs), "these kernels need share_prefix=False"
        starts = torch.tensor([run.start for run in batch.runs] + [tokens.shape[0]], dtype=torch.int32, device=device)
        longest = max(run.length for run in batch.runs)
        tree.qkv_format = "thd"
        tree.cu_seqlens_q = tree.cu_seqlens_kv = starts
        tree.max_seqlen_q = tree.max_seqlen_kv = longest
    return LocalMicroBatch(tokens[None].to(device), tree, {n: s.to(device) for n, s in streams.items()}, flat)


def local_batches(
    trees: list[TokenTree],
    config: PolicyConfig,
    *,
    device: torch.device,
    bf16: bool,
    entropy: bool = False,
    alignment: int = 1,
    window: int | None = None,
) -> tuple[list[LocalMicroBatch], int]:
    """Pack the trees for all ranks; this rank's micro-batches, and the number of tree tokens on all ranks together.

    Rows are padded so that every rank's part of them is a multiple of ``alignment`` tokens."""
    context = config.context_parallel
    plan = plan_rows(
        _with_temperatures(trees),
        config.micro_batch_tokens,
        share_prefix=config.share_prefix,
        data_parallel=parallel_state.get_data_parallel_world_size(),
        # sequence and context parallelism cut rows into equal parts
        multiple=(config.tensor_parallel if config.sequence_parallel else 1)
        * (2 * context if context > 1 else 1)
        * alignment,
        group_of=config.pipeline_parallel if config.virtual_pipeline else 1,
    )
    mask_dtype = None if device.type == "cuda" else (torch.bfloat16 if bf16 else torch.float32)
    mine = [
        to_local(
            row, device=device, mask_dtype=mask_dtype, entropy=entropy, varlen=config.attention == "te", window=window
        )
        for row in plan.build(parallel_state.get_data_parallel_rank())
    ]
    return mine, plan.used


def _with_temperatures(trees: list[TokenTree]) -> list[TokenTree]:
    """The trees with their temperatures among their streams, if any has some."""
    if all(tree.temperatures is None for tree in trees):
        return trees
    ones = [torch.ones(tree.num_scored) for tree in trees]
    values = [
        tree.temperatures if tree.temperatures is not None else one for tree, one in zip(trees, ones, strict=True)
    ]
    return [
        TokenTree(tree.segments, {**tree.streams, TEMPERATURE: value.float()})
        for tree, value in zip(trees, values, strict=True)
    ]


def _forward_step(
    collected: Collected, loss_fn: LossFn | None, data_iterator: Iterator[LocalMicroBatch], model: Any
) -> tuple[Any, Any]:
    beat()
    batch = next(data_iterator)
    output = model(batch.tokens, batch.tree.position_ids[None], None, packed_seq_params=batch.tree)
    return output, partial(_loss, collected, loss_fn, batch)


def _loss(
    collected: Collected, loss_fn: LossFn | None, batch: LocalMicroBatch, logprob_S: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Called by megatron's schedule on the last stage; (loss, token count, report), the latter two unused."""
    if logprob_S.shape[0] and loss_fn is not None:
        streams = batch.streams if batch.tree.entropy is None else {**batch.streams, ENTROPY: batch.tree.entropy}
        loss, metrics = loss_fn(logprob_S, streams)
    else:
        loss, metrics = (
            logprob_S.sum(),
            {},
        )  # zero where nothing is scored; keeps the backward pass and its collectives in step
    if parallel_state.get_tensor_model_parallel_rank() == 0:
        collected.logprobs.append((batch.flat_index, logprob_S.detach()))
        if batch.tree.entropy is not None:
            collected.entropies.append((batch.flat_index, batch.tree.entropy.detach()))
        if logprob_S.shape[0] and loss_fn is not None:
            collected.losses.append(loss.detach())
            collected.metrics.append(
                {
                    name: value.detach() if torch.is_tensor(value) else torch.tensor(value)
                    for name, value in metrics.items()
                }
            )
    batch.tree.entropy = None  # its graph would keep the stage's input until the last row is done, gradient and all
    return loss, torch.zeros((), dtype=torch.int, device=loss.device), {}


def run_schedule(
    chunks: list[Any], batches: list[LocalMicroBatch], loss_fn: LossFn | None, *, forward_only: bool
) -> Collected:
    """Run micro-batches through the pipeline.

    Args:
        chunks: this rank's model chunks, wrapped for data parallelism if ``forward_only`` is False.
        batches: this rank's micro-batches; all ranks must bring the same number.
        loss_fn: see ``MegatronPolicy.update``; None = log-probs only.
        forward_only: no backward pass and no gradient reduction.

    Returns:
        log-probs, losses and metrics of this rank's share, on the tensor-parallel rank 0 of the last pipeline stage.
    """
    collected = Collected()
    data: Any = [iter(batches) for _ in chunks]
    get_forward_backward_func()(
        forward_step_func=partial(_forward_step, collected, loss_fn),
        data_iterator=data if len(chunks) > 1 else data[0],
        model=chunks,
        num_microbatches=len(batches),
        seq_length=batches[0].tokens.shape[1],
        micro_batch_size=1,
        forward_only=forward_only,
    )
    return collected


def gather_flat(parts: list[tuple[torch.Tensor, torch.Tensor]], total: int, device: torch.device) -> torch.Tensor:
    """[total] float32 on the CPU of every rank, from the parts that all ranks hold (each position on exactly one
    rank).
    """
    flat = torch.zeros(total, dtype=torch.float32, device=device)
    for index, values in parts:
        flat[index.to(device)] = values.to(torch.float32)
    if dist.get_world_size() > 1 and total:
        dist.all_reduce(flat)
    return flat.cpu()


def gather_metrics(collected: Collected) -> tuple[float, dict[str, float]]:
    """Loss and metrics of the whole step on every rank: sums over micro-batches and ranks, maxima for names starting
    with ``max/``.

    Summed in float64 in rank order, so all ranks get the same numbers.
    """
    local = (
        [float(loss) for loss in collected.losses],
        [{name: float(value) for name, value in metrics.items()} for metrics in collected.metrics],
    )
    everything: list[Any] = [local]
    if dist.get_world_size() > 1:
        everything = [None] * dist.get_world_size()
        dist.all_gather_object(everything, local)
    total = 0.0
    merged: dict[str, float] = {}
    for losses, metrics_list in everything:
        total += sum(losses)
        for metrics in metrics_list:
            for name, value in metrics.items():
                if name not in merged:
                    merged[name] = value
                elif name.startswith(MAX_PREFIX):
                    # max() drops NaN depending on the order of its arguments
                    merged[name] = value if value != value else max(merged[name], value)
                else:
                    merged[name] += value
    return total, merged


def not_finite(numbers: Mapping[str, float]) -> list[str]:
    """Names of an update's numbers that are NaN or Inf; where all are finite, of those that count tokens with such a
    log-prob: -Inf leaves the loss finite, as ratios are cut.
    """
    broken = [name for name, value in numbers.items() if not math.isfinite(value)]
    return broken or [name for name, value in numbers.items() if name.startswith("nonfinite/") and value > 0]
