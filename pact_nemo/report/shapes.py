"""What the files of a run folder must look like for the report to read them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Optional:
    """A value that may be null; as the value of a key, one that may be missing too. ``null=False``: missing only."""

    shape: Any
    null: bool = True


@dataclass(frozen=True)
class Values:
    """An object with any keys, whose values have one shape."""

    shape: Any


class Number:
    """A finite number; true and false are none."""


_CALL = {"name": str, "arguments": dict}
_MESSAGE = {"role": str, "content": str}
_TURN = {
    "text": str,
    "calls": [_CALL],
    "call_errors": [str],
    "observations": [str],
    "user_turn": int,
    "finish_reason": str,
    "reply": Optional([_MESSAGE]),
}
EPISODE = {
    "task_id": str,
    "sample": int,
    "turns": [_TURN],
    "status": str,
    "outcome": Optional({"success": bool, "reason": str, "score": Optional(Number, null=False)}),
    "error": Optional(str),
    "seconds": Optional(Number),
    "rewards": Optional([Optional(Number)]),
    "advantages": Optional([Optional(Number)]),
    "anchored": Optional(bool),
    "task": {"category": str, "tags": Optional([str]), "user_turns": [[_MESSAGE]], "reference_calls": [[_CALL]]},
}
_PART = {"score": Number, "n": int}
_SCORE = _PART | {
    "failed": Optional(int),
    "categories": Optional(Values(_PART)),
    "metrics": Optional(Values(Optional(Number))),
    "call_reward": Optional(Number),
}
SUMMARY = {
    "label": Optional(str),
    "method": Optional(str),
    "steps": Optional(int),
    "eval": Optional(Values(Optional(_SCORE))),
    "seconds": Optional(Values(Number)),
    "peak_memory_bytes": Optional(Values(Optional(Number))),
    "tokens": Optional(Values(Optional(Number))),
    "tasks": Optional(
        {
            "train": Optional(int),
            "held_out": Optional(int),
            "without_trace": Optional(int),
            "without_reference_calls": Optional(int),
            "dropped": Optional(Values(int)),
        }
    ),
    "failed_rollouts": Optional(Values(int)),
    "server": Optional(Values(int)),
    "versions": Optional(Values(str)),
}


def problem(value: Any, shape: Any, where: str = "") -> tuple[str, str] | None:
    """(what is wrong, dotted path of where) of the first thing that doesn't fit a shape; None where all does. Unknown
    keys are let pass.
    """
    if isinstance(shape, Optional):
        return None if value is None and shape.null else problem(value, shape.shape, where)
    if shape is Number:
        fits = (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and abs(value) < 1e300
            and math.isfinite(value)
        )
        return None if fits else ("expected a number", where)
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"expected a list, found {type(value).__name__}", where
        found = (problem(item, shape[0], f"{where}[{index}]") for index, item in enumerate(value))
    elif isinstance(shape, dict | Values):
        if not isinstance(value, dict):
            return f"expected an object, found {type(value).__name__}", where
        if isinstance(shape, Values):
            found = (problem(item, shape.shape, f"{where}.{key}") for key, item in value.items())
        else:
            missing = next(
                (key for key, kind in shape.items() if key not in value and not isinstance(kind, Optional)), None
            )
            if missing is not None:
                return "the key is missing", f"{where}.{missing}".lstrip(".")
            found = (
                problem(value[key], kind, f"{where}.{key}".lstrip(".")) for key, kind in shape.items() if key in value
            )
    else:
        fits = (
            isinstance(value, shape)
            and (shape is bool or not isinstance(value, bool))
            and not (shape is int and abs(value) >= 10**15)
        )
        return None if fits else (f"expected {shape.__name__}, found {type(value).__name__}", where)
    return next((item for item in found if item is not None), None)
