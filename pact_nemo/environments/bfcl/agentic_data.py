"""Reading BFCL's agentic categories: the conversations and questions of the memory categories, and web search.

Ids, order, dependencies and prompts are those of ``bfcl_eval.utils.load_dataset_entry`` (a test compares them item by
item). The files are read here because that function takes locks inside the installed package.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pact_nemo.environments.bfcl.data import _REMEDY, _is_message, _read_rows, data_dir, function_documents
from pact_nemo.errors import DataError
from pact_nemo.runtime.quarantine import BadRow, Quarantine

MEMORY_CATEGORIES = ("memory_kv", "memory_rec_sum", "memory_vector")
WEB_CATEGORIES = ("web_search_base", "web_search_no_snippet")
AGENTIC_CATEGORIES = MEMORY_CATEGORIES + WEB_CATEGORIES
_SHIPPED_ID = re.compile(r"(memory(_prereq)?_\d+-\w+-\d+|web_search_\d+)")


@dataclass(frozen=True)
class AgenticEntry:
    """One conversation or question of an agentic category.

    Attributes:
        id, category: the benchmark's own, e.g. ``memory_kv_0-customer-0`` of ``memory_kv`` and
            ``memory_kv_prereq_0-customer-0`` of ``memory_kv_prereq``.
        chain: the scenario whose conversations and questions belong together; of web search, the question's number. The
            categories share it.
        backend: name of the backend class.
        user_turns: chat messages of each user turn as the package writes them, without the memory's instruction.
        tools: schemas offered.
        after: ids of the conversations that were held before, in order.
        answers: texts one of which the final message has to contain; empty for a conversation.
        source: where the user says the answer, in the package's words; empty where it doesn't tell.
    """

    id: str
    category: str
    chain: str
    backend: str
    user_turns: tuple[tuple[dict[str, str], ...], ...]
    tools: tuple[dict[str, Any], ...]
    after: tuple[str, ...]
    answers: tuple[str, ...]
    source: str

    @property
    def is_conversation(self) -> bool:
        """Whether it is held for the questions that follow, and has no answer of its own."""
        return self.category.endswith("_prereq")


def _row_fault(record: dict[str, Any], scenarios: tuple[str, ...] | None) -> tuple[str, str] | None:
    """(field, what is wrong with it) or None."""
    if not isinstance(record.get("id"), str) or _SHIPPED_ID.fullmatch(record["id"]) is None:
        return "id", "expected an id such as memory_0-customer-0"
    turns = record.get("question")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, list) and turn for turn in turns):
        return "question", "expected a list of user turns"
    if not all(_is_message(message) for turn in turns for message in turn):
        return "question", "expected messages with role and content"
    if scenarios is not None and record.get("scenario") not in scenarios:
        return "scenario", f"expected one of {', '.join(scenarios)}"
    return None


def _records(path: Path, found: Quarantine, scenarios: tuple[str, ...] | None) -> list[tuple[int, dict[str, Any]]]:
    def checked(record: dict[str, Any], line: int) -> dict[str, Any]:
        fault = _row_fault(record, scenarios)
        if fault is not None:
            raise DataError(f"{fault[1]}; {_REMEDY}", file=str(path), line=line, field=fault[0])
        return record

    rows = []
    for line, record in _read_rows(path, found):
        if found.parse(lambda: checked(record, line), record) is not None:  # noqa: B023 - called at once
            rows.append((line, record))
    return rows


def _turns(record: dict[str, Any], system: str = "") -> tuple[tuple[dict[str, str], ...], ...]:
    turns = [tuple({"role": row["role"], "content": row["content"]} for row in turn) for turn in record["question"]]
    if system:
        turns[0] = ({"role": "system", "content": system}, *turns[0])
    return tuple(turns)


def _answers(file_name: str, found: Quarantine) -> dict[str, tuple[tuple[str, ...], str]]:
    """id -> (answers, source)."""
    path = data_dir() / "possible_answer" / file_name

    def checked(row: dict[str, Any], line: int) -> tuple[tuple[str, ...], str]:
        texts = row.get("ground_truth")
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
            raise DataError(f"expected a list of texts; {_REMEDY}", file=str(path), line=line, field="ground_truth")
        source = row.get("source")
        return tuple(texts), source if isinstance(source, str) else ""

    result = {}
    for line, row in _read_rows(path, found):
        made = found.parse(lambda: checked(row, line), row)  # noqa: B023 - called at once
        if made is not None:
            result[str(row.get("id"))] = made
    return result


def _conversations(category: str, scenario: str, found: Quarantine) -> list[AgenticEntry]:
    backend = f"MemoryAPI_{category.removeprefix('memory_')}"
    path = data_dir() / "memory_prereq_conversation" / f"memory_{scenario}.json"
    entries: list[AgenticEntry] = []
    for _, record in _records(path, found, (scenario,)):
        entries.append(
            AgenticEntry(
                id=record["id"].replace("memory", category),
                category=f"{category}_prereq",
                chain=scenario,
                backend=backend,
                user_turns=_turns(record),
                tools=function_documents()[backend],
                after=tuple(entry.id for entry in entries),
                answers=(),
                source="",
            )
        )
    return entries


def _questions(
    category: str, backend: str, conversations: dict[str, list[AgenticEntry]], found: Quarantine
) -> list[AgenticEntry]:
    from bfcl_eval.constants.default_prompts import ADDITIONAL_SYSTEM_PROMPT_FOR_AGENTIC_RESPONSE_FORMAT

    memory = category in MEMORY_CATEGORIES
    shipped = "memory" if memory else "web_search"
    file_name = f"BFCL_v4_{shipped}.json"
    path, answers = data_dir() / file_name, _answers(file_name, found)
    entries = []
    for line, record in _records(path, found, tuple(conversations) if memory else None):
        if record["id"] not in answers:
            error = DataError(f"{record['id']!r} has no answer; {_REMEDY}", file=str(path), line=line, field="id")
            found.add(error, record)
            continue
        texts, source = answers[record["id"]]
        entries.append(
            AgenticEntry(
                id=record["id"].replace(shipped, category),
                category=category,
                chain=record["scenario"] if memory else record["id"],
                backend=backend,
                user_turns=_turns(record, ADDITIONAL_SYSTEM_PROMPT_FOR_AGENTIC_RESPONSE_FORMAT),
                tools=function_documents()[backend],
                after=tuple(entry.id for entry in conversations[record["scenario"]]) if memory else (),
                answers=texts,
                source=source,
            )
        )
    return entries


def load_agentic(category: str, quarantine: Quarantine | None = None) -> tuple[AgenticEntry, ...]:
    """All entries of an agentic category: conversations first, by their place in the chain, then questions.

    Args:
        category: one of :data:`AGENTIC_CATEGORIES`.
        quarantine: takes rows that are not as expected; None: the first one is refused.

    Raises:
        DataError: names file, line and field of a refused row.
        MissingDependency: ``bfcl-eval`` is not installed.
    """
    entries, bad = _load(data_dir(), category)
    quarantine = quarantine if quarantine is not None else Quarantine()
    for row in bad:
        quarantine.add(row.error, row.raw)
    return entries


@lru_cache(maxsize=len(AGENTIC_CATEGORIES))
def _load(folder: Path, category: str) -> tuple[tuple[AgenticEntry, ...], tuple[BadRow, ...]]:
    from bfcl_eval.constants.category_mapping import MEMORY_SCENARIO_NAME

    found = Quarantine("quarantine")
    if category in WEB_CATEGORIES:
        return tuple(_questions(category, "WebSearchAPI", {}, found)), tuple(found.rows)
    conversations = {scenario: _conversations(category, scenario, found) for scenario in MEMORY_SCENARIO_NAME}
    held = sorted((entry for chain in conversations.values() for entry in chain), key=lambda entry: len(entry.after))
    backend = f"MemoryAPI_{category.removeprefix('memory_')}"
    return (*held, *_questions(category, backend, conversations, found)), tuple(found.rows)
