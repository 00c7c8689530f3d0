"""What endpoints answered before, so that nothing is asked twice: in memory, and in a JSONL file where one is given."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

from pact_nemo.errors import ConfigError
from pact_nemo.runtime import strict_json

T = TypeVar("T", float, str)


class Asked(Generic[T]):
    """Answers by what was asked. Thread-safe; two threads that ask the same at once both ask.

    Args:
        setting: that names the file, e.g. ``agent.judge.cache``.
        path: its value; None: this process only.
        field: the answer's key in a row of the file.
        sound: an answer as it was read, or None where it is no answer; rows that somebody edited are left out.

    Raises:
        ConfigError: the file can't be read or written.
    """

    def __init__(self, setting: str, path: str | None, field: str, sound: Callable[[Any], T | None]):
        self._path = None if path is None else Path(path)
        self._field = field
        self._lock = threading.Lock()
        self._known: dict[str, T] = {} if self._path is None else _read(setting, self._path, field, sound)

    def get(self, words: tuple[Any, ...], ask: Callable[[], T]) -> T:
        """The answer to ``words``: the known one, else that of ``ask()``, which is kept."""
        key = hashlib.sha256("\0".join(map(str, words)).encode("utf-8", "surrogatepass")).hexdigest()
        with self._lock:
            if key in self._known:
                return self._known[key]
        answer = ask()
        with self._lock:
            self._known[key] = answer
            if self._path is not None:
                with self._path.open("a", encoding="utf-8") as handle:
                    handle.write(json.dumps({"key": key, self._field: answer}) + "\n")
        return answer


def _read(setting: str, path: Path, field: str, sound: Callable[[Any], T | None]) -> dict[str, T]:
    """What was asked before; a last line that was cut off is left out."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        with path.open("a", encoding="utf-8") as handle:
            handle.write("" if text.endswith("\n") or not text else "\n")  # a process was cut off there
    except OSError as error:
        raise ConfigError(f"{setting}={path}: {error.strerror}; give a file that can be written") from error
    found: dict[str, T] = {}
    for line in text.splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            row = strict_json.loads(line)
            if (answer := sound(row[field])) is not None:
                found[str(row["key"])] = answer
    return found
