"""Rollouts on disk: JSONL, written whole or not at all, checked row by row when read back."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pact_nemo.environments.base import Outcome, ToolCall
from pact_nemo.errors import DataError
from pact_nemo.rollouts.types import LIMITS, Rollout, Turn
from pact_nemo.runtime import strict_json
from pact_nemo.runtime.files import write_text_atomic

_STATUSES = ("ok", "truncated", "failed")
_SCALARS: dict[str, tuple[type, ...]] = {
    "task_id": (str,),
    "sample": (int,),
    "weight_version": (int,),
    "status": (str,),
    "error": (str, type(None)),
    "seconds": (int, float),
    "outcome": (dict, type(None)),
}
_TURN: dict[str, tuple[type, ...]] = {
    "start": (int,),
    "end": (int,),
    "text": (str,),
    "calls": (list,),
    "call_errors": (list,),
    "observations": (list,),
    "user_turn": (int,),
    "finish_reason": (str,),
}


def write_rollouts(path: str | Path, rollouts: Iterable[Rollout]) -> None:
    """One JSON object a line. Raises ValueError for a log-prob that is NaN or infinite."""
    write_text_atomic(
        path, "".join(json.dumps(r.to_dict(), ensure_ascii=False, allow_nan=False) + "\n" for r in rollouts)
    )


def read_rollouts(path: str | Path) -> list[Rollout]:
    """Read :func:`write_rollouts` output; keys that a writer added beyond a rollout's own (e.g. rewards) are left out.

    Raises:
        DataError: names file, line and field of the first row that is not a rollout.
    """
    file = str(path)
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"rollouts can't be read: {error}; dump them again", file=file) from error
    rollouts = []
    # not splitlines(): U+2028 and its kin are no line ends in JSON
    lines = text.removesuffix("\n").split("\n") if text else []
    for number, line in enumerate(lines, start=1):
        try:
            row = strict_json.loads(line)
        except ValueError as error:
            raise DataError(
                f"not a JSON object ({error}); the file is torn: dump it again or take the row out",
                file=file,
                line=number,
            ) from error
        rollouts.append(parse_rollout(row, file, number))
    return rollouts


def parse_rollout(row: Any, file: str, line: int) -> Rollout:
    """One row as a rollout. Raises DataError with ``file``, ``line`` and the field that is wrong."""
    place = _Place(file, line)
    if not isinstance(row, dict):
        raise place.fail("a row has to be a JSON object")
    place.typed(row, _SCALARS)
    _check_tokens(row, place)
    place.typed(row, {"turns": (list,)})
    length = len(row["token_ids"])
    turns = [_turn(turn, f"turns[{i}]", length, place) for i, turn in enumerate(row["turns"])]
    rewinds = _rewinds(row.get("rewinds", []), len(row["prompt_ids"]), length, turns, place)
    outcome = None if row["outcome"] is None else _outcome(row["outcome"], place)
    if row.get("limit") not in (None, *LIMITS):
        raise place.fail(f"{row['limit']!r} is no limit; one of {', '.join(LIMITS)}, or null", "limit")
    own = {item.name: row[item.name] for item in fields(Rollout) if item.name in row}
    return Rollout(**(own | {"turns": turns, "outcome": outcome, "rewinds": rewinds}))


@dataclass(frozen=True)
class _Place:
    """The row that is read."""

    file: str
    line: int

    def fail(self, message: str, name: str | None = None) -> DataError:
        return DataError(
            f"{message}; dump the step again or take the row out", file=self.file, line=self.line, field=name
        )

    def typed(self, container: dict[str, Any], schema: dict[str, tuple[type, ...]], prefix: str = "") -> None:
        """Raises DataError unless ``container`` has each key of ``schema`` with a value of one of its types."""
        for key, kinds in schema.items():
            if key not in container:
                raise self.fail("the key is missing", prefix + key)
            value = container[key]
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                raise self.fail(
                    f"{type(value).__name__} where {' or '.join(kind.__name__ for kind in kinds)} is needed",
                    prefix + key,
                )


def _check_tokens(row: dict[str, Any], place: _Place) -> None:
    """Token ids and what stands beside each of them, and the status."""
    for name, kinds in (
        ("prompt_ids", (int,)),
        ("token_ids", (int,)),
        ("loss_mask", (int,)),
        ("sampler_logprobs", (int, float)),
    ):
        place.typed(row, {name: (list,)})
        bad = next(
            (i for i, value in enumerate(row[name]) if not isinstance(value, kinds) or isinstance(value, bool)), None
        )
        if bad is not None:
            raise place.fail("a list of numbers is needed", f"{name}[{bad}]")
    if row["status"] not in _STATUSES:
        raise place.fail(f"{row['status']!r} is no status; one of {', '.join(_STATUSES)}", "status")
    length = len(row["token_ids"])
    for name in ("loss_mask", "sampler_logprobs"):
        if len(row[name]) != length:
            raise place.fail(f"{len(row[name])} entries for {length} token ids", name)
    if not set(row["loss_mask"]) <= {0, 1}:
        raise place.fail("entries have to be 0 or 1", "loss_mask")
    if not all(math.isfinite(value) for value in row["sampler_logprobs"]):
        raise place.fail("entries have to be finite", "sampler_logprobs")


def _outcome(verdict: dict[str, Any], place: _Place) -> Outcome:
    """The checker's verdict."""
    place.typed(verdict, {"success": (bool,), "score": (int, float), "reason": (str,)}, "outcome.")
    metrics = verdict.get("metrics", {})
    if not isinstance(metrics, dict) or not all(type(value) in (int, float) for value in metrics.values()):
        raise place.fail("an object of numbers is needed", "outcome.metrics")
    solved = verdict.get("solved")
    if solved is not None and not (isinstance(solved, list) and all(isinstance(value, bool) for value in solved)):
        raise place.fail("a list of true and false, or null, is needed", "outcome.solved")
    return Outcome(
        bool(verdict["success"]),
        float(verdict["score"]),
        verdict["reason"],
        metrics,
        None if solved is None else tuple(solved),
    )


def _rewinds(rows: Any, prompt: int, length: int, turns: list[Turn], place: _Place) -> list[tuple[int, int]]:
    """Checked ``Rollout.rewinds``; a dump without them is of one context."""
    if not isinstance(rows, list):
        raise place.fail("a list is needed", "rewinds")
    found: list[tuple[int, int]] = []
    before, context = 0, 0
    for i, row in enumerate(rows):
        where = f"rewinds[{i}]"
        if not (isinstance(row, list | tuple) and len(row) == 2 and all(type(value) is int for value in row)):
            raise place.fail("two whole numbers, position and tokens kept, are needed", where)
        start, keep = row
        if not before < start < length:
            raise place.fail(f"position {start} has to lie behind {before} and before {length}", where)
        context += start - before
        if not -prompt < keep < context:
            raise place.fail(f"{keep} tokens can't be kept of a context of {context} after a prompt of {prompt}", where)
        if any(turn.start < start < turn.end for turn in turns):
            raise place.fail(f"position {start} lies within an assistant turn", where)
        found.append((start, keep))
        before, context = start, keep
    return found


def _turn(row: Any, where: str, length: int, place: _Place) -> Turn:
    if not isinstance(row, dict):
        raise place.fail("a turn has to be a JSON object", where)
    place.typed(row, _TURN, f"{where}.")
    if not 0 <= row["start"] <= row["end"] <= length:
        raise place.fail(f"range {row['start']}..{row['end']} lies outside the {length} token ids", f"{where}.end")
    calls = []
    for i, call in enumerate(row["calls"]):
        if not isinstance(call, dict):
            raise place.fail("a call has to be a JSON object", f"{where}.calls[{i}]")
        place.typed(call, {"name": (str,), "arguments": (dict,)}, f"{where}.calls[{i}].")
        calls.append(ToolCall(call["name"], call["arguments"]))
    for name in ("call_errors", "observations"):
        if not all(isinstance(text, str) for text in row[name]):
            raise place.fail("a list of strings is needed", f"{where}.{name}")
    if "visible" in row:  # older dumps have none
        place.typed(row, {"visible": (str,)}, f"{where}.")
    said = row.get("reply", [])
    if not isinstance(said, list) or not all(isinstance(each, dict) for each in said):
        raise place.fail("a list of messages is needed", f"{where}.reply")
    for i, message in enumerate(said):
        place.typed(message, {"role": (str,), "content": (str,)}, f"{where}.reply[{i}].")
    own = {item.name: row[item.name] for item in fields(Turn) if item.name in row}
    return Turn(**(own | {"calls": calls}))
