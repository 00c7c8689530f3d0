"""What one step computes: token trees of given lengths as packed rows, in the numbers that memory and time depend on.

The tree of a prompt is ``x -> {tau_1..tau_K, h* b -> tau_1..tau_K}`` (see ``policy/trees.py``); an anchored prompt has
the first half only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Lengths:
    """Mean lengths in tokens, the one thing that a plan has to be told.

    Attributes:
        prompt: x, tool schemas included.
        response: tau, observations included.
        trace: h*, 0 = no trace.
        policy_share: part of the response that the policy writes and is scored on; the rest are observations.
        longest: of all responses of a step; the rollout phase ends with it.
        boundary: the turn between h* and tau.
        traced: part of the prompts that have a trace; the others are trained on under the prompt alone.
        source: where the lengths are from, for people.
    """

    prompt: int
    response: int
    trace: int
    policy_share: float = 0.6
    longest: int = 0
    boundary: int = 8
    traced: float = 1.0
    source: str = "assumed from the limits"

    @property
    def written(self) -> float:
        """Tokens of a response that the policy writes."""
        return self.response * self.policy_share


def measured(prompts: Sequence[int], traces: Sequence[tuple[int, int]], limit: int) -> Lengths:
    """Lengths of tasks and traces that are there. Responses are taken to be as long as the expert's: nobody knows
    better before a run.

    Args:
        prompts: tokens of some tasks' prompts, at least one.
        traces: (tokens, those of them that the expert wrote) of each trace that a prompt has; empty: none has one, and
            a response is half its limit long.
        limit: the most tokens that a response may have, and what the longest of a step is taken to have.
    """
    tokens = sum(length for length, _ in traces)
    mean = tokens / len(traces) if traces else limit / 2
    return Lengths(
        prompt=round(sum(prompts) / len(prompts)),
        response=max(round(min(mean, limit)), 1),
        trace=round(mean) if traces else 0,
        policy_share=sum(written for _, written in traces) / tokens if tokens else Lengths.policy_share,
        longest=limit,
        traced=min(len(traces) / len(prompts), 1.0),
        source=f"measured on {len(prompts)} tasks and {len(traces)} traces",
    )


@dataclass(frozen=True)
class Row:
    """Counts over a tree, a packed row or a whole step; they add up.

    Attributes:
        tokens: that go through the model.
        scored: whose log-prob is wanted.
        pairs: query-key pairs that attention looks at.
        joined_keys: keys that kernel calls copy together because they lie in more than one piece.
        masks: elements of the different masks that the CPU keeps.
        calls: attention calls of a layer.
    """

    tokens: float = 0.0
    scored: float = 0.0
    pairs: float = 0.0
    joined_keys: float = 0.0
    masks: float = 0.0
    calls: float = 0.0

    def __add__(self, other: Row) -> Row:
        return Row(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def __mul__(self, times: float) -> Row:
        return Row(*(getattr(self, field.name) * times for field in fields(self)))


def causal_pairs(queries: float, keys: float) -> float:
    """Pairs of ``queries`` tokens that are the last of ``keys``."""
    return queries * (keys - queries) + queries * (queries + 1) / 2


def tree(
    lengths: Lengths, group: int, *, prompt_only: bool, conditioned: bool, trace_rl: bool = True, shared: bool = True
) -> Row:
    """One prompt's tree.

    Args:
        group: K.
        prompt_only: the rollouts under x are in it.
        conditioned: the trace is in it.
        trace_rl: and the rollouts under the trace too.
        shared: False = every root-to-leaf sequence computed on its own (``policy.share_prefix=false``).
    """
    prompt, response = float(lengths.prompt), float(lengths.response)
    branches: list[
        tuple[float, float, float, int]
    ] = []  # tokens of the ancestors, own tokens, own scored tokens, how many
    if prompt_only:
        branches.append((prompt, response, lengths.written, group))
    if conditioned and lengths.trace:
        middle = lengths.trace + (lengths.boundary if trace_rl else 0)
        branches.append((prompt, float(middle), float(lengths.trace), 1))
        if trace_rl:
            branches.append((prompt + middle, response, lengths.written, group))
    if not shared:
        ends = [branch for branch in branches if branch[1] == response] or branches
        total = Row()
        for index, (before, own, scored, count) in enumerate(ends):
            extra = (
                lengths.trace / count if index == len(ends) - 1 and conditioned and len(branches) > len(ends) else 0.0
            )
            total += Row(before + own, scored + extra, causal_pairs(before + own, before + own), calls=1) * count
        return total
    if (
        len(branches) == 1 and branches[0][3] == 1
    ):  # an only child continues its parent's run: one kernel call, one piece
        before, own, scored, _ = branches[0]
        return Row(before + own, scored, causal_pairs(before + own, before + own), calls=1)
    total = Row(prompt, 0.0, causal_pairs(prompt, prompt), calls=1)
    for before, own, scored, count in branches:
        branch = Row(own, scored, causal_pairs(own, before + own), joined_keys=before + own, calls=1)
        total += branch * count + Row(masks=own * (before + own))
    return total


@dataclass(frozen=True)
class StepWork:
    """What one training step computes (``training/loop.py``).

    Attributes:
        prompts: of the step.
        group: K rollouts each.
        updates: optimizer updates.
        conditioned: share of the prompts that are trained under their trace, 1 - q.
        trace_rl: trace-conditioned surrogate on.
        score_old: share of the prompts that pi_old is scored for in every context of the tree (those of all updates but
            the first, on-policy one).
        score_prompt_only: share that only pi_old(tau | x) is scored for (the first update, with the sampler correction
            on).
        reference: a forward under the reference weights, prompt-only (KL on).
        both_contexts: conditioned prompts' rollouts are computed under x, too (KL, sampler correction or diagnostics).
    """

    lengths: Lengths
    prompts: int
    group: int
    updates: int = 1
    conditioned: float = 0.6
    trace_rl: bool = True
    score_old: float = 0.0
    score_prompt_only: float = 0.0
    reference: bool = False
    shared: bool = True
    both_contexts: bool = True

    @property
    def episodes(self) -> int:
        return self.prompts * self.group

    @property
    def anchored_tree(self) -> Row:
        return tree(self.lengths, self.group, prompt_only=True, conditioned=False, shared=self.shared)

    @property
    def full_tree(self) -> Row:
        """Of a prompt that is not anchored; the prompt-only half is in it too, for the KL term and the diagnostics,
        unless it is left out.
        """
        prompt_only = self.both_contexts or not self.trace_rl
        return tree(
            self.lengths,
            self.group,
            prompt_only=prompt_only,
            conditioned=True,
            trace_rl=self.trace_rl,
            shared=self.shared,
        )

    @property
    def mean_tree(self) -> Row:
        return self.anchored_tree * (1.0 - self.conditioned) + self.full_tree * self.conditioned

    @property
    def longest(self) -> float:
        """Tokens of the longest root-to-leaf sequence, which no budget can cut: [x; h*; tau] with the longest tau that
        is expected.
        """
        response = max(self.lengths.response, self.lengths.longest)
        return (
            self.lengths.prompt
            + response
            + (self.lengths.trace + self.lengths.boundary if self.conditioned > 0 and self.lengths.trace else 0)
        )

    def micro_batch(self, budget: int, data: int = 1) -> Row:
        """The largest row on one of ``data`` ranks: whole trees, or pieces of one, up to the token budget or all that
        there is of an update; or one sequence that is longer than the budget."""
        largest = self.full_tree if self.conditioned > 0 else self.anchored_tree
        there = max(largest.tokens, self.mean_tree.tokens * self.prompts / self.updates / data)
        return largest * (max(min(float(budget), there), self.longest) / largest.tokens)

    def micro_batches(self, budget: int, data: int) -> int:
        """Rows of one update on each of ``data`` data-parallel ranks, at least one."""
        tokens = self.mean_tree.tokens * self.prompts / self.updates / data
        return max(1, math.ceil(tokens / max(float(budget), self.longest)))
