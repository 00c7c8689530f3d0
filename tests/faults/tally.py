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
