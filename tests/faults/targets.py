"""What is fuzzed: every loader and parser, with valid inputs, the modules that guide the search, and the errors that
may refuse an input.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tests.faults.target_kit import Target
from tests.faults.targets_chat import chat_targets
from tests.faults.targets_files import file_targets
from tests.faults.targets_rows import row_targets


def targets() -> dict[str, Target]:
    """All of them by name."""
    return {**row_targets(), **chat_targets(), **file_targets()}


def scratch(tmp: Path) -> Path:
    """A folder in memory where there is one: a target writes a file an input."""
    memory = Path("/dev/shm")
    if memory.is_dir() and os.access(memory, os.W_OK):
        folder = memory / f"pact-fuzz-{os.getpid()}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder
    return tmp
