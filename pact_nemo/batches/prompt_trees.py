"""A prompt's group as a token tree: which contexts the update computes, where each rollout and the trace lie in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from pact_nemo.batches.prompt_groups import PromptGroup, has_advantage, usable
from pact_nemo.methods.base import Method
from pact_nemo.objective.components import is_taught
from pact_nemo.policy.trees import Place, TokenTree, TreeBuilder
from pact_nemo.rollouts.types import Rollout
from pact_nemo.traces.spans import TraceTokens

PROMPT_ONLY, TRACE_CONDITIONED, TRACE = "x", "h", "sft"


@dataclass
class PromptTree:
    """A group laid out as a token tree, with the scored-token ranges of its parts.

    ``spans[(context, k)]`` is the half-open range, in the tree's scored-token order, of rollout k under ``context``
    (``"x"`` or ``"h"``); ``spans[("sft", 0)]`` that of the trace.
    """

    group: PromptGroup
    tree: TokenTree
    spans: dict[tuple[str, int], tuple[int, int]]
    #: positions within h* of its scored tokens
    sft_index: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))


def grow_tree(
    group: PromptGroup,
    boundary_ids: list[int],
    method: Method,
    *,
    contexts: Sequence[str],
    skip_zero_advantage: bool = False,
) -> PromptTree:
    """Lay a group out as one tree: x, its rollouts under x, and, unless the prompt is anchored, h*, the boundary and
    the rollouts under c_h.

    ``skip_zero_advantage``: under c_h, where nothing but the surrogate reads them, only rollouts with an advantage."""
    builder = TreeBuilder(group.prompt_ids)
    spans: dict[tuple[str, int], tuple[int, int]] = {}
    sft_index = np.zeros(0, dtype=np.int64)

    def add_rollouts(at: Place, context: str, chosen: list[int]) -> None:
        for k in chosen:
            start = builder.num_scored
            add_rollout(builder, group.rollouts[k], at)
            spans[(context, k)] = (start, builder.num_scored)

    everyone = [k for k, rollout in enumerate(group.rollouts) if usable(rollout)]
    if PROMPT_ONLY in contexts:
        add_rollouts(builder.root, PROMPT_ONLY, everyone)
    if not group.anchored and TRACE_CONDITIONED in contexts:
        assert group.trace is not None
        sft_index = np.flatnonzero(supervised(group.trace))
        conditioned = (
            [k for k in everyone if not skip_zero_advantage or has_advantage(group, k)] if method.trace_rl else []
        )
        start = builder.num_scored
        end, _ = add_trace(builder, group.trace, builder.root, shown=bool(conditioned) and group.control is None)
        spans[(TRACE, 0)] = (start, builder.num_scored)
        if conditioned and group.control is not None:
            end = builder.add(group.control.token_ids, [False] * len(group.control), builder.root)
        if conditioned:
            boundary = builder.add(boundary_ids, [False] * len(boundary_ids), end)
            add_rollouts(boundary, TRACE_CONDITIONED, conditioned)
    return PromptTree(group, builder.build(), spans, sft_index)


def add_rollout(builder: TreeBuilder, rollout: Rollout, at: Place) -> Place:
    """Let a rollout begin at the end of a prompt or of a privileged context, with a branch for each of its contexts.
    Each scored token is scored once, after what the model had before it when it was sampled (and the trace, where
    ``at`` lies behind one).

    Returns:
        the end of its last context.
    """
    ids, scored, length = np.asarray(rollout.token_ids), np.asarray(rollout.loss_mask, dtype=bool), 0
    for start, end, keep in rollout.stretches():
        at = builder.back(at, length - keep)
        at = builder.add(ids[start:end], scored[start:end], at)
        length = keep + end - start
    return at


def supervised(trace: TraceTokens) -> np.ndarray:
    """[H] bools: the tokens that the SFT term scores."""
    return is_taught(np.asarray(trace.component))


def add_trace(
    builder: TreeBuilder, trace: TraceTokens, at: Place, *, shown: bool, followed: bool = False
) -> tuple[Place, Place]:
    """Let h* begin at the end of x, with a branch for each context in which a part of it is taught. Scored tokens keep
    the order of h*.

    Args:
        shown: something follows the whole of h*, thoughts included; else what only that would need is left out.
        followed: something follows the last context in which h* is taught.

    Returns:
        the end of h*, if ``shown``; the end of the last context.
    """
    flags, branches = supervised(trace), trace.branches
    bounds = [0, *(branch.start for branch in branches), len(trace)]
    whole = at
    length = 0
    for index, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        last = index == len(branches)
        context = branches[index - 1].context_ids if index else ()
        keep = branches[index - 1].keep if index else 0
        count = end - start
        # what comes after the last taught token, and is in no later context, isn't computed
        if not (last and (followed or not branches)):
            taught = np.flatnonzero(flags[start:end])
            count = int(taught[-1]) + 1 if len(taught) else 0
            count = count if last else max(count, branches[index].keep - keep - len(context))
        scored = [False] * len(context) + flags[start : start + count].tolist()
        ids = [*context, *trace.token_ids[start : start + count]]
        if shown and not index:  # all of h*, of which the first context is the beginning
            scored += [False] * (len(trace) - count)
            ids = list(trace.token_ids)
        at = builder.add(ids, scored, builder.back(at, length - keep))
        length = keep + len(ids)
        whole = at if not index else whole
    return whole, at


def tempered(prompts: Sequence[PromptTree], method: Method, temperature: float) -> list[PromptTree]:
    """Every tree, to be scored and updated as the policy that sampled: rollouts at the temperature they were sampled
    at.

    pi_theta, pi_old and the reference are so all the tempered policy. The trace is scored at 1: its cross-entropy is
    that of the model itself, which is what a deployed model, at whatever temperature, starts from. A trace that is a
    sample of its group is scored like the others: its ratio is the tempered one.
    """
    if temperature == 1.0:
        return list(prompts)
    of_trace = temperature if method.trace_is_sample else 1.0
    found = []
    for prompt in prompts:
        values = torch.full((prompt.tree.num_scored,), temperature)
        if (TRACE, 0) in prompt.spans:
            values[slice(*prompt.spans[(TRACE, 0)])] = of_trace
        found.append(replace(prompt, tree=replace(prompt.tree, temperatures=values)))
    return found


def contexts_needed(group: PromptGroup, method: Method, *, diagnostics: bool) -> list[str]:
    """Which contexts the update forward of this prompt has to run: no context is computed that no term and no
    diagnostic reads.
    """
    contexts, objective = [], method.objective
    if group.anchored or not method.trace_rl or objective.kl_coef > 0 or objective.entropy_coef > 0 or diagnostics:
        contexts.append(PROMPT_ONLY)
    if not group.anchored:
        contexts.append(TRACE_CONDITIONED)
    return contexts


def carried_over(source: PromptTree, target: PromptTree, values: torch.Tensor) -> torch.Tensor:
    """[S of target] per-rollout values of a prompt-only tree at the same rollouts' prompt-only ranges in the full tree,
    0 elsewhere.
    """
    out = torch.zeros(target.tree.num_scored, dtype=values.dtype)
    for key, (start, end) in source.spans.items():
        if key in target.spans:
            out[slice(*target.spans[key])] = values[start:end]
    return out
