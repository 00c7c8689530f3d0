"""Whether a closing message holds the expected answer, by the five rules of ``agent.answer``; and whether calls are the
expected ones. Text and JSON values only.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from pact_nemo.environments.answers import answer_words, names_answer, plain, tagged_answer, visible
from pact_nemo.environments.base import ToolCall
from pact_nemo.environments.rows import number_text
from pact_nemo.objective.rewards import values_equal
from pact_nemo.runtime import strict_json

_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?(?!\w|\.\d)")
_PADDED = re.compile(r"[-+]?0\d")  # a name in digits, such as 007
_FENCE = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL)
_RELATIVE = Decimal("1e-6")


def answer_score(rule: str, message: str, answers: Sequence[Any]) -> float:
    """How well a closing message answers, in [0, 1]; the best over several accepted ``answers``.

    Args:
        rule: ``contains``: the answer stands in the message as whole words, without regard to case and commas; of a
            number, a number of the message is equal to it.
            ``exact``: the message, or its ``<answer>``, is the answer, likewise. ``f1``: of the different words of
            both. ``number``: the last number of the message equals the answer to 1e-6 of its size. ``json``: the
            message, its fenced block, or its outermost object or list equals the answer as JSON.
        message: the assistant's, thoughts included; they are left out.
    """
    said = visible(message)
    tagged = tagged_answer(message)
    return max((_RULES[rule](said, tagged, answer) for answer in answers), default=0.0)


def answer_fault(rule: str, answer: Any) -> str | None:
    """Why an expected answer can't be looked for by ``rule``; None where it can."""
    if rule == "json":
        return None
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        return f"is no text or number, which agent.answer={rule} compares; use agent.answer=json"
    if rule == "number" and number_in(_text(answer)) is None:
        return "has no number, which agent.answer=number compares"
    if rule == "f1" and not answer_words(_text(answer)):
        return "has no word, so that every message would score 0"
    if rule in ("contains", "exact") and not plain(_text(answer)):
        return "is empty, so that it tells right from wrong in no message"
    return None


def _text(answer: Any) -> str:
    """An expected answer as it is looked for: tables make 5.0 of 5."""
    return number_text(answer) if isinstance(answer, float) else str(answer)


def numbers_in(text: str) -> list[Decimal]:
    """The numbers of a text in order, commas between thousands left out; a typographic minus is one."""
    return [Decimal(found.replace(",", "")) for found in _NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))]


def number_in(text: str) -> Decimal | None:
    """The last number of a text; None where there is none."""
    found = numbers_in(text)
    return found[-1] if found else None


def _contains(said: str, tagged: str | None, answer: Any) -> float:
    text, wanted = (unicodedata.normalize("NFC", each) for each in (said, _text(answer)))
    if _NUMBER.fullmatch(wanted.strip()) and not _PADDED.match(wanted.strip()):
        return float(number_in(wanted) in numbers_in(text))
    return float(names_answer(text, wanted))


def _exact(said: str, tagged: str | None, answer: Any) -> float:
    return float(plain(tagged if tagged is not None else said) == plain(_text(answer)))


def _f1(said: str, tagged: str | None, answer: Any) -> float:
    left, right = answer_words(tagged if tagged is not None else said), answer_words(_text(answer))
    common = len(left & right)
    return 2.0 * common / (len(left) + len(right)) if common else 0.0


def _number(said: str, tagged: str | None, answer: Any) -> float:
    found, wanted = number_in(tagged if tagged is not None else said), number_in(_text(answer))
    if found is None or wanted is None:
        return 0.0
    return float(abs(found - wanted) <= _RELATIVE * max(abs(found), abs(wanted)))


def _json(said: str, tagged: str | None, answer: Any) -> float:
    texts = [tagged] if tagged is not None else [said, *_FENCE.findall(said), *_outermost(said)]
    return float(any(values_equal(value, answer) for text in texts for value in _decoded(text)))


def _outermost(text: str) -> list[str]:
    """From the first opening bracket to the last closing one, for objects and for lists."""
    spans = [(text.find(opening), text.rfind(closing)) for opening, closing in ("{}", "[]")]
    return [text[start : end + 1] for start, end in spans if 0 <= start < end]


def _decoded(text: str) -> list[Any]:
    try:
        return [strict_json.loads(text.strip())]
    except ValueError:
        return []


_RULES = {"contains": _contains, "exact": _exact, "f1": _f1, "number": _number, "json": _json}


def expected_share(calls: Sequence[Sequence[ToolCall]], expected: Sequence[Sequence[ToolCall]]) -> float:
    """Share of the expected calls that were made, in [0, 1]: by name and equal arguments, each once, within the user
    turn that they belong to. 1 where none is expected.

    Args:
        calls, expected: calls of each user turn, in any order.
    """
    total = sum(map(len, expected))
    made = 0
    for turn, wanted in enumerate(expected):
        left = list(calls[turn]) if turn < len(calls) else []
        for call in wanted:
            match = next((one for one in left if _same(one, call)), None)
            if match is not None:
                left.remove(match)
                made += 1
    return made / total if total else 1.0


def _same(left: ToolCall, right: ToolCall) -> bool:
    return left.name == right.name and values_equal(left.arguments, right.arguments)
