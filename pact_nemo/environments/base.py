"""The environment protocol: what a benchmark has to provide, and the types that tasks and calls travel in.

An environment knows tasks, tools and how to execute calls. It knows nothing of models, tokens, rewards or traces.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class ToolCall:
    """One call as the policy or a reference wrote it: tool name and JSON-like keyword arguments."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)


MAX_NAME_CHARS = 200
_NO_NAME = re.compile(r"""[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff"'`()<>{};=\\]""")


def name_fault(name: object, *, argument: bool = False) -> str | None:
    """What is wrong with the name of a tool, or with ``argument`` of an argument; None where a call in JSON can carry
    it.

    Names are data. So dots, dashes, Python's keywords and letters of any alphabet are fine; text that looks like source
    or markup is not.
    """
    if not isinstance(name, str) or not name:
        return "is not a text"
    if len(name) > MAX_NAME_CHARS:
        return f"is longer than {MAX_NAME_CHARS} characters"
    odd = _NO_NAME.search(name)
    if odd is not None:
        return f"holds the character {odd.group()!r}, which no name may have"
    if re.search(r"\s", name):
        return "holds white space"
    if not argument and re.search(r"[\[\],]", name):
        return "holds a bracket or comma"
    return None


SCHEMA_TYPES = frozenset({"string", "integer", "number", "boolean", "array", "object", "null"})
#: BFCL's Python names of types, as its own evaluation reads them
_JSON_TYPES = {
    "dict": "object",
    "float": "number",
    "tuple": "array",
    "list": "array",
    "any": "string",
    "bool": "boolean",
}


def json_type(kind: str) -> str:
    """The JSON schema type that a published type name means: BFCL's ``dict`` and ``float``, Gemini's ``OBJECT``. Others
    stay.
    """
    known = kind.lower() if kind.isupper() and kind.lower() in SCHEMA_TYPES else kind
    return _JSON_TYPES.get(known, known)


def _unknown_type(schema: Any) -> object | None:
    """A type in a schema, at any depth, that JSON schema doesn't have; None where there is none."""
    if not isinstance(schema, dict):
        return None
    kind = schema.get("type")
    kinds = kind if isinstance(kind, list | tuple) else [] if kind is None else [kind]
    odd = next((one for one in kinds if not isinstance(one, str) or one not in SCHEMA_TYPES), None)
    parts = [schema.get("items"), schema.get("additionalProperties")]
    for key in ("properties", "$defs", "definitions"):
        parts += schema[key].values() if isinstance(schema.get(key), dict) else []
    for key in ("anyOf", "oneOf", "allOf", "prefixItems"):
        parts += schema[key] if isinstance(schema.get(key), list | tuple) else []
    found = [odd, *(_unknown_type(part) for part in parts)]
    return next((one for one in found if one is not None), None)


#: what the parameters of a tool without arguments may say beside its empty properties
_WITHOUT_ARGUMENTS = frozenset(
    "type properties required title description additionalProperties unevaluatedProperties $schema $id $comment $defs"
    " definitions examples default deprecated nullable strict minProperties maxProperties".split()
)


def check_schema(tool: Any, *, names: bool = True) -> None:
    """Raises ValueError where a tool schema isn't
    ``{"name": text, "description": text, "parameters": {"properties": {name: {…}}, …}}``: everything that shows tools
    to a model or fills their arguments relies on it. The message names tool and property.

    Args:
        names: names are refused that no call can carry (:func:`name_fault`). False: whoever shows the tool gives it
            others.
    """
    if not isinstance(tool, dict) or not isinstance(tool.get("parameters"), dict):
        raise ValueError("a tool has to be an object with parameters")
    if not isinstance(tool.get("name"), str) or not tool["name"] or not isinstance(tool.get("description", ""), str):
        raise ValueError("a tool's name and description have to be texts")
    fault = name_fault(tool["name"])
    if names and fault is not None:
        raise ValueError(f"the tool name {tool['name'][:60]!r} {fault}")
    here = f"tool {tool['name']!r}: "
    properties, required = tool["parameters"].get("properties", {}), tool["parameters"].get("required", [])
    if not isinstance(properties, dict):
        raise ValueError(f"{here}parameters.properties has to be an object of objects, not {type(properties).__name__}")
    for name, value in properties.items():
        fault = name_fault(name, argument=True)
        if names and fault is not None:
            raise ValueError(f"{here}the argument name {str(name)[:60]!r} {fault}")
        if not isinstance(value, dict):
            found = "null" if value is None else type(value).__name__
            raise ValueError(f"{here}parameters.properties has to be an object of objects; {name!r} is {found}")
        if not isinstance(value.get("enum") or [], list | tuple):
            raise ValueError(f"{here}an enum in parameters.properties has to be a list; that of {name!r} is none")
        if (odd := _unknown_type(value)) is not None:
            raise ValueError(
                f"{here}the argument {name!r} has the type {odd!r}; JSON schema has {', '.join(sorted(SCHEMA_TYPES))}"
            )
    if not isinstance(required, list | tuple) or not all(isinstance(name, str) for name in required):
        raise ValueError(f"{here}parameters.required has to be a list of names")
    if words := [word for word in tool["parameters"] if not properties and word not in _WITHOUT_ARGUMENTS]:
        raise ValueError(
            f"{here}parameters have {words[0]!r} and no properties, so that no argument would be shown; list the"
            " arguments in parameters.properties"
        )
    if missing := [name for name in required if name not in properties]:
        raise ValueError(
            f"{here}parameters.required names {missing[0]!r}, which is none of parameters.properties: describe it"
            " there, or take it out"
        )


@dataclass(frozen=True)
class Task:
    """One prompt of a benchmark.

    Attributes:
        id: unique over the benchmark, e.g. ``multi_turn_base_12`` or, for a single-turn window,
            ``multi_turn_base_12#1``.
        group: the id that splits are made by; every task of one group is on the same side of the held-out split.
        category: the benchmark's own category name (reported apart).
        tags: further groupings that are reported apart, e.g. ``answer type: date``.
        user_turns: chat messages of each user turn, in order. The first one, with ``tools``, is the prompt ``x``.
        tools: the function schemas offered at the start (OpenAI style:
            ``{"name", "description", "parameters": JSON schema}``).
        reference_calls: ground-truth calls per user turn; never shown to the policy.
        reference_answer: text of the expected final answer, where the benchmark has one.
        data: the benchmark's own record, for its environment and checker only.
        later_tools: function schemas that later user turns reveal, where the reference calls may use them.
        any_turn: a reference call may be made in any user turn, because another user answers in each episode.
        after: ids of the tasks that this one builds on: their episodes end before its own begins. Evaluation only.
        prepares: it is played for those that build on it, and has no score of its own.
    """

    id: str
    group: str
    category: str
    user_turns: tuple[tuple[dict[str, str], ...], ...]
    tools: tuple[dict[str, Any], ...]
    reference_calls: tuple[tuple[ToolCall, ...], ...]
    reference_answer: str | None = None
    data: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    tags: tuple[str, ...] = ()
    later_tools: tuple[dict[str, Any], ...] = field(default=(), compare=False, repr=False)
    any_turn: bool = False
    after: tuple[str, ...] = ()
    prepares: bool = False


@dataclass(frozen=True)
class Goal:
    """One sub-question of a task whose answer the benchmark recorded.

    Attributes:
        question: its text; the whole request where the benchmark words no sub-questions.
        tool: the name of the tool that answers it; empty where the row names none.
        answer: the recorded answer, which a call's observation has to contain.
        source: Python source of the tool, which likely arguments are read from; None where there is none.
    """

    question: str
    tool: str
    answer: str
    source: str | None


@dataclass(frozen=True)
class Outcome:
    """The benchmark checker's verdict on a finished episode.

    Attributes:
        success: the official pass/fail.
        score: outcome reward in [0, 1].
        reason: the checker's own error type, or ``"ok"``.
        metrics: the benchmark's further numbers by name (e.g. FTRL's ``solve_p``); evaluation reports their means.
        solved: per executed call, in order, whether it solved a sub-question that was open; None where the benchmark
            has no sub-questions.
    """

    success: bool
    score: float
    reason: str = "ok"
    metrics: dict[str, float] = field(default_factory=dict)
    solved: tuple[bool, ...] | None = None

    def __post_init__(self) -> None:
        if self.solved is not None:
            object.__setattr__(self, "solved", tuple(self.solved))  # from JSON it comes as a list


class Session(Protocol):
    """One running episode. Sessions of one environment share no mutable state and may run concurrently.

    ``seeded(seed)`` (may be absent): called before anything else, for a session that draws; the seed is a function of
    the run's seed, the step, the task and the sample.
    """

    task: Task

    def execute(self, calls: list[ToolCall]) -> list[str]:
        """Run the calls of one assistant turn in order; one observation string each. A failing tool is an observation,
        not an exception.

        Raises:
            EnvironmentFailure: the environment itself broke.
        """
        ...

    def next_user_turn(self, message: str = "") -> tuple[list[dict[str, str]], list[dict[str, Any]]] | None:
        """Close the current user turn with the assistant's ``message`` that asked for no tool. Returns (messages, newly
        revealed tools) of the next one, or None when the task is over.
        """
        ...

    def outcome(self) -> Outcome:
        """Official verdict on everything executed so far."""
        ...

    def close(self) -> None:
        """Release all state; safe to call twice."""
        ...


class OpensItself(Session, Protocol):
    """A session whose first messages are known only as it starts: they hold what earlier episodes left behind."""

    def opening(self) -> list[dict[str, str]]:
        """The messages in place of ``task.user_turns[0]``; the same ones whenever it is asked."""
        ...


class Environment(Protocol):
    """A benchmark: its tasks and how to start an episode of one."""

    def tasks(self) -> list[Task]: ...

    def start(self, task: Task) -> Session: ...

    def close(self) -> None:
        """Stop whatever the environment keeps running; safe to call twice."""
        ...


class RecordsAnswers(Environment, Protocol):
    """An environment that knows the answer of each sub-question: ``expert_traces="recorded"``."""

    def goals(self, task: Task) -> list[Goal]:
        """The sub-questions of a task, in an order that can be solved; empty where there are none."""
        ...
