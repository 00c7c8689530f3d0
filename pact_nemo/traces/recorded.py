"""Traces without a teacher, for benchmarks that record the answer of every sub-question: find the call that brings each
answer in.

Nothing is invented: candidate arguments are literals of the tool's own source (its usage examples first), and a call is
taken only if its observation contains the recorded answer. Tasks for which that fails get no trace. ``Trace.source`` is
``recorded``, or ``ground_truth`` where a row's own reference calls do it.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pact_nemo.chat.tool_formats import first_type
from pact_nemo.environments.answers import contains_answer, names_answer, plain
from pact_nemo.environments.base import Environment, RecordsAnswers, Task, ToolCall
from pact_nemo.environments.calls import check_call, literal
from pact_nemo.errors import ToolCallError
from pact_nemo.traces.annotate import Context, Style, annotate_turn
from pact_nemo.traces.builder import TraceBuilder
from pact_nemo.traces.ground_truth import ground_truth_trace
from pact_nemo.traces.schema import Trace

SOURCE = "recorded"
TRIES = 60  #: calls tried for one sub-question
_PER_ARGUMENT = 12


def _parse(source: str) -> ast.Module | None:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def example_calls(source: str, name: str) -> Iterator[dict[str, Any]]:
    """Keyword arguments of the literal calls of ``name`` that its own source makes."""
    tree = _parse(source)
    if tree is None:
        return
    definition = next(
        (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name), None
    )
    names = [argument.arg for argument in definition.args.args] if definition is not None else []
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == name
            and len(node.args) <= len(names)
        ):
            try:
                arguments = {key: literal(value) for key, value in zip(names, node.args, strict=False)}
                arguments |= {item.arg: literal(item.value) for item in node.keywords if item.arg is not None}
                if len(arguments) == len(node.args) + len(node.keywords):
                    yield arguments
            except ToolCallError:
                continue


def _literals(source: str, question: str, known: Sequence[str]) -> list[Any]:
    """Values that the question names (answers found before, numbers), then short literals of the source, those in the
    question first.
    """
    tree = _parse(source)
    named: list[Any] = [answer for answer in known if names_answer(question, answer)]
    numbers = [int(text) for text in re.findall(r"(?<![\w.])\d{1,9}(?![\w.]*\d)", question)]
    found: dict[str, Any] = {repr(value): value for value in [*named, *numbers, *(str(number) for number in numbers)]}
    for node in ast.walk(tree) if tree is not None else ():
        if isinstance(node, ast.Constant) and type(node.value) in (str, int, float) and 0 < len(str(node.value)) <= 80:
            found.setdefault(repr(node.value), node.value)
    words = plain(question)
    return sorted(found.values(), key=lambda value: plain(str(value)) not in words)


_TYPES: dict[str, tuple[type, ...]] = {"string": (str,), "integer": (int,), "number": (int, float)}


def _fitting(schema: Mapping[str, Any], literals: Sequence[Any]) -> list[Any]:
    if schema.get("enum"):
        return list(schema["enum"])
    if first_type(schema) == "boolean":
        return [True, False]
    kinds = _TYPES.get(first_type(schema))
    return [value for value in literals if kinds is not None and type(value) in kinds]


def candidate_arguments(
    tool: Mapping[str, Any], source: str, question: str, known: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """Arguments worth trying, best first: the source's own examples, then values of the question and the source in the
    required parameters.

    ``known``: recorded answers of the sub-questions before this one.
    """
    yield from example_calls(source, tool["name"])
    properties, required = tool["parameters"].get("properties", {}), tool["parameters"].get("required", [])
    literals = _literals(source, question, known)
    choices = [_fitting(properties.get(key, {}), literals)[:_PER_ARGUMENT] for key in required]
    for values in itertools.product(*choices):
        yield dict(zip(required, values, strict=True))


def recorded_trace(environment: RecordsAnswers, task: Task, style: Style, tries: int = TRIES) -> Trace | None:
    """One verified trace, a call per assistant turn, or None where some recorded answer can't be brought in.

    A task's own reference calls are executed first; a search is made only where it has none, or where they don't bring
    every answer in.

    Args:
        environment: where the calls run, and who knows the sub-questions; a second session of it tries candidates, so
            that the trace holds the successful calls only.
        task: one of its tasks.
        style: of the annotator.
        tries: calls tried per sub-question.
    """
    if any(task.reference_calls):
        trace = ground_truth_trace(environment, task, style, "one")
        if trace is not None and trace.verified:
            return trace
    tools = {tool["name"]: tool for tool in task.tools}
    calls: list[ToolCall] = []
    known: list[str] = []
    trial = environment.start(task)
    try:
        for goal in environment.goals(task):
            if goal.tool not in tools or goal.source is None:
                return None
            tool = tools[goal.tool]
            candidates = candidate_arguments(tool, goal.source, goal.question, known)
            call = _search(trial, tool, candidates, goal.answer, tries)
            if call is None:
                return None
            calls.append(call)
            known.append(goal.answer)
    finally:
        trial.close()
    if not calls:
        return None
    return _written_down(environment, task, calls, style)


def _search(
    session: Any, tool: Mapping[str, Any], candidates: Iterator[dict[str, Any]], answer: str, tries: int
) -> ToolCall | None:
    seen = set()
    for arguments in itertools.islice(candidates, tries):
        call = ToolCall(tool["name"], arguments)
        key = repr(sorted(arguments.items()))
        try:
            check_call(call)
        except ToolCallError:
            continue
        if key not in seen and contains_answer(session.execute([call])[0], answer):
            return call
        seen.add(key)
    return None


def _written_down(environment: Environment, task: Task, calls: Sequence[ToolCall], style: Style) -> Trace | None:
    builder = TraceBuilder()
    words = "\n".join(message["content"] for message in task.user_turns[0] if message["role"] == "user")
    seen: list[str] = []
    session = environment.start(task)
    try:
        for index, call in enumerate(calls):
            later = frozenset(other.name for other in calls[index + 1 :])
            segments = annotate_turn([call], Context(list(task.tools), words, "", seen, index == 0, later), style)
            observations = session.execute([call])
            seen.extend(observations)
            builder.assistant(segments, [call], observations, 0)
        # the answer is the policy's to write; what makes the trace is that every sub-answer was brought in by a call
        session.next_user_turn(task.reference_answer or "")
        verified = session.outcome().success
    finally:
        session.close()
    return builder.build(task.id, SOURCE, verified)
