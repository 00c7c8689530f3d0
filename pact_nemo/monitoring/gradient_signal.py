"""Is the batch large enough? The gradients of two halves of a mini-batch, term by term: what they have in common is
signal, the rest is noise.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from pact_nemo.batches.prompt_trees import PromptTree
from pact_nemo.methods.base import Method
from pact_nemo.objective.gate import uniform
from pact_nemo.objective.gradient_noise import prompts_for_half, signal_share
from pact_nemo.objective.loss import STREAMS
from pact_nemo.policy.trees import TokenTree

if TYPE_CHECKING:
    from pact_nemo.policy.policy import MegatronPolicy


def terms_of(method: Method) -> dict[str, tuple[str, ...]]:
    """term -> the weight streams that make it up."""
    own = tuple(term.stream for term in method.terms)
    return {"rl": ("w_rl_x", "w_rl_h"), "sft": ("w_sft_reasoning", "w_sft_call", *own)}


def halves(prompts: list[PromptTree], *, seed: int, step: int) -> tuple[list[PromptTree], list[PromptTree]]:
    """Two halves drawn by (seed, step, prompt) alone, as a batch draws its prompts. With as many anchored prompts in
    each they would agree more than two batches do.
    """
    order = sorted(prompts, key=lambda prompt: uniform("half", seed, step, prompt.group.task.id))
    return order[::2], order[1::2]


def term_of(prompts: list[PromptTree], names: tuple[str, ...]) -> list[TokenTree]:
    """The trees of the prompts in which the term has weight, with the weights of every other term 0."""
    kept = []
    for prompt in prompts:
        streams = prompt.tree.streams
        if any(name in streams and bool(streams[name].any()) for name in names):
            own = {name: value for name, value in streams.items() if name in names or not name.startswith("w_")}
            others = {
                name: torch.zeros_like(streams[name]) for name in STREAMS if name.startswith("w_") and name not in names
            }
            kept.append(replace(prompt.tree, streams={**own, **others}))
    return kept


def measure(
    policy: MegatronPolicy, prompts: list[PromptTree], method: Method, *, seed: int, step: int
) -> dict[str, float | None]:
    """Of a mini-batch whose streams are filled. Collective.

    Returns:
        per term ``signal/<term>_product`` <g1, g2> of the halves' gradients, as if both had as many prompts, 0 where a
        half has none; ``_norm``
        |g1 + g2|, the L2 norm of the term's gradient over the mini-batch; ``_share`` (:func:`signal_share`) and
        ``_prompts`` (:func:`prompts_for_half`; None: infinite) by this measurement alone; and ``_cosine``, which is
        left out where a half has no gradient. A term is left out where neither half has any.
    """
    record: dict[str, float | None] = {}
    if len(prompts) < 2:
        return record
    first, second = halves(prompts, seed=seed, step=step)
    for term, names in terms_of(method).items():
        one, other = term_of(first, names), term_of(second, names)
        if one and other:
            cosine, norm, other_norm = policy.gradient_cosine(one, other, method.loss)
        elif one or other:
            cosine, other_norm = math.nan, 0.0
            _, norm, _ = policy.gradient_cosine(one or other, one or other, method.loss)
        else:
            continue
        inner = cosine * norm * other_norm if math.isfinite(cosine) else 0.0
        whole = math.sqrt(max(norm**2 + other_norm**2 + 2 * inner, 0.0))
        product = inner * len(prompts) ** 2 / (4 * len(first) * len(second))  # as of halves of one size
        share = signal_share([product], [whole])
        if share is None:
            continue
        needed = prompts_for_half(share, len(prompts))
        if math.isfinite(cosine):
            record[f"signal/{term}_cosine"] = cosine
        record[f"signal/{term}_product"] = product
        record[f"signal/{term}_norm"] = whole
        record[f"signal/{term}_share"] = share
        record[f"signal/{term}_prompts"] = needed if math.isfinite(needed) else None
    return record
