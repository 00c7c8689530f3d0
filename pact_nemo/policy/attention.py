"""Attention over packed token trees with torch's scaled-dot-product kernels.

A packed row is cut into kernel calls, one per run (a run is a stretch of tokens with one parent, see ``packing.Run``):
queries = the run, keys = its ancestors, then the run itself, under a causal mask aligned to the lower right corner. So
no work is spent on pairs that don't see each other and, with kernels that know that mask, none is stored: length is no
limit. (One call with a dense tree mask costs about twice as much on the CPU for 8 rollouts of 40 tokens in two
contexts.) The result is the attention that each root-to-leaf sequence would have on its own, in another order of
additions.

Layers with a sliding window have a plan of their own: positions are depths in the tree, so a window is a stretch of the
path from the root. Runs are cut into blocks, whose keys are the block and the window before it: work and masks grow
with the window, not with the length.

Shapes: T row tokens, Q query tokens of a call, K key tokens of a call, n heads, g key/value groups, d head size.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from pact_nemo.policy.fused import rotate
from pact_nemo.policy.megatron_import import prepare_megatron
from pact_nemo.policy.packing import Run

prepare_megatron()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region  # noqa: E402
from megatron.core.transformer.utils import is_layer_window_attention  # noqa: E402

WINDOW_BLOCK = 512  #: queries of one call in a layer with a sliding window, at most


@dataclass
class AttentionCall:
    """One kernel call.

    Attributes:
        pieces: indices of the key pieces it sees, in row order (see :class:`AttentionPlan`).
        window: keys that each query sees at most, the query's own included; None = more than there are.
        mask: [Q, K] additive mask in the compute dtype; None = as ``window`` says, causal, aligned to the lower right
            corner.
    """

    pieces: list[int]
    window: int | None = None
    mask: torch.Tensor | None = None


@dataclass
class AttentionPlan:
    """How one rank computes attention for one packed row.

    Attributes:
        query_lengths: tokens of each call; they cover this rank's queries in order.
        piece_lengths: the whole row of keys cut into pieces, in row order.
        calls: one per entry of ``query_lengths``.
    """

    query_lengths: list[int]
    piece_lengths: list[int]
    calls: list[AttentionCall]

    def add_masks(self, dtype: torch.dtype) -> None:
        """Store the masks, for kernels that would otherwise build them again in every layer (CPU)."""
        known: dict[tuple[int, int, int | None], torch.Tensor] = {}
        for queries, call in zip(self.query_lengths, self.calls, strict=True):
            keys = sum(self.piece_lengths[piece] for piece in call.pieces)
            if queries != keys or call.window is not None:
                kind = (queries, keys, call.window)
                if kind not in known:
                    known[kind] = lower_right_mask(queries, keys, dtype, window=call.window)
                call.mask = known[kind]


@dataclass
class TreeBatch(PackedSeqParams):
    """What the layers need to know of the current micro-batch; travels where megatron passes ``packed_seq_params``.

    Attributes:
        position_ids: [T_local] int64 depth of each of this rank's tokens (before sequence parallelism).
        plan: attention plan.
        window_plan: attention plan of the layers with a sliding window; None = there are none.
        key_order: [T] int64 or None; index that puts the keys gathered over context parallelism back into row order.
        source_index: [S_local] int64 local positions whose hidden states predict this rank's scored tokens.
        target_ids: [S_local] int64 scored tokens.
        temperature: divisor of the logits: one number, or float32 [S_local], one for each scored token.
        wants_entropy: the last stage computes the entropy of each distribution, too.
        entropy: [S_local] float32 entropies in nats with gradient, written by the forward pass of the last stage; None
            = not wanted.
        rotation: cosines and sines [T_local, 1, 1, d / 2] of the rotary embedding; None = queries and keys come
            rotated.
    """

    position_ids: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    plan: AttentionPlan | None = None
    window_plan: AttentionPlan | None = None
    key_order: torch.Tensor | None = None
    source_index: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    target_ids: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    temperature: float | torch.Tensor = 1.0
    wants_entropy: bool = False
    entropy: torch.Tensor | None = None
    rotation: tuple[torch.Tensor, torch.Tensor] | None = None


def lower_right_mask(
    queries: int, keys: int, dtype: torch.dtype, *, window: int | None = None, device: Any = None
) -> torch.Tensor:
    """[Q, K] additive causal mask in which the last query sees all keys, or the last ``window`` of them."""
    mask = torch.full((queries, keys), float("-inf"), dtype=dtype, device=device)
    if window is None:
        return mask.triu_(keys - queries + 1)
    seen = (
        torch.ones((queries, keys), dtype=torch.bool, device=device)
        .tril_(keys - queries)
        .triu_(keys - queries - window + 1)
    )
    return mask.masked_fill_(seen, 0.0)


def plan_attention(
    runs: list[Run], positions: torch.Tensor | None = None, *, window: int | None = None
) -> AttentionPlan:
    """Cut a packed row into kernel calls.

    Args:
        runs: the row's runs in row order, covering it without gaps.
        positions: [T_local] row positions of this context-parallel rank's queries in local order; None = all of them in
            row order.
        window: positions that a token sees, its own included (a key at depth k is seen from depth q if
            ``q - k < window``); None = all.

    Returns:
        the plan, without stored masks.
    """
    if positions is None:
        stretches = [(index, run.start, run.stop) for index, run in enumerate(runs)]
    else:
        stretches = _stretches(runs, positions.tolist())
    if window is not None:
        stretches = [
            (index, begin, min(begin + WINDOW_BLOCK, stop))
            for index, start, stop in stretches
            for begin in range(start, stop, WINDOW_BLOCK)
        ]
    paths = [
        _path(runs, index, stop, None if window is None else stop - start + window - 1)
        for index, start, stop in stretches
    ]
    cuts = sorted(
        {
            0,
            *(run.stop for run in runs),
            *(stop for _, _, stop in stretches),
            *(begin for path in paths for begin, _ in path),
        }
    )
    number = {cut: index for index, cut in enumerate(cuts)}
    calls = []
    for path in paths:
        keys = sum(end - begin for begin, end in path)
        pieces = [piece for begin, end in path for piece in range(number[begin], number[end])]
        calls.append(AttentionCall(pieces, window if window is not None and keys > window else None))
    return AttentionPlan(
        query_lengths=[stop - start for _, start, stop in stretches],
        piece_lengths=[end - begin for begin, end in zip(cuts, cuts[1:], strict=False)],
        calls=calls,
    )


def _path(runs: list[Run], index: int, stop: int, limit: int | None) -> list[tuple[int, int]]:
    """Row positions (begin, end) from the root to ``stop`` in run ``index``, in row order; the last ``limit`` of
    them.
    """
    path: list[tuple[int, int]] = []
    while index >= 0 and (limit is None or limit > 0):
        start = runs[index].start if limit is None else max(runs[index].start, stop - limit)
        path.append((start, stop))
        if limit is not None:
            limit -= stop - start
        index = runs[index].parent
        stop = runs[index].stop
    return path[::-1]


def _stretches(runs: list[Run], positions: list[int]) -> list[tuple[int, int, int]]:
    """(run, first position, end position) of each stretch of neighbouring ``positions`` that lies within one run."""
    starts = [run.start for run in runs]
    found: list[tuple[int, int, int]] = []
    for position in positions:
        index = bisect.bisect_right(starts, position) - 1
        if found and found[-1][0] == index and found[-1][2] == position:
            found[-1] = (index, found[-1][1], position + 1)
        else:
            found.append((index, position, position + 1))
    return found


class TreeCoreAttention(torch.nn.Module):
    """Core attention of the layer spec for packed trees; the plan comes with the micro-batch's :class:`TreeBatch`."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ):
        super().__init__()
        self.scale = softmax_scale
        self.windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.context_parallel = config.context_parallel_size

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: TreeBatch | None = None,
    ) -> torch.Tensor:
        """query [T_local, 1, n, d]; key, value [T_local, 1, g, d] -> [T_local, 1, n * d]."""
        assert packed_seq_params is not None, "TreeCoreAttention needs a TreeBatch"
        plan = packed_seq_params.window_plan if self.windowed else packed_seq_params.plan
        assert plan is not None, "a layer with a sliding window needs a plan for it"
        if packed_seq_params.rotation is not None:
            query, key = rotate(query, *packed_seq_params.rotation), rotate(key, *packed_seq_params.rotation)
        if self.context_parallel > 1:
            key, value = self._gather(key, value, packed_seq_params)
        gqa = query.shape[2] != key.shape[2]
        # splits, not slices: the gradient of a split is one concatenation
        queries = query.permute(1, 2, 0, 3).split(plan.query_lengths, dim=2)
        keys = key.permute(1, 2, 0, 3).split(plan.piece_lengths, dim=2)
        values = value.permute(1, 2, 0, 3).split(plan.piece_lengths, dim=2)
        outputs = []
        for q, call in zip(queries, plan.calls, strict=True):
            k, v = _select(keys, call.pieces), _select(values, call.pieces)
            mask = call.mask
            if mask is None and call.window is not None:
                mask = lower_right_mask(q.shape[2], k.shape[2], q.dtype, window=call.window, device=q.device)
            elif mask is None and q.shape[2] != k.shape[2]:
                mask = causal_lower_right(q.shape[2], k.shape[2])
            if q.device.type == "cpu" and q.dtype == torch.bfloat16:
                outputs.append(CpuAttention.apply(q, k, v, mask, self.scale))
                continue
            outputs.append(
                F.scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=gqa
                )
            )
        # kernels return [1, n, Q, d] laid out as [1, Q, n, d]: join along tokens without changing that
        joined = torch.cat([output.permute(2, 0, 1, 3) for output in outputs])
        return joined.reshape(joined.shape[0], 1, -1)

    def _gather(self, key: torch.Tensor, value: torch.Tensor, batch: TreeBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the whole row in row order, from all context-parallel ranks; backward sums their
        gradients.
        """
        assert batch.key_order is not None
        both = gather_from_sequence_parallel_region(
            torch.cat([key, value], dim=-1),
            tensor_parallel_output_grad=True,
            group=parallel_state.get_context_parallel_group(),
        )
        key, value = both.index_select(0, batch.key_order).split([key.shape[-1], value.shape[-1]], dim=-1)
        return key, value


class CpuAttention(torch.autograd.Function):
    """torch's flash kernel for the CPU on bfloat16, with its backward pass in float32.

    The kernel multiplies in float32 whatever it is given. Its backward pass on bfloat16 takes 1.5 times as long as on
    float32, conversion included, and rounds more. What is kept for it is bfloat16, as the kernel itself would keep.
    """

    @staticmethod
    def forward(
        context: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float | None
    ) -> torch.Tensor:
        """q [1, n, Q, d]; k, v [1, g, K, d]; mask [Q, K] or None = causal -> [1, n, Q, d], all bfloat16."""
        output, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, mask is None, attn_mask=mask, scale=scale
        )
        context.save_for_backward(q, k, v, mask, output, log_sums)
        context.scale = scale
        return output  # type: ignore[no-any-return]

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        q, k, v, mask, output, log_sums = context.saved_tensors
        exact = [tensor.float() for tensor in (gradient, q, k, v, output)]
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *exact, log_sums, 0.0, mask is None, attn_mask=None if mask is None else mask.float(), scale=context.scale
        )
        return *(tensor.to(q.dtype) for tensor in found), None, None


def _select(pieces: tuple[torch.Tensor, ...], wanted: list[int]) -> torch.Tensor:
    """Join pieces along dimension 2, without a copy if there is one only."""
    if len(wanted) == 1:
        return pieces[wanted[0]]
    return torch.cat([pieces[piece] for piece in wanted], dim=2)
