"""Log-probabilities of given tokens under a vocabulary that is too large to materialise.

Shapes: S scored positions, H hidden size, V' = this tensor-parallel rank's rows of the (padded) vocabulary.
Peak memory beyond inputs and outputs is one chunk of logits, ``chunk x V'`` in float32 (and once more in the compute dtype where that is
lower), forward and backward, whatever S is; the backward pass recomputes the logits chunk by chunk instead of keeping them, but for the last
chunk, whose place nothing else needs in between: up to ``chunk`` positions cost no second product. The gradients need no memory of their own
where the caller says so: ``overwrite_hidden`` and ``main_grad``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable


class _VocabParallelLogprob(torch.autograd.Function):
    """log softmax(hidden @ weight.T / temperature)[target], with the vocabulary split over the tensor-parallel group."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_SH: torch.Tensor,
        weight_VH: torch.Tensor,
        target_S: torch.Tensor,
        first_row: int,
        valid_rows: int,
        temperature: float,
        chunk: int,
        group: dist.ProcessGroup | None,
        entropy_S: torch.Tensor | None,
        overwrite_hidden: bool,
        main_grad: torch.Tensor | None,
        placeholder: bool,
    ) -> torch.Tensor:
        num = hidden_SH.shape[0]
        ctx.last = None
        accumulate = _accumulate_dtype(hidden_SH.dtype)
        logprob_S = torch.empty(num, dtype=accumulate, device=hidden_SH.device)
        logsumexp_S = torch.empty_like(logprob_S)
        buffers = _ChunkBuffers(hidden_SH, weight_VH, chunk)
        for begin in range(0, num, chunk):
            rows = slice(begin, min(begin + chunk, num))
            logits, hit, local = buffers.logits( hidden_SH[rows], weight_VH, target_S[rows], first_row, valid_rows, temperature)
            maximum = logits.amax(-1)
            if group is not None:
                dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
            target_logit = logits.gather(1, local[:, None])[:, 0].masked_fill(~hit, 0.0)
            mean_logit = None
            logits -= maximum[:, None]
            if entropy_S is not None:
                exp = logits.exp()
                mean_logit = (exp * logits.clamp_min(torch.finfo(logits.dtype).min)).sum(-1)
                sums = exp.sum(-1)
            else:
                sums = logits.exp_().sum(-1)
            parts = [sums, target_logit] + ([mean_logit] if mean_logit is not None else [])
            reduced = torch.stack(parts)
            if group is not None:
                dist.all_reduce(reduced, group=group)
            logsumexp = reduced[0].log() + maximum
            logsumexp_S[rows] = logsumexp
            logprob_S[rows] = reduced[1] - logsumexp
            if entropy_S is None:
                ctx.last = (buffers, (maximum - logsumexp).exp_())
            else:
                entropy_S[rows] = (reduced[0].log() - reduced[2] / reduced[0]).to(entropy_S.dtype)
        ctx.save_for_backward(hidden_SH, weight_VH, target_S, logsumexp_S)
        ctx.settings = (first_row, valid_rows, temperature, chunk)
        ctx.gradients = (overwrite_hidden, main_grad, placeholder)
        return logprob_S

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        hidden_SH, weight_VH, target_S, logsumexp_S = ctx.saved_tensors
        overwrite_hidden, main_grad, placeholder = ctx.gradients
        grad_hidden = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_hidden = hidden_SH if overwrite_hidden else torch.empty_like(hidden_SH)
        if ctx.needs_input_grad[1]:
            grad_weight = main_grad if main_grad is not None else torch.zeros_like(weight_VH, dtype=_accumulate_dtype(weight_VH.dtype))
        last, ctx.last = ctx.last, None  # good for one backward pass, which overwrites it
        _add_gradients(grad_hidden, grad_weight, hidden_SH, weight_VH, target_S, logsumexp_S, grad_outputs[0], last, *ctx.settings)
        del last
        if grad_weight is not None and main_grad is None:
            grad_weight = grad_weight.to(weight_VH.dtype)
        elif grad_weight is not None:
            grad_weight = torch.empty_like(weight_VH) if placeholder else None
        return grad_hidden, grad_weight, *[None] * 10


def _add_gradients(
    grad_hidden: torch.Tensor | None,
    grad_weight: torch.Tensor | None,
    hidden_SH: torch.Tensor,
    weight_VH: torch.Tensor,
    target_S: torch.Tensor,
    logsumexp_S: torch.Tensor,
    grad_S: torch.Tensor,
    last: tuple[_ChunkBuffers, torch.Tensor] | None,
    first_row: int,
    valid_rows: int,
    temperature: float,
    chunk: int,
) -> None:
    """Write the gradient of the hidden states and add that of the weight, logits chunk by chunk from the end. ``grad_hidden`` may be ``hidden_SH``
    itself; ``last`` is what the forward pass left: the buffers with exp(logit - maximum) of the last chunk, and what makes it a softmax, [n]."""
    buffers = last[0] if last is not None else _ChunkBuffers(hidden_SH, weight_VH, chunk)
    for begin in reversed(range(0, hidden_SH.shape[0], chunk)):
        rows = slice(begin, min(begin + chunk, hidden_SH.shape[0]))
        if last is not None:
            grad_logits = buffers.exact[: rows.stop - begin]
            grad_logits *= last[1][:, None]
            hit, local = _own_targets(target_S[rows], first_row, weight_VH.shape[0])
            last = None
        else:
            logits, hit, local = buffers.logits(hidden_SH[rows], weight_VH, target_S[rows], first_row, valid_rows, temperature)
            logits -= logsumexp_S[rows, None]
            grad_logits = logits.exp_()
        scale = grad_S[rows, None].to(grad_logits.dtype) / temperature
        grad_logits *= -scale
        grad_logits.scatter_add_(1, local[:, None], scale * hit[:, None])
        grad_logits = buffers.lowered(grad_logits)
        if grad_weight is not None:  # first: it reads the chunk's hidden states, which their gradient may overwrite
            if grad_weight.dtype == grad_logits.dtype:
                grad_weight.addmm_(grad_logits.t(), hidden_SH[rows])
            else:
                grad_weight += grad_logits.t() @ hidden_SH[rows]
        if grad_hidden is not None:
            torch.mm(grad_logits, weight_VH, out=grad_hidden[rows])


class _ChunkBuffers:
    """Logits of one chunk, written again for every chunk: as the matrix product gives them, and in float32 where that is another dtype."""

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, chunk: int):
        shape = (min(hidden.shape[0], chunk), weight.shape[0])
        self._raw = torch.empty(shape, dtype=weight.dtype, device=hidden.device)
        exact = _accumulate_dtype(weight.dtype)
        self.exact = self._raw if exact == weight.dtype else torch.empty(shape, dtype=exact, device=hidden.device)

    def logits(
        self, hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, first_row: int, valid_rows: int, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits [n, V'] in at least float32 with the vocabulary's padding rows at -inf; which targets are this rank's; their local rows."""
        raw, logits = self._raw[: hidden.shape[0]], self.exact[: hidden.shape[0]]
        torch.mm(hidden, weight.t(), out=raw)
        if logits.dtype != raw.dtype:
            logits.copy_(raw)
        if temperature != 1.0:
            logits /= temperature
        if valid_rows < weight.shape[0]:
            logits[:, max(valid_rows, 0) :] = float("-inf")
        return logits, *_own_targets(target, first_row, weight.shape[0])

    def lowered(self, values: torch.Tensor) -> torch.Tensor:
        """Values of the float32 buffer in the compute dtype."""
        return values if values.dtype == self._raw.dtype else self._raw[: values.shape[0]].copy_(values)


def _own_targets(target: torch.Tensor, first_row: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[n] which targets are this rank's rows, and their local numbers (0 elsewhere)."""
    hit = (target >= first_row) & (target < first_row + rows)
    return hit, torch.where(hit, target - first_row, torch.zeros_like(target))


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def vocab_parallel_logprobs(
    hidden_SH: torch.Tensor,
    weight_VH: torch.Tensor,
    target_S: torch.Tensor,
    *,
    vocab_size: int,
    chunk: int,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    entropy_S: torch.Tensor | None = None,
    overwrite_hidden: bool = False,
    main_grad: torch.Tensor | None = None,
    placeholder: bool = False,
) -> torch.Tensor:
    """Log-probability of each target token, in nats.

    The gradient for ``hidden_SH`` covers this rank's vocabulary rows only; the caller sums it over the tensor-parallel group
    (megatron's copy-to or gather-from region functions do so in their backward pass).

    Args:
        hidden_SH: [S, H] hidden states of the predicting positions, the same on all ranks of ``group``.
        weight_VH: [V', H] this rank's rows of the output matrix, in rank order, padded at the end of the last rank(s).
        target_S: [S] int64 token ids, below ``vocab_size``.
        vocab_size: true size of the vocabulary; padding rows get probability 0.
        chunk: positions per chunk.
        temperature: logits are divided by it.
        group: tensor-parallel group; None or a group of one rank = no communication.
        entropy_S: if given, a float tensor [S] that receives the entropy of each distribution in nats (no gradient).
        overwrite_hidden: the backward pass writes the gradient over ``hidden_SH``, which nobody else may need by then (autograd raises if
            somebody does).
        main_grad: float32 [V', H] that the gradient of ``weight_VH`` is added to, instead of going through autograd.
        placeholder: with ``main_grad``: give autograd an uninitialised gradient of the weight, for hooks that wait for one; else none.

    Returns:
        [S] float32 (float64 for float64 input).
    """
    size = dist.get_world_size(group) if group is not None else 1
    rank = dist.get_rank(group) if size > 1 else 0
    first_row = rank * weight_VH.shape[0]
    valid_rows = min(vocab_size - first_row, weight_VH.shape[0])
    return _VocabParallelLogprob.apply(
        hidden_SH, weight_VH, target_S, first_row, valid_rows, temperature, chunk, group if size > 1 else None, entropy_S,
        overwrite_hidden, main_grad, placeholder,
    )  # fmt: skip
