"""A step's groups as trees, cut into the updates that it makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pact_nemo.batches.prompt_groups import PromptGroup
from pact_nemo.batches.prompt_trees import PromptTree, contexts_needed, grow_tree, tempered
from pact_nemo.methods.base import Method


@dataclass(frozen=True)
class MiniBatch:
    """The prompts of one optimizer update.

    Attributes:
        number: of the update within the step, from 0.
        members: the prompts with a token to score.
        others: the groups without one. Denominators count them all the same: a prompt whose rollouts all failed is one
            of |B|, and rollouts without an advantage have their tokens.
    """

    number: int
    members: list[PromptTree]
    others: list[PromptGroup] = field(default_factory=list)


def mini_batches(
    groups: Sequence[PromptGroup],
    boundary_ids: list[int],
    method: Method,
    *,
    size: int,
    diagnostics: bool,
    skip_zero_advantage: bool,
    temperature: float,
) -> list[MiniBatch]:
    """The step's prompts as trees, ``size`` an update. An update that scores no token at all is left out.

    Args:
        boundary_ids: tokens between a trace (or its control) and a rollout behind it.
        diagnostics, skip_zero_advantage: see :func:`contexts_needed` and :func:`grow_tree`.
        temperature: that rollouts were sampled at.
    """
    grown = [
        grow_tree(
            group,
            boundary_ids,
            method,
            contexts=contexts_needed(group, method, diagnostics=diagnostics),
            skip_zero_advantage=skip_zero_advantage,
        )
        for group in groups
    ]
    grown = tempered(grown, method, temperature)
    found: list[MiniBatch] = []
    for start in range(0, len(grown), size):
        part = grown[start : start + size]
        members = [prompt for prompt in part if prompt.tree.num_scored]
        if members:
            others = [prompt.group for prompt in part if not prompt.tree.num_scored]
            found.append(MiniBatch(len(found), members, others))
    return found
