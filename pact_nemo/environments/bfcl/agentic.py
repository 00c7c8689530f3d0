"""Tasks and sessions of BFCL's agentic categories.

Memory has three kinds. ``published`` is the benchmark: conversations in order, then questions. ``write`` and ``read``
are reduced to one episode each, for training. Scenarios, which are BFCL's chains, are the split groups of all three.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pact_nemo.environments.base import Task, ToolCall
from pact_nemo.environments.bfcl.agentic_data import MEMORY_CATEGORIES, AgenticEntry, load_agentic
from pact_nemo.environments.bfcl.agentic_session import (
    AgenticSession,
    ConversationSession,
    MemorySession,
    WriteSession,
    contains_answer,
)
from pact_nemo.environments.bfcl.memory import (
    Memory,
    Snapshots,
    check_packages,
    fixed_snapshots,
    load_encoder,
    memory_text,
    with_instruction,
)
from pact_nemo.environments.bfcl.memory_facts import Fact, find_fact, is_sayable, keep_calls, read_calls, write_calls
from pact_nemo.environments.bfcl.settings import BFCLConfig
from pact_nemo.environments.bfcl.web_search import WebSearch
from pact_nemo.errors import DataError
from pact_nemo.runtime.quarantine import Quarantine

#: (all tools, calls that need some of them, task id) -> the tools that are offered
Offer = Callable[[Sequence[dict[str, Any]], Sequence[ToolCall], str], tuple[dict[str, Any], ...]]


TRAINING = ("write", "read")


class Agentic:
    """The agentic categories of one environment.

    Args:
        settings: of the environment.
        max_observation_chars: longer observations are cut for the policy. None: no limit.
        quarantine: takes bad rows.
        folder: where an evaluation keeps snapshots; None: in a temporary one.
        offer: which tools a training task offers.

    Raises:
        ConfigError: what a category needs is not on this disk, or no key is set.
        MissingDependency: a package is not installed.
    """

    def __init__(
        self,
        settings: BFCLConfig,
        max_observation_chars: int | None,
        quarantine: Quarantine,
        folder: Path | None,
        offer: Offer,
    ):
        self._settings, self._limit, self._quarantine, self._offer = settings, max_observation_chars, quarantine, offer
        self._folder = folder
        self._snapshots: Snapshots | None = None
        self._web: WebSearch | None = None
        memory = [category for category in settings.agentic if category in MEMORY_CATEGORIES]
        if memory:
            check_packages()
        if "memory_vector" in memory and settings.encoder is not None:
            load_encoder(settings.encoder)
        if len(memory) < len(settings.agentic) and settings.web_search is not None:
            self._web = WebSearch(settings.web_search)

    def tasks(self, category: str) -> list[Task]:
        """All tasks of a category, each behind those that it builds on."""
        entries = load_agentic(category, self._quarantine)
        if category not in MEMORY_CATEGORIES:
            return [self._task(entry, entry.user_turns, "web") for entry in entries]
        if self._settings.memory == "published":
            return self._published(entries)
        conversations = [entry for entry in entries if entry.is_conversation]
        facts = [
            fact
            for entry in entries
            if not entry.is_conversation
            and (fact := find_fact(entry, [held for held in conversations if held.chain == entry.chain])) is not None
        ]
        if self._settings.memory == "write":
            return self._write(conversations, facts)
        return self._read(category, entries, facts)

    def _task(
        self,
        entry: AgenticEntry,
        user_turns: tuple[tuple[dict[str, str], ...], ...],
        kind: str,
        calls: tuple[tuple[ToolCall, ...], ...] | None = None,
        **data: Any,
    ) -> Task:
        needed = [call for turn in calls or () for call in turn]
        return Task(
            id=entry.id,
            group=entry.chain,
            category=f"{entry.category.removesuffix('_prereq')}_{kind}" if kind in TRAINING else entry.category,
            user_turns=user_turns,
            tools=entry.tools if calls is None else self._offer(entry.tools, needed, entry.id),
            reference_calls=calls if calls is not None else tuple(() for _ in user_turns),
            reference_answer=entry.answers[0] if entry.answers else None,
            data={"entry": entry, "kind": kind, **data},
            after=entry.after if kind in ("conversation", "question") else (),
            prepares=kind == "conversation",
        )

    def _published(self, entries: Sequence[AgenticEntry]) -> list[Task]:
        if self._snapshots is None:
            self._snapshots = Snapshots(self._folder)
            self._snapshots.open()
        return [
            self._task(entry, entry.user_turns, "conversation" if entry.is_conversation else "question")
            for entry in entries
        ]

    def _write(self, conversations: Sequence[AgenticEntry], facts: Sequence[Fact]) -> list[Task]:
        """One task a conversation whose user says at least one answer, from an empty memory."""
        tasks = []
        for entry in conversations:
            said = [fact for fact in facts if fact.conversation.id == entry.id and is_sayable(fact)]
            if said:
                turns = (tuple(with_instruction(entry, _shown(entry, None))), *entry.user_turns[1:])
                targets = tuple(fact.question for fact in said)
                tasks.append(self._task(entry, turns, "write", write_calls(said, entry), targets=targets, before=None))
        return tasks

    def _read(self, category: str, entries: Sequence[AgenticEntry], facts: Sequence[Fact]) -> list[Task]:
        """One task a question whose answer is in the memory that its chain is given."""
        ends = {entry.chain: entry for entry in entries if entry.is_conversation}
        if self._settings.memory_snapshots is not None:
            ids = {chain: entry.id for chain, entry in ends.items()}
            given = fixed_snapshots(self._settings.memory_snapshots, category, ids)
            shown = {chain: _shown(end, given[chain]) for chain, end in ends.items()}
            return [
                self._read_task(entry, given[entry.chain], shown[entry.chain], ())
                for entry in entries
                if not entry.is_conversation
                and contains_answer(memory_text(given[entry.chain], entry.backend), entry.answers)[0]
            ]
        tasks = []
        for chain, end in ends.items():
            said = [fact for fact in facts if fact.question.chain == chain]
            stored = keep_calls(said, end.backend)
            before = _filled(end, stored)
            prompt = _shown(end, before)
            tasks += [
                self._read_task(fact.question, before, prompt, read_calls(fact, stored))
                for fact in said
                if is_sayable(fact)
            ]
        return tasks

    def _read_task(self, entry: AgenticEntry, before: str, shown: str, calls: tuple[ToolCall, ...]) -> Task:
        return self._task(entry, (tuple(with_instruction(entry, shown)),), "read", (calls,), before=before)

    def start(self, task: Task) -> AgenticSession:
        """A new episode of ``task``.

        Raises:
            EnvironmentFailure: a conversation that it builds on left no memory, or BFCL broke.
        """
        kind, entry = task.data["kind"], task.data["entry"]
        if kind == "web":
            assert self._web is not None
            return self._web.start(task, entry, self._limit)
        if kind in TRAINING:
            made = WriteSession if kind == "write" else MemorySession
            return made(task, task.data["before"], self._limit)
        assert self._snapshots is not None
        if kind == "conversation":
            self._snapshots.drop(entry.id)  # first of all: what an earlier attempt left must not outlive a failure here
        before = self._snapshots.read(entry.after[-1], entry.id) if entry.after else None
        if kind == "conversation":
            return ConversationSession(task, before, self._limit, self._snapshots)
        return MemorySession(task, before, self._limit)

    def close(self) -> None:
        """Give the folder back; safe to call twice."""
        if self._snapshots is not None:
            self._snapshots.close()


def _with_memory(entry: AgenticEntry, before: str | None, use: Callable[[Memory], Any]) -> Any:
    memory = Memory(entry, before)
    try:
        return use(memory)
    finally:
        memory.close()


def _shown(entry: AgenticEntry, before: str | None) -> str:
    return str(_with_memory(entry, before, Memory.shown))


def _filled(entry: AgenticEntry, calls: Sequence[ToolCall]) -> str:
    """The snapshot of an empty memory after ``calls``."""
    return str(_with_memory(entry, None, partial(_fill, calls)))


def _fill(calls: Sequence[ToolCall], memory: Memory) -> str:
    from pact_nemo.environments.bfcl.session import run_calls

    observations, _ = run_calls(memory.backend, calls, {call.name for call in calls})
    wrong = next((text for text in observations if "error" in text.lower()), None)
    if wrong is not None:
        raise DataError(f"the reference memory of {memory.entry.chain} can't be made: {wrong}; reinstall bfcl-eval")
    return memory.save()
