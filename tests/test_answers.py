"""Answers: the published comparisons, re-derived here, and never a look into a thought."""

from __future__ import annotations

import random
import re
import string

import pytest

from pact_nemo.environments.answers import answer_f1, answer_words, contains_answer, plain, tagged_answer, visible


def published_words(text: str) -> list[str]:
    """MatchTIR's description of its own steps, taken one by one: lower case, a blank for each mark, blanks joined."""
    text = text.lower()
    for mark in string.punctuation:
        text = text.replace(mark, " ")
    return [word for word in re.sub(r"\s+", " ", text).strip().split(" ") if word]


def published_f1(message: str, reference: str) -> float:
    """Precision and recall over sets of words, with the first tagged answer; 0 without a tag."""
    found = re.search(r"<answer>(.*?)</answer>", message, re.DOTALL)
    if found is None:
        return 0.0
    left, right = set(published_words(found.group(1))), set(published_words(reference))
    precision = len(left & right) / len(left) if left else 0.0
    recall = len(left & right) / len(right) if right else 0.0
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


@pytest.mark.parametrize(
    ("message", "reference", "value"),
    [
        ("<answer>Rome</answer>", "Rome", 1.0),
        ("Rome", "Rome", 0.0),  # no tag
        ("Rome <answer></answer>", "Rome", 0.0),
        ("<answer>Rome</answer>", "", 0.0),
        ("<answer>the city of Rome</answer>", "Rome", 2 * (1 / 4) / (1 + 1 / 4)),  # articles count
        ("<answer>Rome, Rome, Rome</answer>", "Rome", 1.0),  # sets, not multisets
        ("<answer>A-B</answer>", "a b", 1.0),  # a mark is a blank
        ("<answer>2,161,000</answer>", "2161000", 0.0),
        ("<answer>Paris</answer> or <answer>Rome</answer>", "Rome", 0.0),  # the first one
        ("x <answer>\nRome\n</answer> y", "rome.", 1.0),
        ("<think>Is it <answer>Rome</answer>?</think> It is Rome.", "Rome", 0.0),  # a tag in the thought
        ("<think>Paris or Rome?</think>\n\n<answer>Rome</answer>", "Rome", 1.0),
        (
            "Paris or <answer>Paris</answer>?</think>\n\n<answer>Rome</answer>",
            "Rome",
            1.0,
        ),  # the generation prompt opened it
        ("<think>I think <answer>Rome</answer>", "Rome", 0.0),  # never closed
    ],
)
def test_answer_f1_by_hand(message: str, reference: str, value: float) -> None:
    assert answer_f1(message, reference) == pytest.approx(value, abs=1e-12)


def test_answer_f1_is_the_published_one_on_visible_text() -> None:
    rng = random.Random(3)
    pieces = ["Rome", "rome.", "the", "2,161", "-", "(a)", "<answer>", "</answer>", "\n", "é", "“x”", "U.S."]
    seen = set()
    for _ in range(2000):
        message = " ".join(rng.choices(pieces, k=rng.randrange(12)))
        reference = " ".join(rng.choices(pieces[:6] + pieces[9:], k=rng.randrange(5)))
        value = answer_f1(message, reference)
        assert value == pytest.approx(published_f1(message, reference), abs=1e-12), (message, reference)
        assert answer_words(message) == set(published_words(message))
        seen.add(value)
    assert 0.0 in seen and 1.0 in seen and len(seen) > 5


@pytest.mark.parametrize(
    ("text", "answer", "found"),
    [
        ("The capital is PARIS.", "paris", True),
        ("about 2,161,000 people", "2161000", True),
        ("Paris and Lima", "Lima, Paris", True),  # every part, in any order
        ("Paris", "Lima, Paris", False),
        ("", "x", False),
        ("anything", "", True),
    ],
)
def test_the_published_rule_of_containment(text: str, answer: str, found: bool) -> None:
    assert contains_answer(text, answer) is found


def test_what_a_message_says_has_no_thought_in_it() -> None:
    assert visible("<think>a</think>\n\nb ") == "b" == visible("b")
    assert visible("<think>a") == ""
    assert tagged_answer("<think><answer>a</answer></think>") is None
    assert plain(" Ab,c ") == "abc"
