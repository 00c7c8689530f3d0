"""Whether a closing message holds the expected answer, by the five rules of ``agent.answer``; and whether calls are the
expected ones. Text and JSON values only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal
from typing import Any

from pact_nemo.environments.answers import answer_words, composed, names_answer, plain, tagged_answer, visible
from pact_nemo.environments.base import ToolCall
from pact_nemo.environments.rows import number_text
from pact_nemo.objective.rewards import values_equal
from pact_nemo.runtime import strict_json

_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?(?!\w|\.\d)")
_PADDED = re.compile(r"[-+]?0\d")  # a name in digits, such as 007
_COMMA_AFTER = re.compile(r",\d")
_FENCE = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL)
_RELATIVE = Decimal("1e-6")
_QUIET = Context(Emax=MAX_EMAX, Emin=MIN_EMIN, traps=[])  # a model may write any number, 1e1000000 too


def answer_score(rule: str, message: str, answers: Sequence[Any]) -> float:
    """How well a closing message answers, in [0, 1]; the best over several accepted ``answers``.

    Args:
        rule: ``contains``: the answer stands in the message as whole words, without regard to case and commas; of a
            number, a number of the message is equal to it. ``exact``: the message, or its ``<answer>``, is the answer,
            likewise. ``f1``: of the different words of
            both. ``number``: the last number of the message equals the answer to 1e-6 of its size. ``json``: the
            message, its fenced block, or its outermost object or list equals the answer as JSON.
        message: the assistant's, thoughts included; they are left out.
    """
    message = message if rule == "json" else composed(message)
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
    return composed(number_text(answer) if isinstance(answer, float) else str(answer))


def numbers_in(text: str, *, apart: bool = False) -> list[Decimal]:
    """The numbers of a text in order, commas between thousands left out.

    Args:
        apart: those that a comma parts from another digit are left out: it may be a decimal mark.
    """
    found = (
        Decimal(match[0].replace(",", ""), _QUIET) for match in _NUMBER.finditer(text) if not apart or _apart(match)
    )
    return [number for number in found if number.is_finite()]


def _apart(match: re.Match[str]) -> bool:
    before, after = match.string[: match.start()][-2:], match.string[match.end() :][:2]
    return _COMMA_AFTER.match(before[::-1]) is None and _COMMA_AFTER.match(after) is None


def number_in(text: str) -> Decimal | None:
    """The last number of a text; None where there is none."""
    found = numbers_in(text)
    return found[-1] if found else None


def _whole_number(text: str) -> Decimal | None:
    """The number that a text is; None where it is something else, or a name in digits."""
    text = text.strip()
    return number_in(text) if _NUMBER.fullmatch(text) and not _PADDED.match(text) else None


def _contains(said: str, tagged: str | None, answer: Any) -> float:
    number = _whole_number(_text(answer))
    if number is None:
        return float(names_answer(said, _text(answer)))
    return float(number in numbers_in(said, apart=True))


def _exact(said: str, tagged: str | None, answer: Any) -> float:
    text, wanted = tagged if tagged is not None else said, _text(answer)
    number = _whole_number(wanted)
    return float(plain(text) == plain(wanted) or (number is not None and number == _whole_number(text)))


def _f1(said: str, tagged: str | None, answer: Any) -> float:
    left, right = answer_words(tagged if tagged is not None else said), answer_words(_text(answer))
    common = len(left & right)
    return 2.0 * common / (len(left) + len(right)) if common else 0.0


def _number(said: str, tagged: str | None, answer: Any) -> float:
    found, wanted = number_in(tagged if tagged is not None else said), number_in(_text(answer))
    if found is None or wanted is None:
        return 0.0
    most = _QUIET.multiply(_RELATIVE, max(found.copy_abs(), wanted.copy_abs()))
    return float(_QUIET.subtract(found, wanted).copy_abs() <= most)


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
