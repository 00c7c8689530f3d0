"""Denominators: every term's per-token weights, counted over a whole mini-batch before its first forward.

With the denominators inside the weights the loss is a plain sum over tokens, so that no split of the tokens can change
it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

AGGREGATIONS = ("rollout-mean", "token-mean", "constant-length")
SFT_AGGREGATIONS = ("trace-mean", "token-mean")


def rl_weights(
    token_counts: Sequence[Sequence[int]],
    usable: Sequence[Sequence[bool]],
    *,
    num_prompts: int,
    aggregation: str = "rollout-mean",
    constant_length: int | None = None,
) -> list[list[float]]:
    """The weight of each policy token of rollout k of prompt i, for both surrogates and (times its coefficient) the KL
    term.

    K_i is the number of rollouts of prompt i that count: usable ones with at least one policy token. A failed rollout
    is no sample of the policy, so it has weight 0 and the mean over K is over the remaining ones; a prompt whose
    rollouts all failed contributes 0 and still counts in |B| if the caller counts it.

    Args:
        token_counts: per prompt, per rollout: policy-written tokens |M(tau)|.
        usable: per prompt, per rollout: False for failed rollouts.
        num_prompts: |B|, the prompts of the mini-batch over all ranks.
        aggregation: ``rollout-mean`` 1/(|B| K_i |M|): token mean per rollout, mean over rollouts, mean over prompts
            (eq. 14); ``token-mean`` 1/(all policy tokens that count in the mini-batch); ``constant-length`` 1/(|B| K_i
            constant_length).
        constant_length: tokens; needed by ``constant-length`` only.

    Returns:
        Per prompt, per rollout: one number, the same for all of its policy tokens.

    Raises:
        ValueError: an unknown aggregation, lists of different lengths, a negative count, ``num_prompts`` or
            ``constant_length`` below 1.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation {aggregation!r} is none of {', '.join(AGGREGATIONS)}")
    length = 1 if aggregation != "constant-length" else constant_length if constant_length is not None else 0
    if num_prompts < 1 or length < 1:
        raise ValueError(f"num_prompts={num_prompts} and constant_length={constant_length} must be at least 1")
    if any(n < 0 for counts in token_counts for n in counts):
        raise ValueError("a token count is negative")
    live = [[n if ok else 0 for n, ok in zip(*row, strict=True)] for row in zip(token_counts, usable, strict=True)]
    total = sum(map(sum, live))
    weights = []
    for counts in live:
        group = num_prompts * sum(n > 0 for n in counts)  # |B| K_i
        if aggregation == "rollout-mean":
            weights.append([1.0 / (group * n) if n else 0.0 for n in counts])
        elif aggregation == "token-mean":
            weights.append([1.0 / total if n else 0.0 for n in counts])
        else:
            weights.append([1.0 / (group * length) if n else 0.0 for n in counts])
    return weights


def sft_weights(
    masks: Sequence[np.ndarray],
    anchored: Sequence[bool],
    *,
    num_prompts: int,
    beta: float,
    aggregation: str = "trace-mean",
) -> list[np.ndarray]:
    """Per prompt [H], the weight of each trace token; zeros when z = 1 or nothing is taught.

    Args:
        masks: per prompt [H] m_n(s) >= 0; empty where there is no trace.
        anchored: per prompt, the gate z.
        num_prompts: |B|, anchored prompts included.
        beta: beta_SFT.
        aggregation: ``trace-mean`` (1 - z) beta m_n / (Z |B|) with Z = sum of m_n over the trace (eq. 9, 14);
            ``token-mean`` (1 - z) beta m_n / sum of m_n over all traces of the mini-batch with z = 0 (CHORD's public
            code).

    Raises:
        ValueError: an unknown aggregation, lists of different lengths, a weight that is negative or not finite,
            ``num_prompts`` below 1.
    """
    if aggregation not in SFT_AGGREGATIONS:
        raise ValueError(f"SFT aggregation {aggregation!r} is none of {', '.join(SFT_AGGREGATIONS)}")
    if num_prompts < 1:
        raise ValueError(f"num_prompts={num_prompts} must be at least 1")
    for mask in masks:
        if not np.all(np.isfinite(mask)) or np.any(mask < 0.0):
            raise ValueError("an SFT weight m_n is negative or not finite")
    totals = [0.0 if gate else float(mask.sum()) for mask, gate in zip(masks, anchored, strict=True)]
    every = sum(totals)
    denominators = [every if aggregation == "token-mean" else total * num_prompts for total in totals]
    return [
        beta * mask / denominator if total > 0.0 else np.zeros(len(mask))
        for mask, total, denominator in zip(masks, totals, denominators, strict=True)
    ]
