"""Where an argument value comes from: does it occur literally in a text?"""

from __future__ import annotations

import re
from typing import Any


def leaves(value: Any) -> list[Any]:
    """The scalar values inside a JSON value, in order."""
    if isinstance(value, list):
        return [leaf for item in value for leaf in leaves(item)]
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in leaves(item)]
    return [value]


def _occurs(value: Any, text: str) -> bool:
    if isinstance(value, int | float):
        forms = {str(value), f"{value:g}"} | ({str(int(value))} if float(value).is_integer() else set())
        plain = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
        return any(re.search(rf"(?<![\w.]){re.escape(form)}(?![\w]|\.\d)", plain) for form in forms)
    needle = str(value).casefold().strip()
    if not re.search(r"\w", needle):  # "." and the like occur in any text
        return False
    if len(needle) < 3:
        return re.search(rf"(?<!\w){re.escape(needle)}(?!\w)", text.casefold()) is not None
    return needle in text.casefold()


def is_grounded(value: Any, text: str) -> bool:
    """Whether every scalar in ``value`` occurs literally in ``text``, case-insensitively; booleans and None need no
    ground.

    Numbers match as whole numbers in any usual notation (``1,500`` for 1500, ``5`` for 5.0); strings shorter than three
    characters as whole words. Punctuation alone is never grounded.
    """
    return all(leaf is None or isinstance(leaf, bool) or _occurs(leaf, text) for leaf in leaves(value))
