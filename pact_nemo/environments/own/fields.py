"""Fields of rows under names of the user's own: ``agent.fields`` of tasks and ``traces.fields`` of conversations, our
name -> theirs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pact_nemo.environments.rows import Row
from pact_nemo.errors import ConfigError


def mapped(values: Mapping[str, Any], fields: Mapping[str, str]) -> dict[str, Any]:
    """A row with our names of its fields; the others stay."""
    others = {key: value for key, value in values.items() if key not in fields.values()}
    return others | {our: values[their] for our, their in fields.items() if their in values}


def check_mapped(rows: Sequence[Row], fields: Mapping[str, str], setting: str, told: Collection[str] = ()) -> None:
    """Refuse a field that is taken from a name which no row has: a misspelt one would be ignored.

    Args:
        setting: that maps the names.
        told: our names of which each row tells itself.

    Raises:
        ConfigError: names the setting, both names and what there is.
    """
    for our, their in fields.items():
        if our not in told and rows and all(their not in row.values for row in rows):
            names = ", ".join(sorted({key for row in rows[:20] for key in row.values}))
            raise ConfigError(
                f"{setting} takes {our!r} from {their!r}, which no row of {rows[0].file} has; they have {names}"
            )


def one_of_both(row: Row, fields: Mapping[str, str], setting: str) -> None:
    """Raises DataError for a row that has a field under our name and under the name that it is taken from."""
    for our, their in fields.items():
        if our not in fields.values() and {our, their} <= row.values.keys():
            raise row.complain(f"{setting} takes {our!r} from {their!r}, and the row has both; take one out", our)
