"""ToolHop (arXiv 2501.02506): multi-hop questions with locally executed functions, judged by the final answer.

Scenarios as the benchmark defines them: ``direct`` (no tools), ``mandatory`` (tools must be used for every step),
``free`` (tools may be used).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from pact_nemo.environments.answers import contains_answer, in_order, says_nothing, visible
from pact_nemo.environments.base import Goal, Outcome, Task
from pact_nemo.environments.python_tools import (
    defined_functions,
    first_function,
    python_name,
    tool_schemas,
)
from pact_nemo.environments.rows import Row, read_tasks
from pact_nemo.environments.sessions import SourceSession, call_counts
from pact_nemo.environments.spec import EnvironmentConfig, EnvironmentSpec, Setup
from pact_nemo.errors import ConfigError
from pact_nemo.runtime.quarantine import Quarantine
from pact_nemo.sandbox import Sandbox

log = logging.getLogger(__name__)
Scenario = Literal["direct", "mandatory", "free"]
SCENARIOS: tuple[Scenario, ...] = ("direct", "mandatory", "free")


@dataclass
class ToolHopConfig(EnvironmentConfig):
    """What only ToolHop reads of the settings."""

    scenario: str = "mandatory"  #: "direct", "mandatory" or "free"

    def validate(self) -> None:
        """See :class:`~pact_nemo.environments.spec.EnvironmentConfig`."""
        if self.scenario not in SCENARIOS:
            raise ConfigError(f"environment_config.scenario={self.scenario!r}: must be one of {', '.join(SCENARIOS)}")


_WITH_TOOLS = "You will be asked a question with some tools, and should provide a short final answer.\n"
_FINAL_ANSWER = (
    "If the final answer is a date, format is as follows: YYYY-MM-DD (ISO standard)\n"
    "If the final nswer is a name, format it as follows: Firstname Lastname\n"  # so it is written
    "If the final answer contains any number, format it as a number, not a word, and only output that number. Do not"
    " include leading 0s.\n\n"
    "Please provide the final answer in the following format: <answer>final answer here</answer>\n"
    "Answer as short as possible.\nQuestion: "
)
#: the user message before the question, to the letter as the benchmark's evaluation script has it (ByteDance,
#: Apache-2.0)
INSTRUCTIONS: dict[Scenario, str] = {
    "direct": (
        "You will be asked a question, and should provide a short answer.\nIf the answer is a date, format is as"
        " follows: YYYY-MM-DD (ISO standard)\nIf the answer is a name, format it as follows: Firstname Lastname\nIf the"
        " answer contains any number, format it as a number, not a word, and only output that number. Do not include"
        " leading 0s.\n\nPlease provide the answer in the following format: <answer>your answer here</answer>\nAnswer"
        " as short as possible.\nQuestion: "
    ),
    "mandatory": (
        _WITH_TOOLS + "Please note that you must call the tool at every step, you must not use your own knowledge. "
        "Your final answer must also be returned from the tool.\n" + _FINAL_ANSWER
    ),
    "free": _WITH_TOOLS + _FINAL_ANSWER,
}
#: assistant turns that the benchmark's evaluation script allows (its ``max_turns``), the answer among them
OFFICIAL_TURNS = 9


def _sources(functions: list[str]) -> dict[str, str]:
    """The source that runs for each function name. Of several the last one, as in the benchmark's evaluation script;
    helpers of other sources stand in where no source begins with the name."""
    helpers = {name: source for source in reversed(functions) for name in defined_functions(source)}
    return helpers | {first_function(source): source for source in functions}


def _oddity(schemas: list[dict[str, Any]], functions: list[str], sources: dict[str, str]) -> str | None:
    """What a row's tools leave open, if anything."""
    names = [schema["name"] for schema in schemas]
    for name in dict.fromkeys(names):
        if python_name(name) not in sources:
            return f"no source for the tool {name!r}; its calls bring an error"
        if (
            names.count(name) > 1
            or len({source for source in functions if first_function(source) == python_name(name)}) > 1
        ):
            return f"more than one tool {name!r}; calls of it run the last source"
    return None


@dataclass(frozen=True)
class ToolHopEnvironment:
    """The tasks of one ToolHop file.

    Attributes:
        path: the published ``.json`` list, or ``.jsonl`` / ``.parquet`` of the same rows: question, answer, sub_task,
            tools, functions.
        sandbox: where the functions run.
        settings: the scenario.
        max_observation_chars: longer observations are cut for the policy. None: no limit.
        quarantine: takes bad rows; as it comes, the first one is refused.
    """

    path: str | Path
    sandbox: Sandbox
    settings: ToolHopConfig = field(default_factory=ToolHopConfig)
    max_observation_chars: int | None = None
    quarantine: Quarantine = field(default_factory=Quarantine, repr=False, compare=False)
    _tasks: list[Task] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.settings.validate()

    def tasks(self) -> list[Task]:
        """All tasks in file order.

        Raises:
            DataError: the file is unusable, or a row is and the quarantine is strict; names file, row and field.
        """
        if not self._tasks:
            seen: dict[str, int] = {}
            self._tasks[:] = read_tasks(self.path, self.quarantine, lambda row: self._task(row, seen))
            odd = [str(task.data["odd"]) for task in self._tasks if task.data["odd"] is not None]
            if odd and self.settings.scenario != "direct":
                log.warning(
                    "%s: %d of %d rows run as published, with tools that aren't clear: %s",
                    self.path,
                    len(odd),
                    len(self._tasks),
                    odd[0],
                )
        return list(self._tasks)

    def _task(self, row: Row, seen: dict[str, int]) -> Task:
        question, answer = row.text("question"), row.text("answer")
        if says_nothing(answer):
            raise row.complain("the answer is empty, so any message would contain it", "answer")
        tools, functions, sub_task = row.mapping("tools"), row.json("functions", list), row.mapping("sub_task")
        for index, source in enumerate(functions):
            if not isinstance(source, str):
                raise row.complain(f"expected Python source, found {type(source).__name__}", f"functions[{index}]")
        sources = _sources(functions)
        schemas = tool_schemas(row, ((f"tools.{key}", tool) for key, tool in tools.items()), unique=False)
        tool_of = {str(key): schema["name"] for key, schema in zip(tools, schemas, strict=True)}
        schemas = [schema for index, schema in enumerate(schemas) if schema not in schemas[:index]]
        odd = _oddity(schemas, functions, sources)
        identifier = row.text("id", str(row.number - 1))
        name = identifier if identifier.startswith("toolhop") else f"toolhop_{identifier}"
        if name in seen:
            raise row.complain(f"row {seen[name]} has the id {name!r} already", "id")
        seen[name] = row.number
        return Task(
            id=name,
            group=name,
            category=f"{len(sub_task)} hops",
            user_turns=(
                ({"role": "user", "content": INSTRUCTIONS[cast(Scenario, self.settings.scenario)] + question},),
            ),
            tools=tuple(schemas) if self.settings.scenario != "direct" else (),
            reference_calls=((),),
            reference_answer=answer,
            data={
                "functions": {
                    name: sources[python_name(name)]
                    for name in (schema["name"] for schema in schemas)
                    if python_name(name) in sources
                },
                "sub_task": {str(key): row.part(value, f"sub_task.{key}") for key, value in sub_task.items()},
                "tool_of": tool_of,
                "odd": odd if odd is None else f"row {row.number}: {odd}",
            },
            tags=(f"answer type: {row.text('answer_type', 'unknown')}",),
        )

    def close(self) -> None:
        """Stop the sandbox."""
        self.sandbox.close()

    def start(self, task: Task) -> ToolHopSession:
        if "functions" not in task.data:
            raise ConfigError(f"task {task.id} is not a ToolHop task")
        offered = {tool["name"] for tool in task.tools}
        sources = {name: source for name, source in task.data["functions"].items() if name in offered}
        return ToolHopSession(task, self.sandbox, sources, self.max_observation_chars)

    def goals(self, task: Task) -> list[Goal]:
        """The sub-questions, one whose words contain another's answer after it, and the tool that each names."""
        answers, tool_of, sources = task.data["sub_task"], task.data["tool_of"], task.data["functions"]
        return [
            Goal(question, tool_of.get(question, ""), answers[question], sources.get(tool_of.get(question, "")))
            for question in in_order(answers)
        ]


class ToolHopSession(SourceSession):
    """One episode: one question, any number of calls, the final message is the answer."""

    _message: str | None = None

    def next_user_turn(self, message: str = "") -> tuple[list[dict[str, str]], list[dict[str, Any]]] | None:
        """There is one user turn; ``message``, without its thought, is the answer."""
        self._message = visible(message)
        return None

    def outcome(self) -> Outcome:
        """Answer correctness: the final message contains the reference answer, or it says something and the last
        observation contains it.

        A thought is no part of the message: what it weighs up is no answer.
        """
        answer = self.task.reference_answer or ""
        executed = self.executed
        correct, reason = False, "no final message"
        if self._message:
            correct = contains_answer(self._message, answer) or (
                bool(executed) and contains_answer(executed[-1].text, answer)
            )
            reason = "ok" if correct else "wrong answer"
        metrics = {"answer_correctness": float(correct), **call_counts(executed)}
        return Outcome(correct, float(correct), reason, metrics)


def _build(setup: Setup) -> ToolHopEnvironment:
    assert setup.path is not None  # the settings were checked
    return ToolHopEnvironment(
        setup.path, setup.sandbox(), setup.settings, setup.max_observation_chars, setup.quarantine
    )


TOOLHOP = EnvironmentSpec(
    build=_build,
    checked=False,
    config=ToolHopConfig,
    tasks_file="required",
    expert_traces="recorded",
    uses_sandbox=True,
    official_turns=lambda: OFFICIAL_TURNS,
    describe=lambda settings: f"scenario {settings.scenario}",
)
