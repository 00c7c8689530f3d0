"""What the long fault tests count, one JSON line a test, for the table that ``make test-faults`` prints."""

from __future__ import annotations

import json
import os

VARIABLE = "PACT_FAULTS_TALLY"


def record(name: str, injected: int, survived: int, lost: int) -> None:
    """Append one line to the file that ``PACT_FAULTS_TALLY`` names; without the variable nothing is written.

    Args:
        name: of the kind of fault.
        injected: faults put in (inputs, kills, torn files).
        survived: those that were handled as promised.
        lost: work or rows lost that should not have been.
    """
    path = os.environ.get(VARIABLE)
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"name": name, "injected": injected, "survived": survived, "lost": lost}) + "\n")


def table(path: str) -> int:
    """Print what a run of the fault tests counted; the number of lost ones."""
    from rich.console import Console
    from rich.table import Table

    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    shown = Table("fault", "injected", "survived", "lost", title="Injected faults")
    total = {key: sum(row[key] for row in rows) for key in ("injected", "survived", "lost")}
    for row in [*sorted(rows, key=lambda row: str(row["name"])), {"name": "all", **total}]:
        shown.add_row(row["name"], *(f"{row[key]:,}" for key in ("injected", "survived", "lost")))
    Console(width=None).print(shown)
    return int(total["lost"])


if __name__ == "__main__":
    import sys

    raise SystemExit(1 if table(sys.argv[1]) else 0)
