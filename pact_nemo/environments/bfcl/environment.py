"""BFCL. Multi-turn: whole episodes (``window="full"``) or one user turn at a time (``window="turn"``), judged by the
official checkers.

In the reduced form each task is one user turn t of an entry: earlier turns are replayed from the ground truth, the
prompt shows turn t only, and the official checker runs on turns 0…t with the ground truth standing in for what a model
would have done before t.

Two differences from BFCL's own harness, both stricter: a tool that the episode never offers is answered with an error
and not executed, and a call that would never end (:func:`~pact_nemo.environments.bfcl.backend.too_heavy`) is refused.
As in BFCL, ``excluded_function`` in the data has no effect, and a function that is only revealed in a later turn
already runs when it is called by name (one ground truth, ``multi_turn_miss_func_49``, does that).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pact_nemo.environments.base import Task, ToolCall
from pact_nemo.environments.bfcl.agentic import Agentic
from pact_nemo.environments.bfcl.agentic_data import AgenticEntry
from pact_nemo.environments.bfcl.agentic_session import AgenticSession
from pact_nemo.environments.bfcl.backend import Backend
from pact_nemo.environments.bfcl.data import Entry, load_category
from pact_nemo.environments.bfcl.leaderboard import write_score_files
from pact_nemo.environments.bfcl.session import BFCLSession, user_messages
from pact_nemo.environments.bfcl.settings import BFCLConfig, evaluation_only
from pact_nemo.environments.grounding import is_grounded
from pact_nemo.environments.spec import EnvironmentSpec, Setup
from pact_nemo.errors import DataError, EnvironmentFailure
from pact_nemo.runtime.quarantine import Quarantine


def official_turns() -> int:
    """Assistant turns after one user turn under bfcl-eval's ``MAXIMUM_STEP_LIMIT``: that many with calls, and one
    without that ends the turn.

    Its harness runs one step with calls more before it stops, and fails the entry then; so does the verdict here on
    what a limit cut.
    """
    from bfcl_eval.constants.default_prompts import MAXIMUM_STEP_LIMIT

    return int(MAXIMUM_STEP_LIMIT) + 1


def _later_tools(entry: Entry) -> tuple[dict[str, Any], ...]:
    return tuple(tool for tools in entry.revealed.values() for tool in tools)


@dataclass(frozen=True)
class BFCLEnvironment:
    """The tasks of some BFCL multi-turn categories.

    Attributes:
        settings: which tasks there are, and how they are judged.
        max_observation_chars: longer observations are cut for the policy; the checker sees them whole. None: no limit.
        seed: of the tools' choice and order.
        quarantine: takes bad rows; as it comes, the first one is refused.
        folder: where an evaluation keeps the memories of conversations; None: in a temporary one.

    Raises:
        ConfigError: a setting is wrong.
    """

    settings: BFCLConfig = field(default_factory=BFCLConfig)
    max_observation_chars: int | None = None
    seed: int = 0
    quarantine: Quarantine = field(default_factory=Quarantine, repr=False, compare=False)
    folder: Path | None = None
    _tasks: list[Task] = field(default_factory=list, init=False, repr=False, compare=False)
    _agentic: Agentic = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.settings.validate()
        parts = (self.settings, self.max_observation_chars, self.quarantine, self.folder, self._offered)
        object.__setattr__(self, "_agentic", Agentic(*parts))

    def tasks(self) -> list[Task]:
        """All tasks that pass the filters, in BFCL's order; made once."""
        if not self._tasks:
            agentic = self.settings.agentic
            self._tasks[:] = [
                task
                for category in self.settings.categories
                for task in (self._agentic.tasks(category) if category in agentic else self._multi_turn(category))
            ]
        return list(self._tasks)

    def _multi_turn(self, category: str) -> list[Task]:
        entries = load_category(category, self.quarantine)
        found = (self.quarantine.parse(lambda: self._tasks_of(entry), entry.record) for entry in entries)  # noqa: B023 - called at once
        return [task for tasks in found for task in tasks or ()]

    def close(self) -> None:
        """Give the folder back; nothing runs outside sessions."""
        self._agentic.close()

    def start(self, task: Task) -> BFCLSession | AgenticSession:
        """A new episode of ``task``; close it when done."""
        if isinstance(task.data.get("entry"), AgenticEntry):
            return self._agentic.start(task)
        return BFCLSession(task, self.settings, self.max_observation_chars)

    def _offered(
        self, pool: Sequence[dict[str, Any]], calls: Sequence[ToolCall], task_id: str
    ) -> tuple[dict[str, Any], ...]:
        if self.settings.max_tools is None:
            return tuple(pool)
        rng = random.Random(f"{self.seed}:{task_id}")
        needed_names = {call.name for call in calls}
        needed = [tool for tool in pool if tool["name"] in needed_names]
        others = [tool for tool in pool if tool["name"] not in needed_names]
        chosen = needed + rng.sample(others, min(len(others), max(0, self.settings.max_tools - len(needed))))
        rng.shuffle(chosen)
        return tuple(chosen)

    def _tasks_of(self, entry: Entry) -> list[Task]:
        try:
            return self._turn_tasks(entry) if self.settings.window == "turn" else [self._full_task(entry)]
        except EnvironmentFailure as error:  # making a task of one turn plays the turns before it
            raise DataError(
                f"{error}; reinstall bfcl-eval", file=f"BFCL_v4_{entry.category}.json", field="initial_config"
            ) from error

    def _full_task(self, entry: Entry) -> Task:
        turns = range(len(entry.ground_truth))
        calls = [call for turn in entry.reference_calls for call in turn]
        return Task(
            id=entry.id,
            group=entry.number,
            category=entry.category,
            user_turns=tuple(user_messages(entry, turn) for turn in turns),
            tools=self._offered(entry.tools, calls, entry.id),
            reference_calls=entry.reference_calls,
            data={"entry": entry, "first_turn": 0, "last_turn": len(turns) - 1},
            later_tools=_later_tools(entry),
        )

    def _turn_tasks(self, entry: Entry) -> list[Task]:
        tasks = []
        for turn, calls in enumerate(entry.reference_calls):
            if (
                not calls
                or turn in entry.revealed
                or (self.settings.max_calls is not None and len(calls) > self.settings.max_calls)
            ):
                continue
            messages = user_messages(entry, turn)
            words = "\n".join(message["content"] for message in messages)
            if self.settings.max_user_chars is not None and len(words) > self.settings.max_user_chars:
                continue
            if self.settings.grounded_only and not self._turn_is_grounded(entry, turn, words):
                continue
            if self._passes_idle(entry, turn):
                continue
            task_id = f"{entry.id}#{turn}"
            pool = [
                *entry.tools,
                *(tool for reveal, tools in entry.revealed.items() if reveal <= turn for tool in tools),
            ]
            tasks.append(
                Task(
                    id=task_id,
                    group=entry.number,
                    category=entry.category,
                    user_turns=(messages,),
                    tools=self._offered(pool, calls, task_id),
                    reference_calls=(calls,),
                    data={"entry": entry, "first_turn": turn, "last_turn": turn},
                    later_tools=_later_tools(entry),
                )
            )
        return tasks

    @staticmethod
    def _passes_idle(entry: Entry, turn: int) -> bool:
        """Whether the checker passes turn ``turn`` for a call that does nothing, because earlier turns gave the same
        results already: no task then.
        """
        steps: list[list[list[str]]] = [[list(earlier)] if earlier else [] for earlier in entry.ground_truth[:turn]]
        backend = Backend(entry)
        try:
            return backend.judge([*steps, [["no_such_function()"]]], turn + 1, irrelevance=False).success
        finally:
            backend.close()

    @staticmethod
    def _turn_is_grounded(entry: Entry, turn: int, words: str) -> bool:
        calls = entry.reference_calls[turn]
        defaults = {tool["name"]: tool["parameters"]["properties"] for tool in [*entry.tools, *_later_tools(entry)]}

        def grounded(call: ToolCall, text: str) -> bool:
            schema = defaults[call.name]
            stated = {
                key: value for key, value in call.arguments.items() if value != schema.get(key, {}).get("default")
            }
            return is_grounded(list(stated.values()), text)

        if len(calls) == 1 or not grounded(calls[0], words):
            return grounded(calls[0], words)
        backend = Backend(entry)
        try:
            for earlier in entry.ground_truth[:turn]:
                backend.execute(earlier)
            for text, call in zip(entry.ground_truth[turn], calls, strict=True):
                if not grounded(call, words):
                    return False
                words += "\n" + backend.execute([text])[0]
        finally:
            backend.close()
        return True


def _build(setup: Setup) -> BFCLEnvironment:
    return BFCLEnvironment(setup.settings, setup.max_observation_chars, setup.seed, setup.quarantine, setup.folder)


def _describe(settings: BFCLConfig) -> str:
    memory = f"; memory {settings.memory}" if settings.agentic else ""
    return f"{', '.join(settings.categories)}; window {settings.window}{memory}"


BFCL = EnvironmentSpec(
    build=_build,
    checked=False,
    config=BFCLConfig,
    tasks_file="none",
    expert_traces="ground_truth",
    reference_answers=False,
    official_turns=official_turns,
    describe=_describe,
    evaluation_only=evaluation_only,
    write_scores=write_score_files,
)
