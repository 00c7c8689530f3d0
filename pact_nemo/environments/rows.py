"""Reading published benchmark rows from JSON, JSONL or parquet, with errors that name file, row and field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pact_nemo import strict_json
from pact_nemo.errors import DataError
from pact_nemo.quarantine import Quarantine

_REPAIR = "repair the row or take it out"


def read_rows(path: str | Path, quarantine: Quarantine | None = None) -> list[Row]:
    """Rows of a ``.json`` list, a ``.jsonl`` or a ``.parquet`` file, numbered from 1 (JSONL: by line).

    Args:
        path: the file.
        quarantine: takes rows that are no objects; None: the first one is refused.

    Raises:
        DataError: no such file, unknown ending, a file that can't be parted into rows, or a refused row (file and row named).
    """
    file, quarantine = Path(path), quarantine if quarantine is not None else Quarantine()
    if not file.is_file():
        raise DataError("file does not exist; set tasks.path to the published data", file=str(file))
    if file.suffix == ".jsonl":
        return _of_lines(file, quarantine)
    if file.suffix == ".parquet":
        values = _of_parquet(file)
    elif file.suffix == ".json":
        try:
            values = strict_json.loads(file.read_bytes().decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(f"not UTF-8: {error}; save it as UTF-8", file=str(file)) from error
        except ValueError as error:
            raise DataError(f"not valid JSON: {error}; fetch the file again", file=str(file)) from error
    else:
        raise DataError(f"can't read {file.suffix or 'a file without ending'}; .parquet, .jsonl and .json can be read", file=str(file))
    if not isinstance(values, list):
        raise DataError("expected a list of rows at the top level; fetch the file again", file=str(file))
    rows = (quarantine.guard(lambda: _row(value, file, number), value) for number, value in enumerate(values, start=1))  # noqa: B023 - called at once
    return [row for row in rows if row is not None]


def _of_lines(file: Path, quarantine: Quarantine) -> list[Row]:
    rows = []
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):  # bytes: U+2028 is no line end in JSON
        if line.strip():
            row = quarantine.guard(lambda: _row(_line(line, file, number), file, number), line.decode("utf-8", "backslashreplace"))  # noqa: B023
            if row is not None:
                rows.append(row)
    return rows


def _line(line: bytes, file: Path, number: int) -> Any:
    try:
        return strict_json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8: {error}; {_REPAIR}", file=str(file), line=number) from error
    except ValueError as error:
        raise DataError(f"not valid JSON: {error}; {_REPAIR}", file=str(file), line=number) from error


def _row(value: Any, file: Path, number: int) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"row is {type(value).__name__}, not an object; {_REPAIR}", file=str(file), line=number)
    try:
        strict_json.check(value)  # a parquet file can hold NaN
    except ValueError as error:
        raise DataError(f"{error}; {_REPAIR}", file=str(file), line=number) from error
    return Row(value, file, number)


def _of_parquet(file: Path) -> list[Any]:
    from pyarrow import ArrowException, parquet

    try:
        values: list[Any] = parquet.read_table(file).to_pylist()
    except (ArrowException, OSError, ValueError, TypeError, OverflowError, MemoryError) as error:
        raise DataError(f"not a readable parquet file: {error}; fetch the file again", file=str(file)) from error
    return values


class Row:
    """One row with typed access; every complaint names file, row and field."""

    def __init__(self, values: dict[str, Any], file: str | Path, number: int):
        self.values, self.file, self.number = values, str(file), number

    def complain(self, message: str, field: str) -> DataError:
        return DataError(f"{message}; {_REPAIR}", file=self.file, line=self.number, field=field)

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
                value = strict_json.loads(value)
            except ValueError as error:
                raise self.complain(f"not valid JSON: {error}", field) from error
        if not isinstance(value, kind):
            raise self.complain(f"expected {kind.__name__}, found {type(value).__name__}", field)
        return value
