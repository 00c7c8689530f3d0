"""The batch loss (eq. 14) as a plain sum over scored tokens; what the trainer hands to the policy.

Gate, beta, coefficients and denominators are inside the ``w_*`` streams (:mod:`pact_nemo.objective.weights`), so the
loss and all metrics add up exactly over any split of the tokens into micro-batches, ranks or packs. Everything stays on
the device: no host synchronisation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pact_nemo.objective.kl import kl_estimate
from pact_nemo.objective.sft import token_nll
from pact_nemo.objective.surrogate import Surrogate, log_ratio

#: (log-probs [S], streams) -> (scalar loss, metrics)
LossFn = Callable[[Tensor, Mapping[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]
#: What every call needs; ``old_logprobs``, the streams of a method's own terms, ``w_entropy`` with ``entropy`` may come
#: besides.
STREAMS = ("advantages", "importance", "ref_logprobs", "w_rl_x", "w_rl_h", "w_sft_reasoning", "w_sft_call", "w_kl")


@dataclass(frozen=True)
class Term:
    """A term that a method adds to the loss.

    Attributes:
        name: of its metrics: ``loss/<name>``, ``tokens/<name>``, ``nonfinite/<name>``.
        stream: its weights, [S]; 0 = the token is not in the term. A batch without this stream has no such term.
        values: (log-probs [S] with gradient, all streams, weights [S]) -> [S], which is summed. A token of weight 0 has
            to have value and gradient exactly 0.
    """

    name: str
    stream: str
    values: Callable[[Tensor, Mapping[str, Tensor], Tensor], Tensor]


class _Total:
    """The loss and its metrics while terms are added."""

    def __init__(self, logprobs: Tensor):
        self.logprobs = logprobs
        self.loss = logprobs.new_zeros(())
        self.metrics: dict[str, Tensor] = {}

    def add(self, term: str, count: str, active: Tensor, values: Tensor, of: Tensor | None = None) -> None:
        """Add a term's [S] values; ``of``: what has to be finite where the term is active (the log-probs)."""
        of = self.logprobs if of is None else of
        total = values.sum()
        self.loss = self.loss + total
        self.metrics[f"loss/{term}"] = total.detach()
        self.metrics[count] = _count(active, self.loss)
        broken = active & ~(torch.isfinite(of) & torch.isfinite(values))
        self.metrics[f"nonfinite/{term}"] = _count(broken, self.loss)


def batch_loss(
    logprobs: Tensor, streams: Mapping[str, Tensor], *, surrogate: Surrogate, terms: Sequence[Term] = ()
) -> tuple[Tensor, dict[str, Tensor]]:
    """L = sum_n [ (w_rl_x + w_rl_h) importance surrogate_n - (w_sft_reasoning + w_sft_call) logprob_n + w_kl k3_n ].

    Args:
        logprobs: [S] current log-probs in nats, with gradient; S may be 0.
        streams: [S] each, the names of ``STREAMS``; ``old_logprobs`` besides. Without ``old_logprobs`` the update is
            the single on-policy one and the detached current log-probs are used: every ratio is exactly 1.
        surrogate: of both contexts; a :class:`~pact_nemo.objective.surrogate.Clip` is one.
        terms: further terms; those whose stream is given are added.

    ``w_entropy`` adds the entropy bonus, -sum of w_entropy_n H_n, reported as ``loss/entropy``; ``entropy`` [S] then
    holds H_n in nats, with gradient.

    A token whose weights are all 0 contributes exactly 0 to loss and gradient, whatever its log-probs are. A token with
    a weight and a log-prob that isn't finite is not hidden: it is counted under ``nonfinite/<term>`` and, if NaN, makes
    ``loss/<term>`` NaN.

    Returns:
        The scalar loss, attached to the graph also when S = 0 or nothing has a weight, and scalar metrics without
        gradient. Those are sums over the given tokens and add up over splits, but ``max/*``, which are maxima (0 over
        no tokens). In rows: name, what, denominator.

        - ``loss/rl_x|rl_h|sft_reasoning|sft_call|kl``: the terms as they enter the loss; denominators inside the
          weights; sum = loss.
        - ``tokens/x|h|sft_reasoning|sft_call``: tokens with a weight in the term.
        - ``clip/x|h``: tokens on the clipped branch; over ``tokens/x|h``.
        - ``approx_kl/x|h``: r - 1 - log r, a sample of KL(pi_old || pi) in nats, unweighted; over ``tokens/x|h``.
        - ``kl/sum``: k3 to the reference in nats, unweighted; over ``kl/count``, the tokens of the KL term.
        - ``nonfinite/<term>``: tokens with a weight whose log-prob or contribution is NaN or Inf.
        - ``max/ratio_x|ratio_h``: largest ratio.

    Raises:
        KeyError: a stream is missing.
        ValueError: a stream's shape is not that of ``logprobs``.
    """
    for name, stream in streams.items():
        if stream.shape != logprobs.shape:
            raise ValueError(f"stream {name} has shape {tuple(stream.shape)}, log-probs have {tuple(logprobs.shape)}")
    total = _Total(logprobs)
    for context in ("x", "h"):
        _add_surrogate(total, streams, context, surrogate)
    for part in ("reasoning", "call"):
        weight = streams[f"w_sft_{part}"]
        total.add(f"sft_{part}", f"tokens/sft_{part}", weight != 0, token_nll(logprobs, weight))
    for term in terms:
        if term.stream in streams:
            weight = streams[term.stream]
            total.add(term.name, f"tokens/{term.name}", weight != 0, term.values(logprobs, streams, weight))
    if "w_entropy" in streams:
        weight = streams["w_entropy"]
        active = weight != 0
        bonus = -weight * _only(active, streams["entropy"])
        total.add("entropy", "tokens/entropy", active, bonus, streams["entropy"])
    active = streams["w_kl"] != 0
    estimate = kl_estimate(_only(active, logprobs), _only(active, streams["ref_logprobs"]))
    total.add("kl", "kl/count", active, streams["w_kl"] * estimate)
    total.metrics["kl/sum"] = estimate.detach().sum()
    return total.loss, total.metrics


def _add_surrogate(total: _Total, streams: Mapping[str, Tensor], context: str, surrogate: Surrogate) -> None:
    """The surrogate's term of one context, ``x`` or ``h``."""
    weight, metrics = streams[f"w_rl_{context}"], total.metrics
    active = weight != 0
    current = _only(active, total.logprobs)
    before = _only(active, streams["old_logprobs"]) if "old_logprobs" in streams else current.detach()
    values, stopped = surrogate(current, before, _only(active, streams["advantages"]))
    total.add(f"rl_{context}", f"tokens/{context}", active, _only(active, weight * streams["importance"]) * values)
    change = log_ratio(current, before).detach()  # 0 on tokens without a weight
    metrics[f"clip/{context}"] = _count(stopped, total.loss)
    metrics[f"approx_kl/{context}"] = (torch.expm1(change) - change).sum()
    largest = _only(active, change.exp()).max() if len(change) else total.loss.detach().new_zeros(())
    metrics[f"max/ratio_{context}"] = largest


def _only(active: Tensor, values: Tensor) -> Tensor:
    """[S] values where active, else 0 with gradient 0. Before any exp or product, so that no Inf or NaN of an unused
    token gets through.
    """
    return values.masked_fill(~active, 0.0)


def _count(flags: Tensor, like: Tensor) -> Tensor:
    """Number of True flags as a scalar of ``like``'s dtype, so that every metric reduces the same way."""
    return flags.sum().to(like.dtype)
