"""``environment=own``: the user's own tools, tasks and conversations."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pact_nemo.environments.base import Task, ToolCall
from pact_nemo.environments.own.conversations import ConversationLike, Conversations, first_of_each
from pact_nemo.environments.own.fields import check_mapped, mapped
from pact_nemo.environments.own.hosts import ToolHost
from pact_nemo.environments.own.judge import EndpointJudge
from pact_nemo.environments.own.mcp_tools import MCPHost
from pact_nemo.environments.own.names import Aliases
from pact_nemo.environments.own.session import ExpectedState, Judge, OwnSession, Simulated, state_after
from pact_nemo.environments.own.settings import FIELDS, ONE_OF_THEM, OwnConfig
from pact_nemo.environments.own.tasks import TaskReader
from pact_nemo.environments.own.user import EndpointUser
from pact_nemo.environments.own.workers import ClassHost
from pact_nemo.environments.rows import Row, read_rows
from pact_nemo.environments.spec import EnvironmentSpec, Setup
from pact_nemo.errors import ConfigError, DataError, EnvironmentFailure


class OwnEnvironment:
    """Tasks from ``tasks.path``, from conversations (``traces.path``), or from both; tools of the user's own.

    With both, a conversation belongs to the task that it names, or to the one that begins with its words. Its calls
    are that task's reference calls, where the row has none.

    Raises:
        ConfigError: there is neither, or the tools can't be had.
        DataError: there is no ``tasks.path``, and ``traces.path`` is no file of conversations.
    """

    def __init__(self, setup: Setup):
        self.settings: OwnConfig = setup.settings
        self.settings.validate()
        if self.settings.tools is None and not self.settings.mcp.command:
            raise ConfigError(f"environment=own: no tools; {ONE_OF_THEM}")
        if setup.path is None and setup.conversations() is None:
            setup.refuse_conversations()
            raise ConfigError(
                "environment=own: no tasks; give tasks.path=tasks.jsonl, or traces.path=conversations.jsonl, whose"
                " requests are the tasks then"
            )
        self._setup = setup
        self._states: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._read: list[Task] | None = None
        self._system = _system(self.settings.system)
        self._endpoint = EndpointJudge(self.settings.judge) if self.settings.judge.url is not None else None
        self._user = EndpointUser(self.settings.user) if self.settings.simulated else None

    @cached_property
    def host(self) -> ToolHost:
        """What runs the tools; started when it is first used."""
        if self.settings.mcp.command:
            return MCPHost(self.settings.mcp, self.settings.workers, self._example())
        assert self.settings.tools is not None  # the settings were checked
        return ClassHost(self.settings.tools, self.settings)

    def _example(self) -> dict[str, Any] | None:
        """The first task's row, for a server whose start needs a task's values."""
        if self._setup.path is not None:
            rows = read_rows(self._setup.path, self._setup.quarantine)
            return mapped(rows[0].values, self.settings.fields) if rows else None
        told: Sequence[ConversationLike] = self._setup.conversations() or ()
        return {"info": dict(told[0].info)} if told else None

    @cached_property
    def aliases(self) -> Aliases:
        """Names of tools and arguments as the model sees them."""
        return Aliases(self.host.schemas, self._setup.python_names)

    @property
    def first_turn_only(self) -> bool:
        """Whether an episode ends with the request's turn, so that a conversation teaches no more than that."""
        return self.settings.user_turns == "first"

    def shown_call(self, call: ToolCall) -> ToolCall:
        """A call of a conversation as the model would write it."""
        return self.aliases.shown(call)

    def shown_names(self) -> dict[str, dict[str, Any]]:
        """What the model sees under another name: ``tools`` and ``arguments``, own name -> shown name."""
        return self.aliases.table()

    def beginning_of(self, task: Task) -> str:
        """What an episode of a task begins with, as a key: the messages, and what the row holds for the tools."""
        told = ("info", "user_instructions")
        own = {key: value for key, value in task.data["row"].items() if key not in FIELDS or key in told}
        return json.dumps([task.user_turns, own], sort_keys=True, default=str)

    def tasks(self) -> list[Task]:
        """All tasks in file order; read once.

        Raises:
            ConfigError: the tools can't be had, or a setting names what no tool or row has.
            DataError: a row is malformed and the quarantine is strict; names file, row and field.
        """
        with self._lock:
            if self._read is None:
                self._read = self._read_tasks()
        return list(self._read)

    def _read_tasks(self) -> list[Task]:
        quarantine = self._setup.quarantine
        judges = frozenset({"judge"}) if self._endpoint is not None else frozenset()
        instructed = self._user is not None and bool(self._user.instructions)
        self._check_read_only()
        reader = TaskReader(self.settings, self.aliases, self._system, self.host.offers | judges, instructed)
        told: Sequence[ConversationLike] = self._setup.conversations() or ()
        seen: dict[str, int] = {}

        def once(task: Task, row: Row) -> Task:
            if task.id in seen:
                raise row.complain(f"row {seen[task.id]} has the id {task.id!r} already", "id")
            seen[task.id] = row.number
            return task

        if self._setup.path is None:
            made = [
                quarantine.parse(lambda: reader.of_conversation(each), list(each.opening))  # noqa: B023 - called at once
                for each in first_of_each(told)
            ]
        else:
            found = Conversations(told)
            rows = read_rows(self._setup.path, quarantine)
            check_mapped(rows, self.settings.fields, "agent.fields")
            made = [quarantine.parse(lambda: once(reader.of_row(row, found), row), row.values) for row in rows]  # noqa: B023
        opened = [
            quarantine.parse(lambda: self._opened(task), task.data["row"])  # noqa: B023 - called at once
            for task in made
            if task is not None
        ]
        return [task for task in opened if task is not None]

    def _check_read_only(self) -> None:
        """Raises ConfigError for a name in ``agent.read_only`` that no tool has: that tool's calls would stay."""
        there = self.aliases.own_names
        unknown = next((name for name in self.settings.read_only if name not in there), None)
        if unknown is not None:
            raise ConfigError(f"agent.read_only names {unknown!r}; the tools are {', '.join(sorted(there))}")

    def _opened(self, task: Task) -> Task:
        """A task with what the tools' ``reset()`` says, behind its first user message.

        Raises:
            DataError: the tools can't be opened for it.
        """
        if "opening" not in self.host.offers:
            return task
        try:
            tools = self.host.open(task.data["row"])
        except EnvironmentFailure as error:
            raise DataError(f"the tools can't be opened for it: {error}", file=self._setup.path) from error
        try:
            text = tools.opening
        finally:
            tools.close()
        if not text:
            return task
        *before, last = task.user_turns[0]
        opening = (*before, {**last, "content": f"{last['content']}\n{text}"})
        return replace(task, user_turns=(opening, *task.user_turns[1:]))

    def start(self, task: Task) -> OwnSession:
        """A new episode of ``task``, with tools of its own; close it when done.

        Raises:
            EnvironmentFailure: they can't be started.
        """
        return self._session(task, None)

    def start_scripted(self, task: Task, later: Sequence[Sequence[dict[str, str]]]) -> OwnSession:
        """See :func:`~pact_nemo.environments.sessions.start_scripted`."""
        return self._session(task, later)

    def _session(self, task: Task, script: Sequence[Sequence[dict[str, str]]] | None) -> OwnSession:
        scored = "score" in self.host.offers
        by_state = "state" in self.host.offers and any(task.data["expected"]) and not task.data["answers"]
        judge = Judge(
            self.settings,
            scored,
            # found before this episode has tools: with all workers in use, episodes would wait for each other
            ExpectedState(self._expected_state(task)) if by_state and not scored else None,
            self._endpoint.score if self._endpoint is not None else None,
        )
        told = task.data["row"].get("user_instructions") or ""
        user = Simulated(self._user, told, script) if self._user is not None else None
        tools = self.host.open(task.data["row"])
        return OwnSession(task, tools, self.aliases, judge, self._setup.max_observation_chars, user)

    def _expected_state(self, task: Task) -> Any:
        """The state that a task's expected calls lead to; found once a task."""
        if task.id not in self._states:
            state, error = state_after(self.host.open(task.data["row"]), task.data["expected"])
            if error is not None:
                raise EnvironmentFailure(f"{task.id}: an expected call fails in a fresh instance: {error}")
            self._states[task.id] = state
        return self._states[task.id]

    def close(self) -> None:
        """Stop what runs the tools; safe to call twice."""
        if "host" in self.__dict__:
            self.host.close()


def _system(path: str | None) -> str:
    if path is None:
        return ""
    try:
        return Path(path).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise ConfigError(f"agent.system={path}: can't be read: {error}; give a text file") from error


def _describe(settings: OwnConfig) -> str:
    tools = settings.tools if settings.tools is not None else " ".join(settings.mcp.command)
    user = f"; a user played by {settings.user.model}" if settings.simulated else ""
    return f"tools of {tools}; {settings.isolation} isolation; answers by {settings.answer}{user}"


OWN = EnvironmentSpec(
    build=OwnEnvironment,
    checked=False,
    config=OwnConfig,
    section="agent",
    tasks_file="optional",
    expert_traces="ground_truth",
    answer_remedy="let the requests or agent.system ask for it",
    describe=_describe,
)
