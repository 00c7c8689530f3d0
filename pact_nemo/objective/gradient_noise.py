"""How much of a mini-batch's gradient is signal, from the cosine between the gradients of its two halves."""

from __future__ import annotations

import math


def signal_share(cosine: float) -> float:
    """Share of the squared norm of the whole mini-batch's gradient that is signal, from the cosine between those of its
    halves; 0 below 0.

    With the true gradient g and independent noise of variance s^2 a prompt, halves of n/2 prompts have E cos = |g|^2 /
    (|g|^2 + 2 s^2 / n), and the whole has |g|^2 / (|g|^2 + s^2 / n) = 2 cos / (1 + cos) (the Spearman-Brown formula).
    """
    return max(2 * cosine / (1 + cosine), 0.0) if cosine > -1 else 0.0


def prompts_for_half(cosine: float, prompts: int) -> float:
    """Prompts a mini-batch for a signal share of one half: s^2 / |g|^2 = (n / 2) (1 - cos) / cos. Infinite where the
    cosine is not above 0.
    """
    return prompts / 2 * (1 - cosine) / cosine if cosine > 0 else math.inf
