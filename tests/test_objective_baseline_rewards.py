"""FTRL's and ToolRL's rewards against cases worked out by hand from the papers' formulas, and through the training
step's own door.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest

from pact_nemo.config.schema import ObjectiveConfig
from pact_nemo.environments.base import Outcome, Task, ToolCall
from pact_nemo.methods.registry import method_named
from pact_nemo.objective.baseline_rewards import ftrl_rewards, solved_by_equality, toolrl_reward
from pact_nemo.objective.rewards import CallsOf
from pact_nemo.rollouts.types import Rollout, Turn


def ftrl(solved: list[list[bool]], questions: int = 2, **words: Any) -> list[float]:
    settings = {
        "malformed": [0] * len(solved),
        "empty": [False] * len(solved),
        "answered": [False] * len(solved),
        **words,
    }
    return ftrl_rewards(solved, groups=[0] * len(solved), questions={0: questions}, **settings).tolist()


@pytest.mark.parametrize(
    ("solved", "words", "expected"),
    [
        ([[True]], {}, [1.0]),  # 2q / (p + 1), q = p = 1
        ([[True, True]], {}, [4 / 3]),
        ([[True, False, False]], {}, [2 / 4]),
        ([[False]], {}, [0.0]),
        ([[True]], {"malformed": [1]}, [1.0]),  # the published parser drops it before p is counted
        ([[True]], {"malformed": [1], "count_malformed": True}, [2 / 3]),
        ([[]], {"malformed": [1]}, [-0.3]),
        ([[]], {"empty": [True]}, [-0.5]),
        ([[]], {}, [0.0]),
        ([[]], {"answered": [True]}, [1 / 3]),  # two still open
        ([[True], []], {"answered": [False, True]}, [1.0, 1 / 2]),
        ([[True, True], []], {}, [4 / 3, 0.5]),  # nothing open any more
        ([[True, True], []], {"answered": [False, True]}, [4 / 3, 1.0]),
    ],
)
def test_ftrl_turn_by_turn(solved: list[list[bool]], words: dict[str, Any], expected: list[float]) -> None:
    assert ftrl(solved, **words) == pytest.approx(expected)


def test_ftrl_counts_open_questions_per_group() -> None:
    words = dict(malformed=[0, 0], empty=[False, False], answered=[False, False])
    assert ftrl_rewards([[True], []], groups=[0, 0], questions={0: 1, 1: 5}, **words).tolist() == [1.0, 0.5]
    assert ftrl_rewards([[True], []], groups=[0, 1], questions={0: 1, 1: 5}, **words).tolist() == [1.0, 0.0]


def test_a_reference_call_is_solved_once_and_in_its_own_group() -> None:
    call, other = ToolCall("f", {"a": 1}), ToolCall("f", {"a": 2})
    assert solved_by_equality([call, call, other], [0, 0, 0], [call, other], [0, 0]) == [True, False, True]
    assert solved_by_equality([call], [1], [call], [0]) == [False]


def toolrl(predicted: list[ToolCall], reference: list[ToolCall], well_formed: bool = True, **settings: Any) -> float:
    settings = {"readable": True, **settings}
    return toolrl_reward(
        CallsOf(predicted, [0] * len(predicted)),
        CallsOf(reference, [0] * len(reference)),
        well_formed=well_formed,
        **settings,
    )


def test_toolrl_by_hand() -> None:
    f, g = ToolCall("f", {"a": 1, "b": 2}), ToolCall("g")
    assert toolrl([f, g], [f, g]) == pytest.approx(4.0)  # R = S = 1 + (1 + 2) + (1 + 0)
    assert toolrl([g, f], [f, g]) == pytest.approx(4.0)
    assert toolrl([f, g], [f, g], well_formed=False) == pytest.approx(3.0)
    assert toolrl([], [f]) == pytest.approx(1 - 3)
    assert toolrl([], []) == 1.0 and toolrl([f], [], well_formed=False) == 0.0
    # one name of two, argument names 1/2, one value of two: R = 1/2 + 1/2 + 1 = 2, S = 5
    assert toolrl([ToolCall("f", {"a": 1})], [f, g]) == pytest.approx(1 + 6 * 2 / 5 - 3)
    # a surplus call costs in the names: R = 1/2 + 1 + 2, S = 4
    assert toolrl([f, f], [f]) == pytest.approx(1 + 6 * 3.5 / 4 - 3)


def test_an_unreadable_call_gives_the_lowest_correctness() -> None:
    f = ToolCall("f", {"a": 1})
    assert toolrl([f], [f], well_formed=False, readable=False) == -3.0
    assert toolrl([f], [f], well_formed=False, readable=False, strict=False) == pytest.approx(3.0)
    assert toolrl([], [], well_formed=False, readable=False) == 0.0  # nothing was to be called
    with pytest.raises(ValueError, match="matching"):
        toolrl([f], [f], method="best")


def some_calls(draw: random.Random) -> list[ToolCall]:
    count = draw.randint(1, 4)
    return [
        ToolCall(draw.choice("fg"), {k: draw.randint(0, 1) for k in draw.sample("abc", draw.randint(0, 3))})
        for _ in range(count)
    ]


def test_toolrl_greedy_serves_reference_calls_in_their_order() -> None:
    draw = random.Random(5)
    differs = 0
    for _ in range(300):
        predicted, reference = some_calls(draw), some_calls(draw)
        used: set[int] = set()
        total = 0.0
        for wanted in reference:
            best, chosen = 0.0, -1
            for index, call in enumerate(predicted):
                if index in used or call.name != wanted.name:
                    continue
                a, b = set(call.arguments), set(wanted.arguments)
                keys = 1.0 if a == b else len(a & b) / len(a | b)
                value = keys + sum(call.arguments.get(k) == v for k, v in wanted.arguments.items())
                if value > best:
                    best, chosen = value, index
            if chosen >= 0:
                used.add(chosen)
                total += best
        left, right = Counter(c.name for c in predicted), Counter(c.name for c in reference)
        names = sum((left & right).values()) / sum((left | right).values())
        most = 1 + sum(1 + len(c.arguments) for c in reference)
        assert toolrl(predicted, reference) == pytest.approx(1 + 6 * (names + total) / most - 3)
        differs += toolrl(predicted, reference) < toolrl(predicted, reference, method="hungarian") - 1e-9
        assert toolrl(predicted, reference) <= toolrl(predicted, reference, method="hungarian") + 1e-9
    assert differs > 3


def test_toolrl_takes_the_best_matching_of_all() -> None:
    draw = random.Random(3)

    def jaccard(left: list[str], right: list[str]) -> float:
        a, b = Counter(left), Counter(right)
        return sum((a & b).values()) / sum((a | b).values()) if a | b else 1.0

    for _ in range(200):
        predicted, reference = some_calls(draw), some_calls(draw)
        best = 0.0
        slots = [*range(len(reference)), *[None] * len(predicted)]
        for chosen in set(itertools.permutations(slots, len(predicted))):
            total = 0.0
            for call, index in zip(predicted, chosen, strict=True):
                if index is not None and call.name == reference[index].name:
                    wanted = reference[index].arguments
                    total += jaccard(list(call.arguments), list(wanted)) + sum(
                        call.arguments.get(k) == v for k, v in wanted.items()
                    )
            best = max(best, total)
        names = jaccard([c.name for c in predicted], [c.name for c in reference])
        most = 1 + sum(1 + len(c.arguments) for c in reference)
        assert toolrl(predicted, reference, method="hungarian") == pytest.approx(1 + 6 * (names + best) / most - 3)


def played(turns: list[Turn], outcome: Outcome | None, status: Any = "ok") -> Rollout:
    return Rollout("t", 0, [1], [1], [1], [0.0], turns, outcome, 0, status)


def test_rollouts_are_rewarded_by_the_methods_own_rule() -> None:
    want = ToolCall("f", {"a": 1})
    task = Task("t", "t", "c", (({"role": "user", "content": "q"},),), (), ((want,),), reference_answer="1,024 km")
    turns = [Turn(0, 1, "calls", calls=[want, ToolCall("f", {"a": 2})]), Turn(1, 2, "It is 1024 km.")]
    rollout = played(turns, Outcome(True, 1.0))
    assert method_named("ftrl", ObjectiveConfig()).turn_rewards(task, rollout).tolist() == pytest.approx([2 / 3, 1.0])
    # names 1/2, best match 1 + 1, S = 3
    assert method_named("toolrl", ObjectiveConfig()).turn_rewards(task, rollout).tolist() == pytest.approx(
        [0.0, 1 + 6 * 2.5 / 3 - 3]
    )
    assert method_named("grpo", ObjectiveConfig()).turn_rewards(task, rollout).tolist() == [0.0, 1.0]
    truncated = played(turns, Outcome(True, 1.0), "truncated")
    assert method_named("toolrl", ObjectiveConfig()).turn_rewards(task, truncated)[-1] == pytest.approx(6 * 2.5 / 3 - 3)
    for method in ("ftrl", "toolrl"):
        assert np.array_equal(
            method_named(method, ObjectiveConfig()).turn_rewards(task, played([], None, "failed")), np.zeros(0)
        )
    # a benchmark with sub-questions says itself which calls solved one; a call that a limit cut off was not executed
    own = Outcome(False, 0.5, metrics={"questions": 3.0}, solved=(True, True))
    assert method_named("ftrl", ObjectiveConfig()).turn_rewards(task, played(turns, own)).tolist() == pytest.approx(
        [4 / 3, 1 / 2]
    )
    cut = Outcome(False, 0.5, metrics={"questions": 3.0}, solved=(True,))
    assert method_named("ftrl", ObjectiveConfig()).turn_rewards(task, played(turns, cut)).tolist() == pytest.approx(
        [2 / 3, 1 / 3]
    )
