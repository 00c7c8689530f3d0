"""Log-probabilities of given tokens under a vocabulary that is too large to materialise.

Shapes: S scored positions, H hidden size, V' = this tensor-parallel rank's rows of the (padded) vocabulary.
Peak memory beyond inputs and outputs is one chunk of logits, ``chunk x V'`` in float32, forward and backward, whatever
S is. Where the compute dtype is lower it is there once more in that dtype, and where entropies are wanted a quarter
more in float32. The backward pass recomputes the logits chunk by chunk instead of keeping them, but for the last chunk,
whose place nothing else needs in between: up to ``chunk`` positions cost no second product. The gradients need no
memory of their own where the caller says so: ``overwrite_hidden`` and ``main_grad``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

Temperature: TypeAlias = float | torch.Tensor  #: divisor of the logits: one number, or [S], one for each position


class _VocabParallelLogprob(torch.autograd.Function):
    """log softmax(hidden @ weight.T / temperature)[target] and the distribution's entropy, the vocabulary split over
    the tensor-parallel group.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_SH: torch.Tensor,
        weight_VH: torch.Tensor,
        target_S: torch.Tensor,
        first_row: int,
        valid_rows: int,
        temperature: Temperature,
        chunk: int,
        group: dist.ProcessGroup | None,
        entropy: bool,
        overwrite_hidden: bool,
        main_grad: torch.Tensor | None,
        placeholder: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        num = hidden_SH.shape[0]
        ctx.last = None
        ctx.set_materialize_grads(False)  # None = nobody asked for the gradient of this output
        accumulate = _accumulate_dtype(hidden_SH.dtype)
        logprob_S = torch.empty(num, dtype=accumulate, device=hidden_SH.device)
        logsumexp_S = torch.empty_like(logprob_S)
        entropy_S = torch.empty_like(logprob_S) if entropy else None
        buffers = _ChunkBuffers(hidden_SH, weight_VH, chunk)
        for begin in range(0, num, chunk):
            rows = slice(begin, min(begin + chunk, num))
            logits, hit, local = buffers.logits(
                hidden_SH[rows], weight_VH, target_S[rows], first_row, valid_rows, _rows_of(temperature, rows)
            )
            maximum = logits.amax(-1)
            if group is not None:
                dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
            parts = [logits.gather(1, local[:, None])[:, 0].masked_fill(~hit, 0.0)]
            logits -= maximum[:, None]
            if entropy_S is None:
                parts.append(logits.exp_().sum(-1))
            else:
                parts += _exp_with_moment(logits, buffers, valid_rows)
            reduced = torch.stack(parts)
            if group is not None:
                dist.all_reduce(reduced, group=group)
            logsumexp = reduced[1].log() + maximum
            logsumexp_S[rows] = logsumexp
            logprob_S[rows] = reduced[0] - logsumexp
            if entropy_S is not None:
                entropy_S[rows] = reduced[1].log() - reduced[2] / reduced[1]
            ctx.last = (buffers, (maximum - logsumexp).exp_())
        buffers.second = None
        ctx.save_for_backward(
            hidden_SH, weight_VH, target_S, logsumexp_S, *([entropy_S] if entropy_S is not None else [])
        )
        ctx.settings = (first_row, valid_rows, temperature, chunk)
        ctx.gradients = (overwrite_hidden, main_grad, placeholder)
        return logprob_S, entropy_S

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor | None) -> tuple[Any, ...]:
        hidden_SH, weight_VH, target_S, logsumexp_S, *entropy = ctx.saved_tensors
        overwrite_hidden, main_grad, placeholder = ctx.gradients
        last, ctx.last = ctx.last, None  # good for one backward pass, which overwrites it
        grad_logprob_S, grad_entropy_S = grad_outputs
        if grad_logprob_S is None:
            grad_logprob_S = torch.zeros_like(logsumexp_S)
        grad_hidden = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_hidden = hidden_SH if overwrite_hidden else torch.empty_like(hidden_SH)
        if ctx.needs_input_grad[1]:
            grad_weight = (
                main_grad
                if main_grad is not None
                else torch.zeros_like(weight_VH, dtype=_accumulate_dtype(weight_VH.dtype))
            )
        upstream = _Upstream(grad_logprob_S, None if grad_entropy_S is None else (grad_entropy_S, entropy[0]))
        _add_gradients(
            grad_hidden, grad_weight, hidden_SH, weight_VH, target_S, logsumexp_S, upstream, last, *ctx.settings
        )
        del last
        if grad_weight is not None and main_grad is None:
            grad_weight = grad_weight.to(weight_VH.dtype)
        elif grad_weight is not None:
            grad_weight = torch.empty_like(weight_VH) if placeholder else None
        return grad_hidden, grad_weight, *[None] * 10


@dataclass(frozen=True)
class _Upstream:
    """What the backward pass is given: [S] gradients of the log-probs; where entropies are trained on, their gradients
    and values, [S] each.
    """

    logprob_S: torch.Tensor
    entropy: tuple[torch.Tensor, torch.Tensor] | None


def _add_gradients(
    grad_hidden: torch.Tensor | None,
    grad_weight: torch.Tensor | None,
    hidden_SH: torch.Tensor,
    weight_VH: torch.Tensor,
    target_S: torch.Tensor,
    logsumexp_S: torch.Tensor,
    upstream: _Upstream,
    last: tuple[_ChunkBuffers, torch.Tensor] | None,
    first_row: int,
    valid_rows: int,
    temperature: Temperature,
    chunk: int,
) -> None:
    """Write the gradient of the hidden states and add that of the weight, logits chunk by chunk from the end.
    ``grad_hidden`` may be ``hidden_SH`` itself; ``last`` is what the forward pass left: the buffers with exp(logit -
    maximum) of the last chunk, and what makes it a softmax, [n].

    For upstream gradients g of log p_target and e of the entropy H = -sum of p log p, the gradient of logit v is
    ``(g (1[v = target] - p_v) - e p_v (log p_v + H)) / temperature``."""
    buffers = last[0] if last is not None else _ChunkBuffers(hidden_SH, weight_VH, chunk)
    for begin in reversed(range(0, hidden_SH.shape[0], chunk)):
        rows = slice(begin, min(begin + chunk, hidden_SH.shape[0]))
        divisor = _rows_of(temperature, rows)
        if last is not None and upstream.entropy is None:
            grad_logits = buffers.exact[: rows.stop - begin]
            grad_logits *= last[1][:, None]
            hit, local = _own_targets(target_S[rows], first_row, weight_VH.shape[0])
        else:
            logits, hit, local = buffers.logits(
                hidden_SH[rows], weight_VH, target_S[rows], first_row, valid_rows, divisor
            )
            grad_logits = logits
            grad_logits -= logsumexp_S[rows, None]
            if upstream.entropy is None:
                grad_logits.exp_()
        last = None
        scale = (upstream.logprob_S[rows].to(grad_logits.dtype) / divisor)[:, None]
        if upstream.entropy is None:
            grad_logits *= -scale
        else:
            grad_entropy, entropy = (values[rows].to(grad_logits.dtype) for values in upstream.entropy)
            _times_entropy_gradient(
                grad_logits, buffers, valid_rows, scale, (grad_entropy / divisor)[:, None], entropy[:, None]
            )
        grad_logits.scatter_add_(1, local[:, None], scale * hit[:, None])
        grad_logits = buffers.lowered(grad_logits)
        if grad_weight is not None:  # first: it reads the chunk's hidden states, which their gradient may overwrite
            if grad_weight.dtype == grad_logits.dtype:
                grad_weight.addmm_(grad_logits.t(), hidden_SH[rows])
            else:
                grad_weight += grad_logits.t() @ hidden_SH[rows]
        if grad_hidden is not None:
            torch.mm(grad_logits, weight_VH, out=grad_hidden[rows])


def _exp_with_moment(logits: torch.Tensor, buffers: _ChunkBuffers, valid_rows: int) -> list[torch.Tensor]:
    """exp(x) written over x = ``logits`` [n, V']; the sums of exp(x) and of x exp(x) over the true vocabulary, [n]
    each.
    """
    sums, moments = [], []
    for part, shifted in buffers.copies(logits):
        sums.append(part.exp_().sum(-1))
        shifted *= part
        moments.append(shifted[:, :valid_rows].sum(-1))  # a padding row is -inf, and 0 times that is no number
    return [torch.cat(sums), torch.cat(moments)]


def _times_entropy_gradient(
    log_p: torch.Tensor,
    buffers: _ChunkBuffers,
    valid_rows: int,
    scale: torch.Tensor,
    grad_entropy: torch.Tensor,
    entropy: torch.Tensor,
) -> None:
    """``-p (scale + grad_entropy (log p + entropy))`` written over ``log_p`` [n, V']; the others are [n, 1]."""
    start = 0
    for part, factor in buffers.copies(log_p):
        rows = slice(start, start := start + part.shape[0])
        factor += entropy[rows]
        factor *= -grad_entropy[rows]
        factor -= scale[rows]
        factor[:, valid_rows:] = 0.0  # padding rows: -inf times a probability of 0
        part.exp_()
        part *= factor


def _rows_of(temperature: Temperature, rows: slice) -> Temperature:
    return temperature[rows] if isinstance(temperature, torch.Tensor) else temperature


class _ChunkBuffers:
    """Logits of one chunk, written again for every chunk: as the matrix product gives them, and in float32 where that
    is another dtype.
    """

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, chunk: int):
        shape = (min(hidden.shape[0], chunk), weight.shape[0])
        self._raw = torch.empty(shape, dtype=weight.dtype, device=hidden.device)
        exact = _accumulate_dtype(weight.dtype)
        self.exact = self._raw if exact == weight.dtype else torch.empty(shape, dtype=exact, device=hidden.device)
        self.second: torch.Tensor | None = None  #: of :meth:`copies`; None gives its memory back

    def logits(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        target: torch.Tensor,
        first_row: int,
        valid_rows: int,
        temperature: Temperature,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits [n, V'] in at least float32 with the vocabulary's padding rows at -inf; which targets are this rank's;
        their local rows.
        """
        raw, logits = self._raw[: hidden.shape[0]], self.exact[: hidden.shape[0]]
        torch.mm(hidden, weight.t(), out=raw)
        if logits.dtype != raw.dtype:
            logits.copy_(raw)
        if isinstance(temperature, torch.Tensor):
            logits /= temperature[:, None]
        elif temperature != 1.0:
            logits /= temperature
        if valid_rows < weight.shape[0]:
            logits[:, valid_rows:] = float("-inf")
        return logits, *_own_targets(target, first_row, weight.shape[0])

    def copies(self, values: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Stretches of the rows of ``values``, each with a copy of itself. The copies share one buffer of a quarter of
        a chunk.
        """
        if self.second is None:
            self.second = torch.empty_like(self.exact[: -(-self.exact.shape[0] // 4)])
        size = self.second.shape[0]
        for start in range(0, values.shape[0], size):
            part = values[start : start + size]
            yield part, self.second[: part.shape[0]].copy_(part)

    def lowered(self, values: torch.Tensor) -> torch.Tensor:
        """Values of the float32 buffer in the compute dtype."""
        return values if values.dtype == self._raw.dtype else self._raw[: values.shape[0]].copy_(values)


def _own_targets(target: torch.Tensor, first_row: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[n] which targets are this rank's rows, and their local numbers (0 elsewhere)."""
    hit = (target >= first_row) & (target < first_row + rows)
    return hit, torch.where(hit, target - first_row, torch.zeros_like(target))


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def vocab_parallel_logprobs_and_entropies(
    hidden_SH: torch.Tensor,
    weight_VH: torch.Tensor,
    target_S: torch.Tensor,
    *,
    vocab_size: int,
    chunk: int,
    temperature: Temperature = 1.0,
    group: dist.ProcessGroup | None = None,
    entropy: bool = True,
    overwrite_hidden: bool = False,
    main_grad: torch.Tensor | None = None,
    placeholder: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probability of each target token and the entropy of each distribution, in nats; both have exact gradients.

    The gradient for ``hidden_SH`` covers this rank's vocabulary rows only; the caller sums it over the tensor-parallel
    group (megatron's copy-to or gather-from region functions do so in their backward pass).

    Args:
        hidden_SH: [S, H] hidden states of the predicting positions, the same on all ranks of ``group``.
        weight_VH: [V', H] this rank's rows of the output matrix, in rank order, padded at the end of the last rank(s).
        target_S: [S] int64 token ids, below ``vocab_size``.
        vocab_size: true size of the vocabulary; padding rows get probability 0.
        chunk: positions per chunk.
        temperature: logits are divided by it: a float, or [S] in at least float32, one for each position.
        group: tensor-parallel group; None or a group of one rank = no communication.
        entropy: False leaves out the entropies, -sum of p log p of each distribution (after the temperature), over the
            true vocabulary.
        overwrite_hidden: the backward pass writes the gradient over ``hidden_SH``, which nobody else may need by then
            (autograd raises if somebody does).
        main_grad: float32 [V', H] that the gradient of ``weight_VH`` is added to, instead of going through autograd.
        placeholder: with ``main_grad``: give autograd an uninitialised gradient of the weight, for hooks that wait for
            one; else none.

    Returns:
        [S] log-probs and [S] entropies, None without ``entropy``; float32 (float64 for float64 input).
    """
    size = dist.get_world_size(group) if group is not None else 1
    rank = dist.get_rank(group) if size > 1 else 0
    first_row = rank * weight_VH.shape[0]
    valid_rows = max(0, min(vocab_size - first_row, weight_VH.shape[0]))
    found: tuple[torch.Tensor, torch.Tensor | None] = _VocabParallelLogprob.apply(
        hidden_SH,
        weight_VH,
        target_S,
        first_row,
        valid_rows,
        temperature,
        chunk,
        group if size > 1 else None,
        entropy,
        overwrite_hidden,
        main_grad,
        placeholder,
    )
    return found


def vocab_parallel_logprobs(
    hidden_SH: torch.Tensor, weight_VH: torch.Tensor, target_S: torch.Tensor, **settings: Any
) -> torch.Tensor:
    """[S] log-probabilities alone; arguments as for :func:`vocab_parallel_logprobs_and_entropies`."""
    return vocab_parallel_logprobs_and_entropies(hidden_SH, weight_VH, target_S, entropy=False, **settings)[0]
