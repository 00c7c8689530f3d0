"""Reading published benchmark rows from JSON, JSONL or parquet, with errors that name file, row and field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pact_nemo.errors import DataError


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a ``.json`` list, a ``.jsonl`` or a ``.parquet`` file.

    Raises:
        DataError: no such file, unknown ending, or a row that is no object (file and row named).
    """
    file = Path(path)
    if not file.is_file():
        raise DataError("file does not exist; set tasks.path to the published data", file=str(file))
    if file.suffix == ".parquet":
        from pyarrow import ArrowException, parquet

        try:
            rows = parquet.read_table(file).to_pylist()
        except (ArrowException, OSError) as error:
            raise DataError(f"not a readable parquet file: {error}", file=str(file)) from error
    elif file.suffix in (".jsonl", ".json"):
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"not UTF-8: {error}", file=str(file)) from error
        if file.suffix == ".json":
            rows = _load(text, file, None)
        else:
            rows = [_load(line, file, number) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    else:
        raise DataError(f"can't read {file.suffix or 'a file without ending'}; .parquet, .jsonl and .json can be read", file=str(file))
    if not isinstance(rows, list):
        raise DataError("expected a list of rows at the top level", file=str(file))
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"row is {type(row).__name__}, not an object", file=str(file), line=number)
    return rows


def _load(text: str, file: Path, line: int | None) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not valid JSON: {error}", file=str(file), line=line) from error


class Row:
    """One row with typed access; every complaint names file, row and field."""

    def __init__(self, values: dict[str, Any], file: str | Path, number: int):
        self.values, self.file, self.number = values, str(file), number

    def complain(self, message: str, field: str) -> DataError:
        return DataError(message, file=self.file, line=self.number, field=field)

    def text(self, field: str, default: str | None = None) -> str:
        """A string; numbers are written out."""
        value = self.values.get(field, default)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise self.complain(f"expected text, found {type(value).__name__}", field)
        return str(value)

    def json(self, field: str, kind: type) -> Any:
        """A value of ``kind``, as it is or as a JSON string of it (parquet files hold such strings)."""
        value = self.values.get(field)
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise self.complain(f"not valid JSON: {error}", field) from error
        if not isinstance(value, kind):
            raise self.complain(f"expected {kind.__name__}, found {type(value).__name__}", field)
        return value
