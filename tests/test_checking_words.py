"""What pact-check and made-up reasoning say of tools, and what is said in an episode that plays a trace."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from pact_nemo.checking.data_checks import kind_of
from pact_nemo.checking.plays import NOTHING, Script
from pact_nemo.environments.base import Task, ToolCall
from pact_nemo.traces.annotate import purpose
from pact_nemo.traces.augment import CLOSING, closings
from pact_nemo.traces.schema import ReasoningSegment, Trace, TraceTurn


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "string"}, "string"),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "integer | null"),
        ({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}, "string | array of string"),
        ({"type": ["number", "null"]}, "number | null"),
        ({"type": "string", "enum": ["mon", "tue"]}, '"mon" | "tue"'),
        ({"const": 3}, "3"),
        ({"$ref": "#/$defs/Address"}, "Address"),
        ({"allOf": [{"$ref": "#/$defs/Address"}], "default": None}, "Address"),
        ({"type": "array"}, "array"),
        ({"description": "whatever"}, "any"),
    ],
)
def test_a_type_for_people(schema: dict[str, Any], words: str) -> None:
    assert kind_of(schema) == words


@pytest.mark.parametrize(
    ("description", "words"),
    [
        ("Does the sum.", "do the sum"),
        ("Goes to a page.", "go to a page"),
        ("Copies a file.", "copy a file"),
        ("Ties a knot.", "tie a knot"),
        ("Fixes a typo.", "fix a typo"),
        ("Searches the web.", "search the web"),
        ("Lists files.", "list files"),
        ("Rooms that are free.", "get rooms that are free"),
        ("Value of an expression.", "get value of an expression"),
        ("Book a room.", "book a room"),
    ],
)
def test_a_purpose_begins_with_a_verb(description: str, words: str) -> None:
    assert purpose({"description": description}, 30) == words


def test_a_played_trace_says_what_its_replay_says() -> None:
    """One call in each of three user turns; nothing is said after the first, and a fourth turn comes behind."""

    def turn(user_turn: int, closing: str) -> TraceTurn:
        words = (ReasoningSegment("other", "x"),)
        user = ({"role": "user", "content": "And?"},) if closing else ()
        return TraceTurn(words, (ToolCall("f"),), ("1",), user_turn, user, closing=closing)

    trace = Trace("t", "x", (turn(0, ""), turn(1, "One."), turn(2, "")), True)
    request = (({"role": "user", "content": "q"},),)
    for answer, words in ((None, CLOSING), ("4", "4")):
        task = Task("t", "t", "c", request, (), ((),), reference_answer=answer)
        for answers, said in (
            ((), ["", "One.", words, words, words]),
            (("", "Four."), ["", "One.", words, "Four.", "Four."]),
            (("Two.", ""), ["", "One.", "Two.", "Two.", "Two."]),
        ):
            script = Script.of_trace(trace, answers, task)
            assert list(itertools.islice(closings(trace, answers, task), 5)) == said
            assert [script.said(index) for index in range(5)] == said
    assert [NOTHING.said(index) for index in range(2)] == [CLOSING] * 2
