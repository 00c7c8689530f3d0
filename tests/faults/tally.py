"""One JSON line per finished fault test, for the summary table of a long run; nothing where PACT_FAULTS_TALLY names no file."""

from __future__ import annotations

import json
import os


def record(name: str, *, injected: int, survived: int, lost: int) -> None:
    """Append what a test injected, how much of it was survived, and how much was lost (work that had to be done again)."""
    path = os.environ.get("PACT_FAULTS_TALLY")
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"name": name, "injected": injected, "survived": survived, "lost": lost}) + "\n")
