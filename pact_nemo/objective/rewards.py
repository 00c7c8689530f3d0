"""Bipartite-matching rewards (eq. 24-28), after MatchTIR (arXiv 2601.10712)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from scipy.optimize import linear_sum_assignment


class Call(Protocol):
    """Anything with a tool name and keyword arguments."""

    @property
    def name(self) -> str: ...

    @property
    def arguments(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class CallsOf:
    """The calls of an episode or a reference in one list, each with its label: the user turn that it belongs to."""

    calls: Sequence[Call]
    groups: Sequence[Hashable]


@dataclass(frozen=True)
class TurnCalls:
    """What one assistant turn called.

    Attributes:
        calls: those that could be read.
        group: label of the turn; see :func:`match_calls`.
        is_tool_turn: whether the turn asked for a tool at all.
        malformed: number of malformed calls.
    """

    calls: Sequence[Call]
    group: Hashable
    is_tool_turn: bool
    malformed: int = 0


def values_equal(left: Any, right: Any) -> bool:
    """Exact equality of JSON-like values: 1 equals 1.0, True equals nothing but True, lists and objects are compared
    element by element.

    A tuple equals a list of the same elements (calls written in Python syntax may have either).
    """
    if isinstance(left, bool) or isinstance(right, bool):
        return isinstance(left, bool) and isinstance(right, bool) and left == right
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return left.keys() == right.keys() and all(values_equal(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(values_equal(a, b) for a, b in zip(left, right, strict=True))
    return bool(left == right)


def call_similarity(predicted: Call, reference: Call) -> float:
    """S_ab in [0, 1] of one predicted and one reference call.

    0 if the names differ; else (1 + Jaccard of the argument names as multisets + number of reference arguments whose
    predicted value is equal) / (2 + number of reference arguments). Two calls without arguments have Jaccard 1. Names
    are compared exactly: tools are called by exact names (MatchTIR's public code ignores their case).
    """
    if predicted.name != reference.name:
        return 0.0
    left, right = Counter(predicted.arguments.keys()), Counter(reference.arguments.keys())
    union = sum((left | right).values())
    jaccard = sum((left & right).values()) / union if union else 1.0
    equal = sum(
        key in predicted.arguments and values_equal(predicted.arguments[key], value)
        for key, value in reference.arguments.items()
    )
    return (1.0 + jaccard + equal) / (2.0 + len(reference.arguments))


def assign(similarity: np.ndarray, method: str = "hungarian") -> list[tuple[int, int]]:
    """One-to-one pairs (predicted, reference) of [P, G] similarities, pairs of similarity 0 left out.

    ``hungarian``: maximum total weight (eq. 24). ``greedy``: best remaining pair first, as in MatchTIR's public code;
    ties by index.

    Raises:
        ValueError: another method.
    """
    if method not in ("hungarian", "greedy"):
        raise ValueError(f"matching method {method!r} is neither 'hungarian' nor 'greedy'")
    if similarity.size == 0:
        return []
    if method == "hungarian":
        rows, columns = linear_sum_assignment(similarity, maximize=True)
        pairs = [(int(row), int(column)) for row, column in zip(rows, columns, strict=True)]
    else:
        order = np.argsort(-similarity, axis=None, kind="stable")
        used_rows: set[int] = set()
        used_columns: set[int] = set()
        pairs = []
        for flat in order:
            row, column = (int(i) for i in np.unravel_index(flat, similarity.shape))
            if row not in used_rows and column not in used_columns:
                pairs.append((row, column))
                used_rows.add(row)
                used_columns.add(column)
    return sorted(pair for pair in pairs if similarity[pair] > 0.0)


def match_calls(
    predicted: Sequence[Call],
    reference: Sequence[Call],
    *,
    groups: tuple[Sequence[Hashable], Sequence[Hashable]] | None = None,
    method: str = "hungarian",
    penalty: float = 0.0,
) -> list[float]:
    """r(p_a) of each predicted call: its similarity if matched, else ``-penalty`` (eq. 25).

    Args:
        groups: a label per predicted and per reference call; only calls of the same label may match (BFCL: the user
            turn).
        method: see :func:`assign`.
        penalty: lambda_pen >= 0; the paper uses 0.

    Returns:
        One reward per predicted call, in order. A pair of similarity 0 is no match. Of equally good matchings one is
        taken, always the same for the same input.

    Raises:
        ValueError: groups of other lengths than the calls, an unknown method, a negative penalty.
    """
    if groups is not None and (len(groups[0]), len(groups[1])) != (len(predicted), len(reference)):
        raise ValueError(
            f"{len(groups[0])} and {len(groups[1])} group labels for {len(predicted)} and {len(reference)} calls"
        )
    if penalty < 0.0:
        raise ValueError(f"penalty {penalty} is negative: it would reward unmatched calls")
    similarity = np.zeros((len(predicted), len(reference)))
    for a, p in enumerate(predicted):
        for b, g in enumerate(reference):
            if groups is None or groups[0][a] == groups[1][b]:
                similarity[a, b] = call_similarity(p, g)
    rewards = [-penalty] * len(predicted)
    for a, b in assign(similarity, method):
        rewards[a] = float(similarity[a, b])
    return rewards


def turn_rewards(
    turns: Sequence[TurnCalls],
    reference: CallsOf,
    *,
    outcome: float,
    method: str = "hungarian",
    penalty: float = 0.0,
    outcome_weight: float = 1.0,
) -> np.ndarray:
    """[T] reward of each assistant turn of one rollout (eq. 26-28).

    A tool turn gets the mean of r over its calls, parsed and malformed; a malformed call counts as an unmatched one. A
    tool turn without any call gets 0, as does a turn that isn't a tool turn. The final turn gets
    ``outcome_weight * outcome`` on top, whatever it is.

    Args:
        turns: of the rollout, in order.
        reference: the reference calls.
        outcome: the checker's verdict in [0, 1], or the F1 of the answer where ``objective.outcome`` says so.
        method, penalty: see :func:`match_calls`; the matching is over the calls of the whole rollout.

    Raises:
        ValueError: as :func:`match_calls`.
    """
    flat = [call for turn in turns for call in turn.calls]
    flat_groups = [turn.group for turn in turns for _ in turn.calls]
    matched = iter(
        match_calls(flat, reference.calls, groups=(flat_groups, reference.groups), method=method, penalty=penalty)
    )
    rewards = np.zeros(len(turns))
    for t, turn in enumerate(turns):
        scores = [next(matched) for _ in turn.calls] + [-penalty] * turn.malformed
        if turn.is_tool_turn and scores:
            rewards[t] = float(np.mean(scores))
    if len(rewards):
        rewards[-1] += outcome_weight * outcome
    return rewards
