"""Bad rows: kept apart and counted, or the end of the run. Which of the two is ``run.bad_rows`` of the configuration.

A reader hands every row it can't use to a :class:`Quarantine` as the error that says why. What can't be parted into
rows at all (a torn JSON list, a parquet file that isn't one) has no good rest to go on with, so it stops the run under
either policy.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pact_nemo.errors import DataError
from pact_nemo.runtime.files import write_text_atomic

FILE = "quarantine.jsonl"
POLICIES = ("quarantine", "strict")
_RAW_CHARS = 20_000  # a longer raw row is cut: the file and row number say where the whole one is
_SAID = 10  # rows that are logged as they come; all of them are in the file
T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BadRow:
    """A row that was not used: what is wrong with it and, as far as it could be read, what it holds."""

    error: DataError
    raw: Any

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; ``raw`` as its text, lone surrogates escaped, because it may hold what no JSON file can."""
        text = self.raw if isinstance(self.raw, str) else _text(self.raw)
        text = text.encode("utf-8", "backslashreplace").decode("utf-8")
        raw = text if len(text) <= _RAW_CHARS else f"{text[:_RAW_CHARS]} … {len(text) - _RAW_CHARS} more characters"
        message = str(self.error).encode("utf-8", "backslashreplace").decode("utf-8")
        return {
            "file": self.error.file,
            "row": self.error.line,
            "field": self.error.field,
            "error": message,
            "raw": raw,
        }


def _text(value: Any) -> str:
    try:
        return json.dumps(value, default=repr)
    except (ValueError, TypeError, RecursionError):
        return f"({type(value).__name__} that can't be written as JSON)"


class Quarantine:
    """Collects bad rows, or refuses the first one.

    Args:
        policy: ``quarantine``: keep the row apart and go on; ``strict``: raise its error.
    """

    def __init__(self, policy: str = "strict"):
        self.strict = policy == "strict"
        self.rows: list[BadRow] = []

    def add(self, error: DataError, raw: Any) -> None:
        """Take a row out. Raises the error itself under ``strict``."""
        if self.strict:
            raise error
        if len(self.rows) < _SAID:
            log.warning("a row is left out: %s", str(error))
        # what it was raised from holds the frames of the reader, and with them the file; a hundred thousand bad rows
        # must not
        error.__traceback__ = error.__cause__ = error.__context__ = None
        self.rows.append(BadRow(error, raw))

    def parse(self, parse: Callable[[], T], raw: Any) -> T | None:
        """What ``parse`` makes of a row, or None when the row went into quarantine."""
        try:
            return parse()
        except DataError as error:
            self.add(error, raw)
            return None

    def __len__(self) -> int:
        return len(self.rows)

    def by_file(self) -> dict[str, int]:
        """Number of bad rows of each file, by its name without folders."""
        return dict(Counter(Path(row.error.file or "?").name for row in self.rows))

    def write(self, folder: str | os.PathLike[str]) -> Path | None:
        """Write ``quarantine.jsonl`` into a run folder: one object a bad row (file, row, field, error, raw). None and
        no file when there is none.
        """
        path = Path(folder) / FILE
        if not self.rows:
            path.unlink(missing_ok=True)  # of an earlier attempt of the same run, whose data has been repaired since
            return None
        write_text_atomic(path, "".join(json.dumps(row.to_dict(), ensure_ascii=False) + "\n" for row in self.rows))
        return path
