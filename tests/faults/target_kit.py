"""What a target of the fuzzer is, what its refusals have to name, and what a run does with the tasks that it accepts.

A target goes on with what it accepted as a run would: renders prompts, encodes traces, writes rows back. So a row that
is half right and breaks something later counts as a crash too. A refusal has to be typed and to name file, place and
remedy.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from pact_nemo.chat.template import ChatFormat
from pact_nemo.chat.tool_formats import TOOL_FORMATS
from pact_nemo.environments.base import Task
from pact_nemo.errors import DataError, PactError
from pact_nemo.tracking.episodes import task_view
from tests.fixtures.chat_models import chat_format

REMEDY = re.compile(
    r"\b(?:repair|make|fetch|save|set|dump|reinstall|export|resume|delete|remove|choose|one of|take|give|can be"
    r" read|change|known|must|need)",
    re.I,
)


@dataclass(frozen=True)
class Target:
    """Something to fuzz.

    Attributes:
        make: from an empty folder: the function to call, and its valid inputs.
        modules: whose lines guide the search.
        refusals: errors that may refuse an input.
        long: inputs of the long run.
        hang_s: an input that takes longer counts as one that hangs.
    """

    make: Callable[[Path], tuple[Callable[[bytes], None], list[bytes]]]
    modules: Sequence[ModuleType]
    refusals: tuple[type[Exception], ...]
    long: int = 10_000
    hang_s: float = 10.0


class Unnamed(AssertionError):
    """A refusal that doesn't say where or what to do."""


def named(error: PactError, path: Path | str, *, line: bool = False) -> None:
    """Raises Unnamed where an error names no file, no row (if it has one) or no remedy."""
    text = str(error)
    if Path(path).name not in text or not REMEDY.search(text.partition(Path(path).name)[2]):
        raise Unnamed(f"names no file or no remedy: {text!r}") from error
    if isinstance(error, DataError) and (error.file is None or line and error.line is None):
        raise Unnamed(f"names no row: {text!r}") from error


def json_lines(*values: Any) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


@cache
def cached_chat(kind: str = "smollm/pythonic") -> ChatFormat:
    return chat_format(kind)


def show(task: Task) -> None:
    """What a run does with a task before its first episode: prompts in every tool format, and its rows of the run
    folder.
    """
    for form in TOOL_FORMATS.values():
        form.render_tools(task.tools)
        form.parse("[f(1)]", task.tools)
    cached_chat().prompt_ids(list(task.user_turns[0]), list(task.tools))
    json.dumps(task_view(task), ensure_ascii=False, allow_nan=False).encode("utf-8")
