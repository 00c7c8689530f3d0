"""The batch loss (eq. 14) as a plain sum over scored tokens; what the trainer hands to the policy.

Gate, beta, coefficients and denominators are inside the ``w_*`` streams (:mod:`pact_nemo.objective.weights`), so the
loss and all metrics add up exactly over any split of the tokens into micro-batches, ranks or packs. Everything stays on
the device: no host synchronisation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pact_nemo.objective.baselines import phi_weighted_nll, shaped_off_policy
from pact_nemo.objective.kl import kl_estimate
from pact_nemo.objective.sft import token_nll
from pact_nemo.objective.surrogate import Clip, clipped_surrogate, log_ratio

#: (log-probs [S], streams) -> (scalar loss, metrics)
LossFn = Callable[[Tensor, Mapping[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]
#: What every call needs; ``old_logprobs``, ``w_sft_phi`` (CHORD), ``w_off`` (LUFFY), ``w_entropy`` with ``entropy`` may
#: come besides.
STREAMS = ("advantages", "importance", "ref_logprobs", "w_rl_x", "w_rl_h", "w_sft_reasoning", "w_sft_call", "w_kl")


def pact_loss(
    logprobs: Tensor, streams: Mapping[str, Tensor], *, clip: Clip, shaping: float = 0.1
) -> tuple[Tensor, dict[str, Tensor]]:
    """L = sum_n [ (w_rl_x + w_rl_h) importance surrogate_n - (w_sft_reasoning + w_sft_call) logprob_n + w_kl k3_n ].

    Args:
        logprobs: [S] current log-probs in nats, with gradient; S may be 0.
        streams: [S] each, the names of ``STREAMS``; ``old_logprobs`` besides. Without ``old_logprobs`` the update is
            the single on-policy one and the detached current log-probs are used: every ratio is exactly 1.
        clip: range of ratios, of both surrogates.
        shaping: gamma of the ``w_off`` term (:func:`pact_nemo.objective.baselines.shaped_off_policy`).

    The terms of ``w_sft_phi`` and ``w_off``, where given, are added and reported as ``loss/sft_phi`` and ``loss/off``.
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
    loss = logprobs.new_zeros(())
    metrics: dict[str, Tensor] = {}

    def add(term: str, count: str, active: Tensor, values: Tensor, of: Tensor = logprobs) -> None:
        nonlocal loss
        total = values.sum()
        loss = loss + total
        metrics[f"loss/{term}"] = total.detach()
        metrics[count] = _count(active, loss)
        metrics[f"nonfinite/{term}"] = _count(active & ~(torch.isfinite(of) & torch.isfinite(values)), loss)

    for context in ("x", "h"):
        weight = streams[f"w_rl_{context}"]
        active = weight != 0
        current = _only(active, logprobs)
        before = _only(active, streams["old_logprobs"]) if "old_logprobs" in streams else current.detach()
        surrogate, clipped = clipped_surrogate(current, before, _only(active, streams["advantages"]), clip)
        add(f"rl_{context}", f"tokens/{context}", active, _only(active, weight * streams["importance"]) * surrogate)
        change = log_ratio(current, before).detach()  # 0 on tokens without a weight
        metrics[f"clip/{context}"] = _count(clipped, loss)
        metrics[f"approx_kl/{context}"] = (torch.expm1(change) - change).sum()
        metrics[f"max/ratio_{context}"] = (
            _only(active, change.exp()).max() if len(change) else loss.detach().new_zeros(())
        )

    for part in ("reasoning", "call"):
        weight = streams[f"w_sft_{part}"]
        add(f"sft_{part}", f"tokens/sft_{part}", weight != 0, token_nll(logprobs, weight))

    if "w_sft_phi" in streams:
        weight = streams["w_sft_phi"]
        add("sft_phi", "tokens/sft_phi", weight != 0, phi_weighted_nll(logprobs, weight))
    if "w_off" in streams:
        weight = streams["w_off"]
        add("off", "tokens/off", weight != 0, shaped_off_policy(logprobs, streams["advantages"], weight, shaping))

    if "w_entropy" in streams:
        weight = streams["w_entropy"]
        active = weight != 0
        add("entropy", "tokens/entropy", active, -weight * _only(active, streams["entropy"]), streams["entropy"])

    weight = streams["w_kl"]
    active = weight != 0
    estimate = kl_estimate(_only(active, logprobs), _only(active, streams["ref_logprobs"]))
    add("kl", "kl/count", active, weight * estimate)
    metrics["kl/sum"] = estimate.detach().sum()
    return loss, metrics


def _only(active: Tensor, values: Tensor) -> Tensor:
    """[S] values where active, else 0 with gradient 0. Before any exp or product, so that no Inf or NaN of an unused
    token gets through.
    """
    return values.masked_fill(~active, 0.0)


def _count(flags: Tensor, like: Tensor) -> Tensor:
    """Number of True flags as a scalar of ``like``'s dtype, so that every metric reduces the same way."""
    return flags.sum().to(like.dtype)
