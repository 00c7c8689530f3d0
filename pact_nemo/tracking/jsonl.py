"""``metrics.jsonl``: the run's own record, one line per step, appended as it happens. Trackers are drawn from it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import TracebackType
from typing import Any

from pact_nemo.errors import DataError, NumericsError
from pact_nemo.runtime import strict_json
from pact_nemo.runtime.files import write_text_atomic

FILE = "metrics.jsonl"
STAGES = ("warmup", "rl")


def _row(text: str, path: Path, number: int) -> dict[str, Any]:
    remedy = "remove the line to go on"
    try:
        row = strict_json.loads(text)
    except ValueError as error:
        raise DataError(f"not JSON: {error}; {remedy}", file=str(path), line=number) from error
    if not isinstance(row, dict):
        raise DataError(f"expected an object, found {type(row).__name__}; {remedy}", file=str(path), line=number)
    if row.get("stage") not in STAGES:
        raise DataError(
            f"expected one of {', '.join(STAGES)}, found {row.get('stage')!r}; {remedy}",
            file=str(path),
            line=number,
            field="stage",
        )
    if not isinstance(row.get("step"), int) or isinstance(row["step"], bool):
        raise DataError(
            f"expected a step number, found {row.get('step')!r}; {remedy}", file=str(path), line=number, field="step"
        )
    odd = next((key for key, value in row.items() if key != "stage" and not _is_reading(value)), None)
    if odd is not None:
        raise DataError(
            f"expected a number or null, found {row[odd]!r:.60}; {remedy}", file=str(path), line=number, field=odd
        )
    return row


def _is_reading(value: Any) -> bool:
    """A number or null; no count is beyond 10^15, and no other whole number comes from a run."""
    return (
        value is None
        or isinstance(value, float)
        or isinstance(value, int)
        and not isinstance(value, bool)
        and abs(value) < 10**15
    )


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """All records of a run, in file order; empty when nothing was logged yet.

    A last line without its newline was torn by a kill and is left out (its step is run again on resume).

    Raises:
        DataError: any other line is not a record; names file, line and field.
    """
    path = Path(folder) / FILE
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return [_row(line, path, number) for number, line in enumerate(lines[:-1], 1)]


def check_finite(record: dict[str, Any]) -> None:
    """Raises NumericsError naming the keys whose value is NaN or Inf. None is fine: nothing to divide by in that
    step.
    """
    broken = [key for key, value in record.items() if isinstance(value, float) and not math.isfinite(value)]
    if broken:
        raise NumericsError(
            f"step {record.get('step')}: not finite: {', '.join(broken)}; nothing of this step was logged"
        )


class MetricsLog:
    """Writes the records of one run; rank 0 only, a context manager. A failure here is an error of the run, because
    resume, report and comparison read this file.

    Args:
        folder: run folder.
        resume_from: finished (warm-up, RL) steps of the checkpoint that the run goes on from. Later records are dropped
            in one atomic replacement, because their steps are about to be run again. None for a new run.

    Attributes:
        kept: the records that a resumed run goes on from, in file order; empty for a new run.

    Raises:
        DataError: on resume, ``metrics.jsonl`` holds a malformed line other than a torn last one.
    """

    def __init__(self, folder: str | Path, *, resume_from: tuple[int, int] | None):
        path = Path(folder) / FILE
        self.kept: list[dict[str, Any]] = []
        if resume_from is not None:
            done = dict(zip(STAGES, resume_from, strict=True))
            self.kept = [record for record in read_metrics(folder) if record["step"] <= done[record["stage"]]]
            write_text_atomic(path, "".join(json.dumps(record, allow_nan=False) + "\n" for record in self.kept))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by __exit__

    def append(self, record: dict[str, Any]) -> None:
        """Add one record; it needs ``step`` and ``stage``. Raises NumericsError before anything is written."""
        check_finite(record)
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
