"""How much of a mini-batch's gradient is signal, from the gradients of its two halves."""

from __future__ import annotations

import math
from collections.abc import Sequence


def signal_share(products: Sequence[float], norms: Sequence[float]) -> float | None:
    """Share of the squared norm of the whole mini-batch's gradient that is signal, over some measurements.

    With the true gradient g and independent noise of variance s^2 a prompt, the whole g1 + g2 has E |g1 + g2|^2 =
    |g|^2 + s^2 / n, and its halves have E <g1, g2> = |g|^2 / 4. Both sums are unbiased, also where a half has no
    gradient at all and its product is 0; a mean of cosines is not. With halves of one length it is 2 cos / (1 + cos).

    Args:
        products: <g1, g2> of each measurement.
        norms: |g1 + g2| of each.

    Returns:
        a share in [0, 1]; None where no measurement had a gradient.
    """
    whole = math.fsum(norm**2 for norm in norms)
    return min(max(4 * math.fsum(products) / whole, 0.0), 1.0) if whole > 0 else None


def prompts_for_half(share: float, prompts: int) -> float:
    """Prompts a mini-batch for a signal share of one half: s^2 / |g|^2 = n (1 - share) / share. Infinite at 0.

    Args:
        share: :func:`signal_share` at ``prompts`` prompts a mini-batch.
    """
    return prompts * (1 - share) / share if share > 0 else math.inf
