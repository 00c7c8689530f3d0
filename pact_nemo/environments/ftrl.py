"""FTRL: multi-hop questions whose sub-answers have to be brought in by tool calls, in the format published with MatchTIR (arXiv 2601.10712).

A call solves a sub-question if its observation contains one of the answers still open for that tool; one call solves at most one. With n
sub-questions, p calls and q solved: Solve-R = q/n, Solve-P = q/p (1 if p = 0), Solve-F1 their harmonic mean.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pact_nemo.environments.base import Outcome, Task, ToolCall
from pact_nemo.environments.python_tools import Executed, PythonTools, contains_answer, tool_schema
from pact_nemo.environments.rows import Row, read_rows
from pact_nemo.errors import ConfigError, EnvironmentFailure
from pact_nemo.quarantine import Quarantine
from pact_nemo.sandbox import Sandbox


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
        path: ``.parquet``, ``.jsonl`` or ``.json`` with messages, tools, codes, unsolved_set, solve_rate, data_source, split, answer.
        sandbox: where the tools run.
        max_observation_chars: longer observations are cut for the policy; scoring sees them whole. None: no limit.
        quarantine: takes bad rows; as it comes, the first one is refused.
    """

    path: str | Path
    sandbox: Sandbox
    max_observation_chars: int | None = None
    quarantine: Quarantine = field(default_factory=Quarantine, repr=False, compare=False)
    _tasks: list[Task] = field(default_factory=list, init=False, repr=False, compare=False)

    def tasks(self) -> list[Task]:
        """All tasks in file order.

        Raises:
            DataError: the file is unusable, or a row is and the quarantine is strict; names file, row and field.
        """
        if not self._tasks:
            name = Path(self.path).stem
            rows = read_rows(self.path, self.quarantine)
            found = (self.quarantine.guard(lambda: self._task(row, f"{name}_{row.number - 1}"), row.values) for row in rows)  # noqa: B023 - called at once
            self._tasks[:] = [task for task in found if task is not None]
        return list(self._tasks)

    def _task(self, row: Row, name: str) -> Task:
        messages = row.json("messages", list)
        for index, message in enumerate(messages):
            if not isinstance(message, dict) or not isinstance(message.get("content"), str) or message.get("role") not in ("system", "user"):
                raise row.complain("a prompt message needs a role (system or user) and text", f"messages[{index}]")
        tools, codes, unsolved = row.json("tools", list), row.json("codes", dict), row.json("unsolved_set", dict)
        if not messages:
            raise row.complain("a prompt needs at least one message", "messages")
        schemas = []
        for index, tool in enumerate(tools):
            try:
                schemas.append(tool_schema(tool))
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise row.complain(f"not a function description: {error!r}", f"tools[{index}]") from error
            if not isinstance(codes.get(schemas[-1]["name"]), str):
                raise row.complain(f"no source for the tool {schemas[-1]['name']!r}", "codes")
        answers: dict[str, list[str]] = {}
        for tool_name, values in unsolved.items():
            if not isinstance(values, list) or not all(isinstance(value, str | int | float) for value in values):
                raise row.complain("expected a list of answers", f"unsolved_set.{tool_name}")
            answers[tool_name] = [str(value) for value in values]
        final = row.values.get("answer")
        if final is not None:
            final = row.text("answer")
        return Task(
            id=name,
            group=name,
            category=row.text("data_source", "ftrl").rsplit("/", 1)[-1],
            user_turns=(tuple({"role": message["role"], "content": message["content"]} for message in messages),),
            tools=tuple(schemas),
            reference_calls=((),),
            reference_answer=final,
            data={"codes": {schema["name"]: codes[schema["name"]] for schema in schemas}, "unsolved": answers, "split": row.values.get("split")},
        )

    def close(self) -> None:
        """Stop the sandbox."""
        self.sandbox.close()

    def start(self, task: Task) -> FTRLSession:
        if "unsolved" not in task.data:
            raise ConfigError(f"task {task.id} is not an FTRL task")
        return FTRLSession(self, task)


class FTRLSession:
    """One episode: one question, any number of calls, a final message."""

    def __init__(self, environment: FTRLEnvironment, task: Task):
        self.task = task
        self._limit = environment.max_observation_chars
        self._tools = PythonTools(environment.sandbox, task.data["codes"])
        self._closed = False

    def execute(self, calls: list[ToolCall]) -> list[str]:
        """Raises EnvironmentFailure after :meth:`close`; whatever a tool does is its observation."""
        if self._closed:
            raise EnvironmentFailure(f"{self.task.id}: a call after the episode's end")
        texts = self._tools.execute(calls)
        return [text if self._limit is None or len(text) <= self._limit else f"{text[: self._limit]} [cut]" for text in texts]

    def next_user_turn(self, message: str = "") -> tuple[list[dict[str, str]], list[dict[str, Any]]] | None:
        """There is one user turn."""
        return None

    def outcome(self) -> Outcome:
        """Score: Solve-F1; success: every sub-question solved."""
        unsolved: dict[str, list[str]] = self.task.data["unsolved"]
        questions = sum(len(answers) for answers in unsolved.values())
        executed = list(self._tools.executed)
        by_call = solved_calls(executed, unsolved)
        solved = sum(by_call)
        metrics = solve_metrics(solved, len(executed), questions)
        metrics["questions"] = float(questions)
        metrics["calls"] = float(len(executed))
        metrics["invocation_errors"] = float(sum(not done.result.ok for done in executed))
        complete = solved == questions
        reason = "ok" if complete else f"{solved} of {questions} sub-questions solved"
        return Outcome(complete, metrics["solve_f1"], reason, metrics, tuple(by_call))

    def close(self) -> None:
        self._closed = True
