"""FTRL: multi-hop questions whose sub-answers have to be brought in by tool calls, in the format published with
MatchTIR (arXiv 2601.10712).

A call solves a sub-question if its observation contains one of the answers still open for that tool; one call solves at
most one. With n sub-questions, p calls and q solved: Solve-R = q/n, Solve-P = q/p (1 if p = 0), Solve-F1 their harmonic
mean.

Training rows also carry ``ground_truth``, the reference calls of the matching reward, and a prompt that asks for the
final answer inside ``<answer></answer>`` only; the published test rows have neither.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pact_nemo.environments.answers import contains_answer, says_nothing
from pact_nemo.environments.base import Goal, Outcome, Task, ToolCall
from pact_nemo.environments.calls import check_call
from pact_nemo.environments.python_tools import (
    Executed,
    as_schema,
    defined_functions,
    python_name,
    tool_schemas,
)
from pact_nemo.environments.rows import Row, read_tasks
from pact_nemo.environments.sessions import SourceSession, call_counts
from pact_nemo.environments.spec import EnvironmentConfig, EnvironmentSpec, Setup
from pact_nemo.errors import ConfigError, ToolCallError
from pact_nemo.runtime.quarantine import Quarantine
from pact_nemo.sandbox import Sandbox

#: the rule as the published training prompts have it, before the question
ANSWER_RULE = (
    "Only output the final answer (in words, numbers or phrase) inside the <answer></answer> tag, without any"
    " explanations or extra information."
)
ANSWER_RULES = ("add", "as_written")
_QUESTION = "\nQuestion: "
#: assistant turns that the public evaluation allows (MatchTIR's ``max_turns``), the answer among them
OFFICIAL_TURNS = 10


@dataclass
class FTRLConfig(EnvironmentConfig):
    """What only FTRL reads of the settings."""

    #: prompts that don't ask for <answer></answer>: "add" the published rule, or leave them "as_written"
    answer_rule: str = "add"

    def validate(self) -> None:
        """See :class:`~pact_nemo.environments.spec.EnvironmentConfig`."""
        if self.answer_rule not in ANSWER_RULES:
            raise ConfigError(
                f"environment_config.answer_rule={self.answer_rule!r}: must be one of {', '.join(ANSWER_RULES)}"
            )


def with_answer_rule(content: str) -> str:
    """A prompt's text with :data:`ANSWER_RULE` where the published training prompts have it: before the question; else
    at the end.
    """
    before, question, after = content.partition(_QUESTION)
    return f"{before.rstrip()} {ANSWER_RULE}{question}{after}" if question else f"{content.rstrip()}\n{ANSWER_RULE}"


def reference_calls(row: Row, tools: dict[str, dict[str, Any]], field: str = "ground_truth") -> tuple[ToolCall, ...]:
    """The reference calls of a row, in order; none where the row has no such field, or null, or an empty list.

    Read are a JSON string and plain values; a list of ``{"name", "parameters"}``, one such object, or an object of two
    lists of the same length (what a sequence of objects becomes in some parquet writers). ``arguments`` stands for
    ``parameters`` too, and either may be a JSON string.

    Args:
        tools: the row's tools by name.

    Raises:
        DataError: another shape, or a tool that the row doesn't offer; names file, row and field.
    """
    value = row.values.get(field)
    if value is None:
        return ()
    value = row.json(field, object)
    if isinstance(value, dict):
        names, parameters = value.get("name"), value.get("parameters", value.get("arguments"))
        if isinstance(names, list) and isinstance(parameters, list):
            if len(names) != len(parameters):
                raise row.complain(f"{len(names)} names and {len(parameters)} parameters", field)
            value = [{"name": name, "parameters": given} for name, given in zip(names, parameters, strict=True)]
        else:
            value = [value]
    if not isinstance(value, list):
        raise row.complain(f"expected a list of calls, found {type(value).__name__}", field)
    return tuple(_reference_call(row, tools, call, f"{field}[{index}]") for index, call in enumerate(value))


def _reference_call(row: Row, tools: dict[str, dict[str, Any]], call: Any, field: str) -> ToolCall:
    if (
        not isinstance(call, dict)
        or not isinstance(call.get("name"), str)
        or not all(isinstance(key, str) for key in call)
    ):
        raise row.complain("expected an object with the name of a tool and its parameters", field)
    keys = [key for key in ("parameters", "arguments") if call.get(key) is not None]
    unknown = sorted(
        key for key, value in call.items() if key not in ("name", "parameters", "arguments") and value is not None
    )
    if len(keys) > 1 or unknown:
        raise row.complain(f"expected name and parameters, found {', '.join(sorted(call))}", field)
    if call["name"] not in tools:
        raise row.complain(f"the row offers no tool {call['name']!r}", f"{field}.name")
    if not keys:
        return ToolCall(call["name"], {})
    label = f"{field}.{keys[0]}"
    arguments = Row({label: call[keys[0]]}, row.file, row.number).json(label, dict)
    known = tools[call["name"]]["parameters"].get("properties", {})
    # a table of structs has the keys of every row; those that are another tool's are null here
    written = {
        key: as_schema(value, known.get(key)) for key, value in arguments.items() if value is not None or key in known
    }
    found = ToolCall(call["name"], written)
    try:
        check_call(found)
    except ToolCallError as error:
        raise row.complain(str(error), label) from error
    return found


def solve_metrics(solved: int, calls: int, questions: int) -> dict[str, float]:
    """Solve-P, Solve-R and Solve-F1 in [0, 1] of one episode."""
    precision = solved / calls if calls else 1.0
    recall = solved / questions if questions else 1.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0
    return {"solve_p": precision, "solve_r": recall, "solve_f1": f1}


def solved_calls(executed: list[Executed], unsolved: dict[str, list[str]]) -> list[bool]:
    """Whether each call, in the order they were made, solved a sub-question that was open."""
    remaining = {name: list(answers) for name, answers in unsolved.items()}
    solved = []
    for done in executed:
        answers = remaining.get(done.call.name, [])
        answer = next((answer for answer in answers if contains_answer(done.text, answer)), None)
        solved.append(answer is not None)
        if answer is not None:
            answers.remove(answer)
    return solved


@dataclass(frozen=True)
class FTRLEnvironment:
    """The tasks of one FTRL file.

    Attributes:
        path: ``.parquet``, ``.jsonl`` or ``.json`` with messages, tools, codes, unsolved_set, solve_rate, data_source,
            split, answer and, in training rows, ground_truth.
        sandbox: where the tools run.
        settings: whether prompts that don't ask for the final answer inside ``<answer></answer>`` are made to.
        max_observation_chars: longer observations are cut for the policy; scoring sees them whole. None: no limit.
        quarantine: takes bad rows; as it comes, the first one is refused.
    """

    path: str | Path
    sandbox: Sandbox
    settings: FTRLConfig = field(default_factory=FTRLConfig)
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
            stem = Path(self.path).stem
            self._tasks[:] = read_tasks(
                self.path, self.quarantine, lambda row: self._task(row, f"{stem}_{row.number - 1}")
            )
        return list(self._tasks)

    def _task(self, row: Row, name: str) -> Task:
        messages = row.json("messages", list)
        for index, message in enumerate(messages):
            if (
                not isinstance(message, dict)
                or not isinstance(message.get("content"), str)
                or message.get("role") not in ("system", "user")
            ):
                raise row.complain("a prompt message needs a role (system or user) and text", f"messages[{index}]")
        tools, codes, unsolved = row.json("tools", list), row.mapping("codes"), row.mapping("unsolved_set")
        if not any(message["role"] == "user" and message["content"].strip() for message in messages):
            raise row.complain("a prompt needs a user's message with text", "messages")
        schemas = tool_schemas(row, ((f"tools[{index}]", tool) for index, tool in enumerate(tools)))
        for schema in schemas:
            if not isinstance(codes.get(schema["name"]), str):
                raise row.complain(f"no source for the tool {schema['name']!r}", "codes")
            wanted = python_name(schema["name"])
            if wanted != schema["name"] and wanted not in defined_functions(codes[schema["name"]]):
                raise row.complain(
                    f"the source of the tool {schema['name']!r} has to define the function {wanted}", "codes"
                )
        answers: dict[str, list[str]] = {}
        for tool_name, values in unsolved.items():
            if not any(schema["name"] == tool_name for schema in schemas):
                raise row.complain(
                    f"the row offers no tool {tool_name!r}, so these sub-questions can't be solved",
                    f"unsolved_set.{tool_name}",
                )
            if not isinstance(values, list):
                raise row.complain("expected a list of answers", f"unsolved_set.{tool_name}")
            answers[tool_name] = [row.part(value, f"unsolved_set.{tool_name}") for value in values]
            if any(map(says_nothing, answers[tool_name])):
                raise row.complain("an answer is empty, so any result would bring it in", f"unsolved_set.{tool_name}")
        if not any(answers.values()):
            raise row.complain("there is no sub-question, so doing nothing would solve the task", "unsolved_set")
        final = row.values.get("answer")
        if final is not None:
            final = row.text("answer")
        prompt = [{"role": message["role"], "content": message["content"]} for message in messages]
        if self.settings.answer_rule == "add" and not any("<answer>" in message["content"] for message in prompt):
            asking = next((message for message in reversed(prompt) if message["role"] == "user"), prompt[-1])
            asking["content"] = with_answer_rule(asking["content"])
        return Task(
            id=name,
            group=name,
            category=row.text("data_source", "ftrl").rsplit("/", 1)[-1],
            user_turns=(tuple(prompt),),
            tools=tuple(schemas),
            reference_calls=(reference_calls(row, {schema["name"]: schema for schema in schemas}),),
            reference_answer=final,
            data={
                "codes": {schema["name"]: codes[schema["name"]] for schema in schemas},
                "unsolved": answers,
                "split": row.values.get("split"),
            },
        )

    def close(self) -> None:
        """Stop the sandbox."""
        self.sandbox.close()

    def start(self, task: Task) -> FTRLSession:
        if "unsolved" not in task.data:
            raise ConfigError(f"task {task.id} is not an FTRL task")
        return FTRLSession(task, self.sandbox, task.data["codes"], self.max_observation_chars)

    def goals(self, task: Task) -> list[Goal]:
        """Every open answer, under the tool whose calls have to bring it in; rows word no sub-questions."""
        question, codes = task.user_turns[0][-1]["content"], task.data["codes"]
        return [
            Goal(question, name, answer, codes.get(name))
            for name, answers in task.data["unsolved"].items()
            for answer in answers
        ]


class FTRLSession(SourceSession):
    """One episode: one question, any number of calls, a final message."""

    def outcome(self) -> Outcome:
        """Score: Solve-F1; success: every sub-question solved."""
        unsolved: dict[str, list[str]] = self.task.data["unsolved"]
        questions = sum(len(answers) for answers in unsolved.values())
        executed = self.executed
        by_call = solved_calls(executed, unsolved)
        solved = sum(by_call)
        metrics = solve_metrics(solved, len(executed), questions)
        metrics["questions"] = float(questions)
        metrics |= call_counts(executed)
        complete = solved == questions
        reason = "ok" if complete else f"{solved} of {questions} sub-questions solved"
        return Outcome(complete, metrics["solve_f1"], reason, metrics, tuple(by_call))


def _build(setup: Setup) -> FTRLEnvironment:
    assert setup.path is not None  # the settings were checked
    return FTRLEnvironment(setup.path, setup.sandbox(), setup.settings, setup.max_observation_chars, setup.quarantine)


FTRL = EnvironmentSpec(
    build=_build,
    checked=False,
    config=FTRLConfig,
    tasks_file="required",
    expert_traces="recorded",
    uses_sandbox=True,
    answer_remedy="set environment_config.answer_rule=add",
    official_turns=lambda: OFFICIAL_TURNS,
    describe=lambda settings: f"answer rule {settings.answer_rule}",
)
