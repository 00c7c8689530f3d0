"""Rewards of the compared methods: FTRL's per-turn reward (arXiv 2508.08791) and ToolRL's per-answer reward (arXiv
2504.13958).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from pact_nemo.objective.rewards import Call, CallsOf, call_similarity, values_equal

Groups = Sequence[Hashable]


def solved_by_equality(
    calls: Sequence[Call], groups: Groups, reference: Sequence[Call], reference_groups: Groups
) -> list[bool]:
    """For benchmarks without sub-answers: whether each call equals a reference call of its group that no earlier call
    equalled.
    """
    remaining = list(zip(reference, reference_groups, strict=True))
    solved = []
    for call, group in zip(calls, groups, strict=True):
        found = next(
            (
                i
                for i, (wanted, label) in enumerate(remaining)
                if label == group and call_similarity(call, wanted) == 1.0
            ),
            None,
        )
        solved.append(found is not None)
        if found is not None:
            del remaining[found]
    return solved


def ftrl_rewards(
    solved: Sequence[Sequence[bool]],
    *,
    malformed: Sequence[int],
    empty: Sequence[bool],
    answered: Sequence[bool],
    groups: Groups,
    questions: Mapping[Hashable, int],
    count_malformed: bool = False,
) -> np.ndarray:
    """[T] reward of each assistant turn, in [-0.5, 2].

    A turn with p calls that solve q open sub-questions: 2q / (p + 1). Without a readable call: -0.5 if it says nothing,
    -0.3 if it holds a malformed call, 1 / (1 + sub-questions still open) if it contains the answer, 0.5 if none is
    open, else 0. (The published ``compute_solve_f1``, which its training scripts use.)

    Args:
        solved: per turn and readable call, whether it solved a sub-question that was open.
        malformed: number of malformed calls of each turn.
        empty, answered: whether each turn's text is blank, and contains the reference answer.
        groups: label of each turn; sub-questions are counted per label (BFCL: the user turn).
        questions: number of sub-questions of each label.
        count_malformed: malformed calls beside readable ones count in p. The published parser drops them before p is
            counted.
    """
    left = dict(questions)
    rewards = np.zeros(len(solved))
    for t, calls in enumerate(solved):
        still_open = left.get(groups[t], 0)
        if calls:
            rewards[t] = 2.0 * sum(calls) / (len(calls) + malformed[t] * count_malformed + 1)
            left[groups[t]] = still_open - sum(calls)
        elif malformed[t]:
            rewards[t] = -0.3
        elif empty[t]:
            rewards[t] = -0.5
        elif answered[t]:
            rewards[t] = 1.0 / (1 + still_open)
        elif still_open == 0:
            rewards[t] = 0.5
    return rewards


def _jaccard(left: Sequence[Hashable], right: Sequence[Hashable]) -> float:
    """Of two multisets; 1 if both are empty."""
    a, b = Counter(left), Counter(right)
    union = sum((a | b).values())
    return sum((a & b).values()) / union if union else 1.0


def toolrl_reward(
    predicted: CallsOf,
    reference: CallsOf,
    *,
    well_formed: bool,
    readable: bool,
    method: str = "greedy",
    strict: bool = True,
) -> float:
    """R_format + R_correct in [-3, 4] of one rollout: 1 if ``well_formed``, and 6 R / S - 3.

    R is the Jaccard similarity of the tool names plus, over a one-to-one matching of equal names, the Jaccard
    similarity of the argument names and the number of equal arguments; S = 1 + sum over reference calls of (1 + number
    of arguments) is its maximum. Without a reference call R_correct is 0. A name counts with its group, so calls of
    different groups never match.

    Args:
        predicted, reference: the calls, each with its group.
        well_formed: the answer has the form that the format reward asks for.
        readable: every call that was written could be read.
        method: ``greedy``: each reference call in its order takes the best call that is left, as in the public code;
            ``hungarian``: the matching of the largest sum.
        strict: an unreadable call makes R_correct -3, its minimum, as in the public code; False: the readable ones are
            scored.

    Raises:
        ValueError: another ``method``.
    """
    if method not in ("hungarian", "greedy"):
        raise ValueError(f"matching method {method!r} is neither 'hungarian' nor 'greedy'")
    form = float(well_formed)
    if not reference.calls:
        return form
    if strict and not readable:
        return form - 3.0
    score = _jaccard(
        [(group, call.name) for call, group in zip(predicted.calls, predicted.groups, strict=True)],
        [(group, call.name) for call, group in zip(reference.calls, reference.groups, strict=True)],
    )
    pairs = np.zeros((len(predicted.calls), len(reference.calls)))
    for a, (p, p_group) in enumerate(zip(predicted.calls, predicted.groups, strict=True)):
        for b, (g, g_group) in enumerate(zip(reference.calls, reference.groups, strict=True)):
            if p.name == g.name and p_group == g_group:
                equal = sum(
                    key in p.arguments and values_equal(p.arguments[key], value) for key, value in g.arguments.items()
                )
                pairs[a, b] = _jaccard(list(p.arguments), list(g.arguments)) + equal
    score += _best_sum(pairs) if method == "hungarian" else _greedy_sum(pairs)
    most = 1.0 + sum(1 + len(call.arguments) for call in reference.calls)
    return form + 6.0 * score / most - 3.0


def _best_sum(pairs: np.ndarray) -> float:
    """Largest sum of a one-to-one matching of [P, G] scores."""
    rows, columns = linear_sum_assignment(pairs, maximize=True)
    return float(pairs[rows, columns].sum())


def _greedy_sum(pairs: np.ndarray) -> float:
    """Sum of what each column, in order, takes of the rows that are left: its largest score, the first of equal
    ones.
    """
    left = pairs.copy()
    total = 0.0
    for column in range(left.shape[1] if len(left) else 0):
        row = int(np.argmax(left[:, column]))
        if left[row, column] > 0.0:
            total += float(left[row, column])
            left[row] = 0.0
    return total
