"""Prompt-only anchoring (eq. 13): one Bernoulli draw per prompt and step, a function of its arguments and of nothing
else.
"""

from __future__ import annotations

import hashlib
import json


def uniform(*key: int | str) -> float:
    """A number in [0, 1), a multiple of 2^-53, from a key; the same on every platform, in every process and in any
    order of calls.

    The key's encoding (JSON, ASCII) is one-to-one, so that different keys never share a digest input.
    """
    digest = hashlib.blake2b(json.dumps(key, ensure_ascii=True).encode("ascii"), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / float(1 << 53)


def anchored(seed: int, step: int, prompt_id: str, q: float) -> bool:
    """z_i: True sends the prompt through prompt-only RL in this step. All K rollouts of the prompt share it. q = 0
    never, q = 1 always.

    Raises:
        ValueError: ``q`` is not a probability.
    """
    if not 0.0 <= q <= 1.0:
        raise ValueError(f"anchoring probability q={q} is not in [0, 1]")
    return uniform("gate", seed, step, prompt_id) < q
