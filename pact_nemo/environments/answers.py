"""How answers are found in a message, written alike and compared: the one place that knows it.

What is compared is what a model says to its user. A thought (``<think>…</think>``) is none of it and is taken off here
once more, whoever passes the message.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Mapping

from pact_nemo.chat.thoughts import visible_text

TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_LOOSE_COMMA = re.compile(r"(?<!\d),|,(?!\d)|,(?=\d{3}(?!\d))")  # not what parts two numbers, or a number's digits
_NO_DIGITS_BEFORE = r"(?<![.])(?<!\d,)(?<!\W[-+])(?<!^[-+])"
_NO_DIGITS_AFTER = r"(?![.,]\d)"
_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation, " "))


def visible(message: str) -> str:
    """An assistant message without its thought and outer white space."""
    return visible_text(message)


def plain(text: str) -> str:
    """Lower case, without commas and outer blanks: how FTRL and ToolHop compare (their published ``answer_verify``)."""
    return text.lower().replace(",", "").strip()


def contains_answer(text: str, answer: str) -> bool:
    """The published ``answer_verify``: every ``", "``-separated part of the answer occurs in the text, both in
    :func:`plain` form.
    """
    found = plain(text)
    return all(plain(part) in found for part in answer.split(", "))


def says_nothing(answer: str) -> bool:
    """Whether an answer is empty in :func:`plain` form, so that any text contains it."""
    return not any(plain(part) for part in answer.split(", "))


def composed(text: str) -> str:
    """A text with one spelling of each letter (NFC) and of the minus sign."""
    return unicodedata.normalize("NFC", text).replace("\N{MINUS SIGN}", "-")


def names_answer(question: str, answer: str) -> bool:
    """Whether a question names an answer, as whole words and whole numbers: without regard to case, and to commas but
    those between numbers. ``4 m`` stands neither in ``2.4 m`` nor in ``-4 m``.
    """
    wanted, text = (_LOOSE_COMMA.sub("", composed(each).lower()).strip() for each in (answer, question))
    if not wanted:
        return False
    before = _NO_DIGITS_BEFORE if wanted[0].isdigit() else ""
    after = _NO_DIGITS_AFTER if wanted[-1].isdigit() else ""
    return re.search(rf"(?<!\w){before}{re.escape(wanted)}(?!\w){after}", text) is not None


def in_order(questions: Mapping[str, str]) -> list[str]:
    """Sub-questions so that one whose words contain another's answer comes after it; otherwise as given.

    Args:
        questions: question -> its answer.
    """
    left, ordered = list(questions), []
    while left:
        free = [q for q in left if not any(other != q and names_answer(q, questions[other]) for other in left)]
        chosen = (free or left)[0]
        ordered.append(chosen)
        left.remove(chosen)
    return ordered


def tagged_answer(message: str) -> str | None:
    """What stands in the first ``<answer>…</answer>`` of a message, outside its thought; None without one."""
    found = TAG.search(visible(message))
    return found.group(1) if found is not None else None


def answer_words(text: str) -> set[str]:
    """The different words of an answer: lower case, every ASCII punctuation mark a blank (MatchTIR's
    ``preprocess_text``).
    """
    return set(text.lower().translate(_PUNCTUATION).split())


def answer_f1(message: str, reference: str) -> float:
    """F1 in [0, 1] of a message's tagged answer against the reference answer, as MatchTIR's public code computes it
    (arXiv 2601.10712).

    Precision is over the different words of the answer, recall over those of the reference (:func:`answer_words`). It
    is 0 without the tag, and 0 where either has no word.
    """
    said = tagged_answer(message)
    left, right = answer_words(said or ""), answer_words(reference)
    common = len(left & right)
    return 2.0 * common / (len(left) + len(right)) if common else 0.0
