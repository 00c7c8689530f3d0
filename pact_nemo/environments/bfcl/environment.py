"""BFCL multi-turn: whole episodes (``window="full"``) or one user turn at a time (``window="turn"``), judged by the
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
from typing import Any, Literal

from pact_nemo.environments.base import Outcome, Task, ToolCall
from pact_nemo.environments.bfcl.backend import Backend, protect_strings, too_heavy
from pact_nemo.environments.bfcl.data import CATEGORIES, Entry, load_category
from pact_nemo.environments.calls import call_text
from pact_nemo.environments.grounding import is_grounded
from pact_nemo.errors import ConfigError, DataError, EnvironmentFailure, ToolCallError
from pact_nemo.runtime.quarantine import Quarantine

Window = Literal["full", "turn"]
FORCE_TERMINATED = "multi_turn:force_terminated"


def official_turns() -> int:
    """Assistant turns after one user turn under bfcl-eval's ``MAXIMUM_STEP_LIMIT``: that many with calls, and one
    without that ends the turn.

    Its harness runs one step with calls more before it stops, and fails the entry then; so does the verdict here on
    what a limit cut.
    """
    from bfcl_eval.constants.default_prompts import MAXIMUM_STEP_LIMIT

    return int(MAXIMUM_STEP_LIMIT) + 1


def _new_functions_message() -> dict[str, str]:
    from bfcl_eval.constants.default_prompts import DEFAULT_USER_PROMPT_FOR_ADDITIONAL_FUNCTION_FC

    return {"role": "user", "content": DEFAULT_USER_PROMPT_FOR_ADDITIONAL_FUNCTION_FC}


def _user_messages(entry: Entry, turn: int) -> tuple[dict[str, str], ...]:
    if turn in entry.revealed:
        return (_new_functions_message(),)
    return tuple({"role": row["role"], "content": row["content"]} for row in entry.record["question"][turn])


@dataclass(frozen=True)
class BFCLEnvironment:
    """The tasks of some BFCL multi-turn categories.

    Attributes:
        categories: names out of :data:`~pact_nemo.environments.bfcl.data.CATEGORIES`.
        window: ``full`` episodes or single user turns (``turn``).
        max_tools: at most this many tools are offered: those that the ground truth needs and seeded others, in seeded
            order. None: all, in BFCL's order. Never fewer than the ground truth needs.
        max_calls: (turn) largest number of ground-truth calls. None: no limit.
        grounded_only: (turn) keep a turn only if each argument value that is neither a boolean nor the schema's default
            occurs in its user message or in the result of an earlier call of it.
        max_user_chars: (turn) longest user message. None: no limit.
        max_observation_chars: longer observations are cut for the policy; the checker sees them whole. None: no limit.
        irrelevance_check: also fail episodes that call a tool in a user turn whose ground truth is empty. BFCL's runner
            ships that check unused.
        judge_unfinished: give the checker episodes that stopped before the last user turn was closed. BFCL fails them
            outright.
        seed: of the tools' choice and order.
        quarantine: takes bad rows; as it comes, the first one is refused.

    Raises:
        ConfigError: an unknown category or window, or a limit below 1.
    """

    categories: Sequence[str] = CATEGORIES
    window: Window = "full"
    max_tools: int | None = None
    max_calls: int | None = 2
    grounded_only: bool = True
    max_user_chars: int | None = None
    max_observation_chars: int | None = None
    irrelevance_check: bool = False
    judge_unfinished: bool = False
    seed: int = 0
    quarantine: Quarantine = field(default_factory=Quarantine, repr=False, compare=False)
    _tasks: list[Task] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.categories, str) or not self.categories:
            raise ConfigError("categories must be a non-empty list of names")
        for category in self.categories:
            if category not in CATEGORIES:
                raise ConfigError(f"unknown BFCL category {category!r}; known: {', '.join(CATEGORIES)}")
        if self.window not in ("full", "turn"):
            raise ConfigError(f"window must be 'full' or 'turn', not {self.window!r}")
        for name in ("max_tools", "max_calls", "max_user_chars", "max_observation_chars"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1")

    def tasks(self) -> list[Task]:
        """All tasks that pass the filters, in BFCL's order; made once."""
        if not self._tasks:
            entries = [entry for category in self.categories for entry in load_category(category, self.quarantine)]
            found = (self.quarantine.guard(lambda: self._tasks_of(entry), entry.record) for entry in entries)  # noqa: B023 - called at once
            self._tasks[:] = [task for tasks in found for task in tasks or ()]
        return list(self._tasks)

    def close(self) -> None:
        """Nothing runs outside sessions."""

    def start(self, task: Task) -> BFCLSession:
        """A new episode of ``task``; close it when done."""
        return BFCLSession(self, task)

    # --- making tasks
    # --------------------------------------------------------------------------------------------------------------

    def _offered(
        self, pool: Sequence[dict[str, Any]], calls: Sequence[ToolCall], task_id: str
    ) -> tuple[dict[str, Any], ...]:
        if self.max_tools is None:
            return tuple(pool)
        rng = random.Random(f"{self.seed}:{task_id}")
        needed_names = {call.name for call in calls}
        needed = [tool for tool in pool if tool["name"] in needed_names]
        others = [tool for tool in pool if tool["name"] not in needed_names]
        chosen = needed + rng.sample(others, min(len(others), max(0, self.max_tools - len(needed))))
        rng.shuffle(chosen)
        return tuple(chosen)

    def _tasks_of(self, entry: Entry) -> list[Task]:
        try:
            return self._turn_tasks(entry) if self.window == "turn" else [self._full_task(entry)]
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
            user_turns=tuple(_user_messages(entry, turn) for turn in turns),
            tools=self._offered(entry.tools, calls, entry.id),
            reference_calls=entry.reference_calls,
            data={"entry": entry, "first_turn": 0, "last_turn": len(turns) - 1},
        )

    def _turn_tasks(self, entry: Entry) -> list[Task]:
        tasks = []
        for turn, calls in enumerate(entry.reference_calls):
            if not calls or turn in entry.revealed or (self.max_calls is not None and len(calls) > self.max_calls):
                continue
            messages = _user_messages(entry, turn)
            words = "\n".join(message["content"] for message in messages)
            if self.max_user_chars is not None and len(words) > self.max_user_chars:
                continue
            if self.grounded_only and not self._turn_is_grounded(entry, turn, words):
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
        defaults = {
            tool["name"]: tool["parameters"]["properties"]
            for tool in [*entry.tools, *(t for r in entry.revealed.values() for t in r)]
        }

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


class BFCLSession:
    """One episode. Sessions are independent of one another and may run in different threads; one session is for one
    thread at a time.

    Attributes:
        task: what is being solved.
        steps: executed call texts: user turns, assistant turns within, calls within; what the official checker gets.
    """

    def __init__(self, environment: BFCLEnvironment, task: Task):
        if "entry" not in task.data:
            raise ConfigError(f"task {task.id} is not a BFCL task")
        self.task = task
        self._environment = environment
        self._entry: Entry = task.data["entry"]
        self._turn: int = task.data["first_turn"]
        self._last: int = task.data["last_turn"]
        self._offered = {tool["name"] for tool in task.tools}
        later = range(self._turn + 1, self._last + 1)
        self._hidden = {tool["name"] for turn in later for tool in self._entry.revealed.get(turn, ())}
        self._finished = False
        self._closed = False
        self._backend = Backend(self._entry)
        self.steps: list[list[list[str]]] = []
        for earlier in self._entry.ground_truth[: self._turn]:
            self._backend.execute(earlier)
            self.steps.append([list(earlier)] if earlier else [])
        self.steps.append([])

    def execute(self, calls: list[ToolCall]) -> list[str]:
        """Run the calls of one assistant turn in order; one observation string each.

        A tool that the episode never offers, a call that can't be written as literals or one that would never end is
        answered with an error text and not executed; wrong arguments are executed and answered with BFCL's own error
        text.

        Raises:
            EnvironmentFailure: the session is closed or its last user turn is, or BFCL itself broke.
        """
        if self._closed or self._finished:
            raise EnvironmentFailure(f"{self.task.id}: a call after the episode's end")
        step: list[str] = []
        observations = []
        for call in calls:
            if call.name not in self._offered and call.name not in self._hidden:
                observations.append(
                    f"Error: unknown function {call.name!r}. Available: {', '.join(sorted(self._offered))}"
                )
                continue
            try:
                text = protect_strings(call_text(call))
                if too_heavy(call):
                    raise ToolCallError("a number in the call is too large")
            except ToolCallError as error:
                observations.append(f"Error: {error}")
                continue
            step.append(text)
            observations.append(self._backend.execute([text])[0])
        if step:
            self.steps[-1].append(step)
        limit = self._environment.max_observation_chars
        return [text if limit is None or len(text) <= limit else f"{text[:limit]} [cut]" for text in observations]

    def next_user_turn(self, message: str = "") -> tuple[list[dict[str, str]], list[dict[str, Any]]] | None:
        """Close the current user turn. Returns (messages, newly revealed tools) of the next one, or None when the task
        is over. BFCL's checkers don't read what the assistant says.
        """
        if self._turn >= self._last:
            self._finished = True
            return None
        self._turn += 1
        self.steps.append([])
        revealed = list(self._entry.revealed.get(self._turn, ()))
        self._offered |= {tool["name"] for tool in revealed}
        return [dict(message) for message in _user_messages(self._entry, self._turn)], revealed

    def outcome(self) -> Outcome:
        """Official verdict on everything executed so far; may be asked again.

        An episode whose last user turn was not closed fails with BFCL's ``multi_turn:force_terminated`` unless
        ``judge_unfinished`` is set.
        """
        if not self._finished and not self._environment.judge_unfinished:
            return Outcome(False, 0.0, FORCE_TERMINATED)
        missing: list[list[list[str]]] = [[] for _ in range(self._last + 1 - len(self.steps))]
        return self._backend.judge(self.steps + missing, self._last + 1, self._environment.irrelevance_check)

    def close(self) -> None:
        """Release all state; safe to call twice."""
        self._closed = True
        self._backend.close()
