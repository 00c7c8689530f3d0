"""Rewards and advantages against brute force and hand-computed numbers."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pact_nemo.objective.advantages import Normalisation, group_advantages, returns_to_go
from pact_nemo.objective.rewards import (
    CallsOf,
    TurnCalls,
    assign,
    call_similarity,
    match_calls,
    turn_rewards,
    values_equal,
)


@dataclass(frozen=True)
class Call:
    name: str
    arguments: dict[str, Any] = field(default_factory=dict)


def test_similarity_by_hand() -> None:
    reference = Call("f", {"a": 1, "b": "x"})
    assert call_similarity(Call("g", {"a": 1, "b": "x"}), reference) == 0.0
    assert call_similarity(reference, reference) == 1.0
    # names {a, c} against {a, b}: Jaccard 1/3; one equal value: (1 + 1/3 + 1) / 4
    assert call_similarity(Call("f", {"a": 1.0, "c": 2}), reference) == pytest.approx((1 + 1 / 3 + 1) / 4)
    assert call_similarity(Call("f"), reference) == pytest.approx(1 / 4)
    assert call_similarity(Call("f"), Call("f")) == 1.0


def test_values_are_compared_as_json_means_them() -> None:
    assert values_equal(1, 1.0) and values_equal([1, {"a": "b"}], (1.0, {"a": "b"}))
    assert not values_equal(True, 1) and not values_equal(0, False) and not values_equal("1", 1)
    assert not values_equal([1, 2], [2, 1]) and not values_equal({"a": 1}, {"a": 1, "b": 2})


@given(st.integers(1, 5), st.integers(1, 5), st.randoms(use_true_random=False))
def test_hungarian_equals_brute_force(rows: int, columns: int, random: Any) -> None:
    weights = np.array([[random.choice([0.0, random.random()]) for _ in range(columns)] for _ in range(rows)])
    padded = np.zeros((max(rows, columns),) * 2)
    padded[:rows, :columns] = weights
    best = max(sum(padded[i, p[i]] for i in range(len(padded))) for p in itertools.permutations(range(len(padded))))
    pairs = assign(weights)
    assert sum(weights[a, b] for a, b in pairs) == pytest.approx(best)
    assert len({a for a, _ in pairs}) == len({b for _, b in pairs}) == len(pairs)
    assert sum(weights[a, b] for a, b in assign(weights, "greedy")) <= best + 1e-12


def test_greedy_and_hungarian_differ_where_they_should() -> None:
    weights = np.array([[0.9, 0.8], [0.8, 0.0]])
    assert assign(weights) == [(0, 1), (1, 0)]
    assert assign(weights, "greedy") == [(0, 0)]
    assert assign(np.array([[0.2, 0.9, 0.9]]), "greedy") == [(0, 1)]  # the best pair first, the lower index on a tie
    with pytest.raises(ValueError, match="auction"):
        assign(weights, "auction")


def test_each_reference_call_pays_once_and_only_within_its_user_turn() -> None:
    call = Call("f", {"a": 1})
    assert match_calls([call, call], [call], penalty=0.25) == [1.0, -0.25]
    assert match_calls([call], [call], groups=([0], [1])) == [0.0]
    assert match_calls([], [call]) == []


VALUES = st.sampled_from([1, 1.0, True, "a", [1, 2], {"k": [True]}, None])
CALLS = st.lists(
    st.builds(Call, st.sampled_from("fg"), st.dictionaries(st.sampled_from("abc"), VALUES, max_size=3)), max_size=4
)


@given(CALLS, CALLS, st.data())
def test_matched_calls_equal_brute_force_over_all_assignments(
    predicted: list[Call], reference: list[Call], data: st.DataObject
) -> None:
    left = data.draw(st.lists(st.integers(0, 1), min_size=len(predicted), max_size=len(predicted)))
    right = data.draw(st.lists(st.integers(0, 1), min_size=len(reference), max_size=len(reference)))

    def similarity(p: Call, g: Call) -> float:  # the formula once more, on sets, with equality by type-tagged JSON
        if p.name != g.name:
            return 0.0
        names, union = set(p.arguments) & set(g.arguments), set(p.arguments) | set(g.arguments)
        plain = {True: "yes", False: "no"}

        def text(value: Any) -> str:
            if isinstance(value, bool):
                return plain[value]
            if isinstance(value, dict):
                return str({k: text(v) for k, v in value.items()})
            if isinstance(value, list):
                return str([text(v) for v in value])
            return json.dumps(float(value) if isinstance(value, int) else value)

        equal = sum(text(p.arguments[n]) == text(g.arguments[n]) for n in names)
        return (1 + (len(names) / len(union) if union else 1) + equal) / (2 + len(g.arguments))

    slots: list[int | None] = [*range(len(reference)), *[None] * len(predicted)]
    best = 0.0
    for choice in set(itertools.permutations(slots, len(predicted))):
        pairs = [(a, b) for a, b in enumerate(choice) if b is not None and left[a] == right[b]]
        best = max(best, sum(similarity(predicted[a], reference[b]) for a, b in pairs))
    rewards = match_calls(predicted, reference, groups=(left, right), penalty=0.0)
    assert sum(rewards) == pytest.approx(best) and all(0.0 <= r <= 1.0 for r in rewards)
    penalised = match_calls(predicted, reference, groups=(left, right), penalty=0.5)
    assert penalised == [r if r > 0 else -0.5 for r in rewards]
    assert sum(match_calls(predicted, reference, groups=(left, right), method="greedy")) <= best + 1e-12


def test_labels_of_the_wrong_length_and_negative_penalties_are_refused() -> None:
    call = Call("f")
    with pytest.raises(ValueError, match="group labels"):
        match_calls([call], [call], groups=([0, 1], [0]))
    with pytest.raises(ValueError, match="penalty"):
        match_calls([call], [call], penalty=-1.0)


def test_the_final_turn_gets_the_outcome_even_when_it_is_a_tool_turn() -> None:
    f = Call("f")

    def rewards(references: list[int], *, silent_tool_turn: bool = False, penalty: float = 0.0) -> list[float]:
        turns = [TurnCalls([f], 0, True), TurnCalls([], 0, silent_tool_turn), TurnCalls([f], 1, True)]
        return turn_rewards(turns, CallsOf([f, f], references), outcome=0.5, penalty=penalty).tolist()

    assert rewards([0, 1]) == [1.0, 0.0, 1.5]
    # the second f belongs to user turn 1, the only reference left is user turn 0's
    assert rewards([0, 0]) == [1.0, 0.0, 0.5]
    # a tool turn in which nothing was parsed and nothing was malformed
    assert rewards([0, 1], silent_tool_turn=True, penalty=0.5) == [1.0, 0.0, 1.5]


def test_turn_rewards_by_hand() -> None:
    f, g = Call("f", {"a": 1}), Call("g", {})
    rewards = turn_rewards(
        [TurnCalls([f], 0, True), TurnCalls([f, g], 0, True), TurnCalls([], 0, True, 2), TurnCalls([], 0, False)],
        CallsOf([f, g], [0, 0]),
        outcome=1.0,
        penalty=0.5,
        outcome_weight=2.0,
    )
    assert rewards.tolist() == [1.0, (-0.5 + 1.0) / 2, -0.5, 2.0]
    assert turn_rewards([], CallsOf([f], [0]), outcome=0.0).tolist() == []


def test_advantages_by_hand() -> None:
    rewards = [np.array([1.0, 0.0]), np.array([0.0, 1.0]), np.array([0.0])]
    result = group_advantages(rewards, gamma=0.5, normalise=Normalisation(0.0))
    # totals 1, 1, 0: mean 2/3, sample std 1/sqrt(3)
    std = math.sqrt(1 / 3)
    assert result.trajectory == pytest.approx([(1 / 3) / std, (1 / 3) / std, (-2 / 3) / std])
    # returns-to-go at turn 0: 1, 0.5, 0; at turn 1: 0, 1 (third rollout does not reach it)
    assert [t[0] for t in result.turn] == pytest.approx([1.0, 0.0, -1.0])
    assert [result.turn[0][1], result.turn[1][1]] == pytest.approx([-1 / math.sqrt(2), 1 / math.sqrt(2)])
    assert result.combined[0] == pytest.approx(result.trajectory[0] + result.turn[0])
    halved = group_advantages(rewards, gamma=0.5, normalise=Normalisation(0.0), combine="mean")
    assert halved.combined[1] == pytest.approx(result.combined[1] / 2)
    for combine in ("sum", "mean"):  # one part is its own mean
        assert group_advantages(rewards, turn_level=False, combine=combine).combined[2] == pytest.approx(
            group_advantages(rewards).trajectory[2:3]
        )


def test_equal_rewards_lone_turns_and_failed_rollouts_carry_nothing() -> None:
    # 0.1 three times has a mean of 0.10000000000000002: without care, and without eps, that noise becomes an advantage
    # of order 1
    same = group_advantages([np.array([0.1])] * 3, normalise=Normalisation(0.0))
    assert [a.tolist() for a in same.combined] == [[0.0]] * 3
    lone = group_advantages([np.array([1.0, 5.0]), np.array([0.0])], normalise=Normalisation(0.0))
    assert lone.turn[0][1] == 0.0
    kept = group_advantages([np.array([1.0]), np.array([0.0])])
    with_failed = group_advantages([np.array([1.0]), np.array([99.0]), np.array([0.0])], mask=[True, False, True])
    assert with_failed.combined[1].tolist() == [0.0]
    assert [with_failed.combined[0][0], with_failed.combined[2][0]] == [kept.combined[0][0], kept.combined[1][0]]
    with pytest.raises(ValueError, match="finite"):
        group_advantages([np.array([np.nan])])


def test_standard_deviation_is_the_sample_one_unless_told() -> None:
    rewards = [np.array([r]) for r in (3.0, 1.0, 1.0, 3.0)]
    assert group_advantages(rewards, normalise=Normalisation(0.0)).trajectory == pytest.approx(
        np.array([1, -1, -1, 1]) * math.sqrt(3 / 4)
    )
    assert group_advantages(rewards, normalise=Normalisation(0.0, ddof=0)).trajectory == pytest.approx([1, -1, -1, 1])
    values = torch.tensor([0.3, 1.9, -0.4, 0.0], dtype=torch.float64)
    assert Normalisation()(values.numpy()) == pytest.approx(((values - values.mean()) / (values.std() + 1e-6)).numpy())
    with pytest.raises(ValueError, match="ddof"):
        Normalisation(ddof=2)


def test_groups_without_two_living_rollouts_have_no_advantage() -> None:
    rewards = [np.array([1.0, 2.0]), np.array([0.0])]
    for mask in ([True, False], [False, False]):
        result = group_advantages(rewards, mask=mask)
        assert result.trajectory.tolist() == [0.0, 0.0] and [a.tolist() for a in result.combined] == [[0.0, 0.0], [0.0]]
    assert group_advantages([]).combined == []
    with pytest.raises(ValueError, match="mask"):
        group_advantages(rewards, mask=[True])
    with pytest.raises(ValueError, match="combine"):
        group_advantages(rewards, combine="product")


@given(st.lists(st.lists(st.floats(-2, 2), min_size=1, max_size=5), min_size=2, max_size=6), st.floats(0, 1))
def test_advantages_equal_a_naive_double_loop(rows: list[list[float]], gamma: float) -> None:
    rewards = [np.array(r) for r in rows]
    result = group_advantages(rewards, gamma=gamma, normalise=Normalisation(1e-3))
    for k, row in enumerate(rows):
        for t in range(len(row)):

            def to_go(r: list[float], t: int = t) -> float:
                return sum(gamma ** (u - t) * r[u] for u in range(t, len(r)))

            assert returns_to_go(rewards[k], gamma)[t] == pytest.approx(to_go(row))
            peers = [returns_to_go(np.array(r), gamma)[t] for r in rows if len(r) > t]
            mean = sum(peers) / len(peers)
            spread = math.sqrt(sum((p - mean) ** 2 for p in peers) / max(len(peers) - 1, 1))
            expected = 0.0 if len(set(peers)) == 1 else (returns_to_go(rewards[k], gamma)[t] - mean) / (spread + 1e-3)
            assert result.turn[k][t] == pytest.approx(expected, abs=1e-9)
    assert Normalisation()(np.array([3.0])).tolist() == [0.0]


def test_a_floor_keeps_a_tiny_deviation_from_being_blown_up() -> None:
    near = np.array([0.5, 0.5 + 1e-7, 0.5, 0.5])
    assert np.abs(Normalisation(0.0)(near)).max() > 1.0  # a ten-millionth of a reward, as loud as a whole one
    floored = Normalisation(1e-6, std_floor=0.05)(near)
    assert np.abs(floored).max() < 2e-6 and floored.argmax() == 1
    far = np.array([0.0, 1.0, 0.0, 1.0])
    assert np.array_equal(Normalisation(std_floor=0.05)(far), Normalisation()(far))  # nothing changes above the floor
    edge = np.array([0.0, 0.1])  # std 0.0707: the advantage is continuous in the floor
    below, above = Normalisation(0.0, std_floor=0.0707106)(edge), Normalisation(0.0, std_floor=0.0707107)(edge)
    assert below == pytest.approx(above, rel=1e-5)
    with pytest.raises(ValueError, match="std_floor"):
        Normalisation(std_floor=-1.0)


def test_without_division_advantages_are_differences_from_the_mean() -> None:
    rewards = [np.array([1.0]), np.array([0.0]), np.array([0.25, 0.25])]
    result = group_advantages(rewards, turn_level=False, normalise=Normalisation(divide=False))
    assert result.trajectory == pytest.approx([0.5, -0.5, 0.0])
    assert (
        group_advantages([np.array([3.0])] * 3, normalise=Normalisation(divide=False)).trajectory.tolist() == [0.0] * 3
    )
