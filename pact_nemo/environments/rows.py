"""Reading published benchmark rows from JSON, JSONL or parquet, with errors that name file, row and field.

What writers of tables make of Python values is undone, so that a row reads the same from every kind of file:

- A parquet struct column has one set of keys for all rows. Keys that a row never had come back as null; they are passed
  over, at every depth.
- An Arrow map comes back as a list of pairs; it is an object again.
- Arrays and scalars of numpy are lists and numbers; decimals are numbers. A number of fewer bits than Python's is the
  one that its shortest text says: 4.1, not 4.099999904632568.
- Dates and times are texts as ISO 8601 has them. What JSON has nothing for, such as bytes, is refused.
- A column of whole numbers with gaps is written as floats. A text that is wanted where 6.0 stands is ``6``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from pact_nemo.environments.base import Task
from pact_nemo.errors import DataError
from pact_nemo.runtime import strict_json
from pact_nemo.runtime.quarantine import Quarantine

_ROW_START, _NEXT_ROW = re.compile(r"\ufeff?\s*\[\s*"), re.compile(r"\s*,\s*")
_REPAIR = "repair the row or take it out"


def read_rows(path: str | Path, quarantine: Quarantine | None = None) -> list[Row]:
    """Rows of a ``.json`` list, a ``.jsonl`` or a ``.parquet`` file, numbered from 1 (JSONL: by line).

    Args:
        path: the file.
        quarantine: takes rows that are no objects; None: the first one is refused.

    Raises:
        DataError: no such file, unknown ending, a file that can't be parted into rows, or a refused row (file and row
            named).
    """
    file, quarantine = Path(path), quarantine if quarantine is not None else Quarantine()
    if not file.is_file():
        raise DataError("file does not exist; set tasks.path to the published data", file=str(file))
    if file.suffix == ".jsonl":
        return _of_lines(file, quarantine)
    if file.suffix == ".parquet":
        values = _of_parquet(file)
    elif file.suffix == ".json":
        values = _of_list(file)
    else:
        raise DataError(
            f"can't read {file.suffix or 'a file without ending'}; .parquet, .jsonl and .json can be read",
            file=str(file),
        )
    if not isinstance(values, list):
        raise DataError("expected a list of rows at the top level; fetch the file again", file=str(file))
    rows = (quarantine.parse(lambda: _row(value, file, number), value) for number, value in enumerate(values, start=1))  # noqa: B023 - called at once
    return [row for row in rows if row is not None]


def read_tasks(path: str | Path, quarantine: Quarantine, make: Callable[[Row], Task]) -> list[Task]:
    """A task of each row of a file, in order; rows that ``make`` raises DataError for go into the quarantine."""

    def made(row: Row) -> Task | None:
        return quarantine.parse(lambda: make(row), row.values)

    return [task for task in map(made, read_rows(path, quarantine)) if task is not None]


def _of_list(file: Path) -> Any:
    text = ""
    try:
        text = file.read_bytes().decode("utf-8")
        return strict_json.loads(text, unique=True)
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8: {error}; save it as UTF-8", file=str(file)) from error
    except ValueError as error:
        raise DataError(
            f"not valid JSON: {error}; fetch the file again, or repair the row", file=str(file), line=_bad_row(text)
        ) from error


def _bad_row(text: str) -> int | None:
    """Number of the first row of a JSON list that can't be read; None where that can't be said."""
    start, number = _ROW_START.match(text), 0
    while start is not None:
        number += 1
        try:
            _, end = strict_json.decode_at(text, start.end())
        except ValueError:
            return number
        start = _NEXT_ROW.match(text, end)
    return None


def _of_lines(file: Path, quarantine: Quarantine) -> list[Row]:
    rows = []
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):  # bytes: U+2028 is no line end in JSON
        if line.strip():
            row = quarantine.parse(
                lambda: _row(_line(line, file, number), file, number),  # noqa: B023
                line.decode("utf-8", "backslashreplace"),
            )
            if row is not None:
                rows.append(row)
    return rows


def _line(line: bytes, file: Path, number: int) -> Any:
    try:
        return strict_json.loads(line.decode("utf-8"), unique=True)
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
    row = Row(value, file, number)
    for field, item in row.values.items():
        kind = _foreign(item)
        if kind is not None:
            raise row.complain(f"holds {kind}, which JSON has nothing for; write it as text", field)
    return row


def _foreign(value: Any) -> str | None:
    """The type of something in a value that JSON doesn't have; None where there is none."""
    if isinstance(value, dict | list):
        parts = value if isinstance(value, list) else [*value.keys(), *value.values()]
        return next((kind for part in parts if (kind := _foreign(part)) is not None), None)
    return None if value is None or isinstance(value, str | int | float) else type(value).__name__


def _of_parquet(file: Path) -> list[Any]:
    from pyarrow import ArrowException, parquet

    try:
        table = parquet.read_table(file)
        values: list[Any] = table.to_pylist()
    except (ArrowException, OSError, ValueError, TypeError, OverflowError, MemoryError) as error:
        raise DataError(f"not a readable parquet file: {error}; fetch the file again", file=str(file)) from error
    kinds = {field.name: field.type for field in table.schema}
    return [{name: _of_arrow(value, kinds[name]) for name, value in row.items()} for row in values]


def _of_arrow(value: Any, kind: Any) -> Any:
    """A value of an Arrow column as JSON has it: a struct without the keys that are null, a map as an object."""
    from pyarrow import types

    if value is None:
        return None
    if types.is_struct(kind):
        parts = ((field.name, _of_arrow(value[field.name], field.type)) for field in kind)
        return {name: part for name, part in parts if part is not None}
    if types.is_map(kind):
        pairs = [(_of_arrow(key, kind.key_type), _of_arrow(item, kind.item_type)) for key, item in value]
        # a key that is there twice can't be put right here: the pairs stay a list, which the row's reader refuses
        return dict(pairs) if len({key for key, _ in pairs}) == len(pairs) else [list(pair) for pair in pairs]
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return [_of_arrow(item, kind.value_type) for item in value]
    if types.is_float32(kind):
        value = np.float32(value)
    return as_json(value)


def as_json(value: Any) -> Any:
    """A value without numpy's types, tuples, decimals and dates, which hold what JSON has other types for."""
    if isinstance(value, dict):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, np.float32 | np.float16):
        return float(str(value))
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and not value.ndim):
        return as_json(value.item())
    if isinstance(value, list | tuple | np.ndarray):
        return [as_json(item) for item in value]
    if isinstance(value, Decimal):
        return int(value) if value.is_finite() and value == value.to_integral_value() else float(value)
    return value.isoformat() if isinstance(value, date | time) else value


def number_text(value: float) -> str:
    """A number as a text that answers are compared with. A whole number is written without a point: tables make 6.0 of
    6.
    """
    return str(int(value)) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else str(value)


class Row:
    """One row with typed access; every complaint names file, row and field."""

    def __init__(self, values: dict[str, Any], file: str | Path, number: int):
        values = as_json(values)
        self.values, self.file, self.number = values, str(file), number

    def complain(self, message: str, field: str) -> DataError:
        return DataError(f"{message}; {_REPAIR}", file=self.file, line=self.number, field=field)

    def text(self, field: str, default: str | None = None) -> str:
        """A string; numbers are written out (:func:`number_text`). Null counts as absent."""
        value = self.values.get(field)
        return self.part(default if value is None else value, field)

    def part(self, value: Any, field: str) -> str:
        """:meth:`text` of a value that stands somewhere in ``field``."""
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise self.complain(f"expected text, found {_found(value)}", field)
        return value if isinstance(value, str) else number_text(value)

    def json(self, field: str, kind: type) -> Any:
        """A value of ``kind``, as it is or as a JSON string of it (parquet files hold such strings)."""
        value = self.values.get(field)
        if isinstance(value, str):
            try:
                value = strict_json.loads(value, unique=True)
            except ValueError as error:
                raise self.complain(f"not valid JSON: {error}", field) from error
        if not isinstance(value, kind):
            raise self.complain(f"expected {_found(kind())}, found {_found(value)}", field)
        return value

    def mapping(self, field: str) -> dict[str, Any]:
        """:meth:`json` of an object whose keys belong to this row: those that are null are other rows' and left out."""
        return {key: item for key, item in self.json(field, dict).items() if item is not None}


def _found(value: Any) -> str:
    """The JSON name of a value's type."""
    if value is None:
        return "nothing (null or no such key)"
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)
