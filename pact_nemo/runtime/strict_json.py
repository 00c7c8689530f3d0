"""JSON as its standard has it, and no deeper than anything here needs: what every file of rows is read with.

Python's own reader takes ``NaN`` and ``1e999``, makes strings that no file or tokenizer can hold (lone surrogates), and
nests until the stack ends.
"""

from __future__ import annotations

import json
import math
from typing import Any

#: levels of lists and objects; everything that walks a row recursively stays far from Python's own limit
MAX_DEPTH = 64

MAX_BITS = 1000  #: of a whole number: what is longer can't be made a float


def _refuse_constant(token: str) -> Any:
    raise ValueError(f"{token} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is too large")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:60]!r} is there twice in one object")
    return value


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite)
_UNIQUE = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_unique)


def check(value: Any) -> None:
    """Raises ValueError where a value, wherever it came from, is nested too deeply, holds a lone surrogate, or a number
    that isn't finite.
    """
    todo: list[tuple[Any, int]] = [(value, 1)]
    while todo:
        item, depth = todo.pop()
        if isinstance(item, str):
            if not item.isascii():
                try:
                    item.encode("utf-8")
                except UnicodeEncodeError:
                    raise ValueError("a text holds half a surrogate pair, which no UTF-8 file can") from None
        elif isinstance(item, float):
            if not math.isfinite(item):
                raise ValueError("a number is not finite")
        elif isinstance(item, int):
            if item.bit_length() > MAX_BITS:
                raise ValueError("a whole number is longer than any float")
        elif isinstance(item, list | tuple | dict):
            if depth > MAX_DEPTH:
                raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
            children = item if not isinstance(item, dict) else [*item.keys(), *item.values()]
            todo.extend((child, depth + 1) for child in children)


def loads(text: str, *, unique: bool = False) -> Any:
    """Read one JSON value; a byte-order mark before it is passed over.

    Args:
        unique: an object may hold no key twice. Rows of data are read so: the last value would win without a word.

    Raises:
        ValueError: not JSON, not finite, nested too deeply, a text in it can't be written as UTF-8, or a key is there
            twice; says which.
    """
    try:
        value = (_UNIQUE if unique else _DECODER).decode(text.removeprefix("\ufeff"))
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from None
    check(value)
    return value


def decode_at(text: str, position: int) -> tuple[Any, int]:
    """The JSON value that begins at ``position``, and the position after it. An object may hold no key twice.

    Raises:
        ValueError: as :func:`loads`, or a key is there twice.
    """
    try:
        value, end = _UNIQUE.raw_decode(text, position)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from None
    check(value)
    return value, end
