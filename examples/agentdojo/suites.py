"""The four suites of AgentDojo (package ``agentdojo`` 0.1.35, MIT) as plain classes: their tools, state and checkers.

    pip install --no-deps agentdojo==0.1.35 && pip install deepdiff pyyaml email-validator
    python examples/agentdojo/make_data.py banking data
    pact-check agent.tools=examples/agentdojo/suites.py:Banking tasks.path=data/banking-tasks.jsonl \\
        traces.path=data/banking-traces.jsonl

No model vendor's library is needed. The package's list of models imports all of them, so it is passed over here.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

VERSION = "v1.2.2"  # of the suites


def _pass_over_the_models() -> None:
    """Make ``agentdojo.agent_pipeline`` a package without what its ``__init__`` imports: every vendor's model. One
    constant of them is read by the tools' own code; it is taken from its source.
    """
    found = importlib.util.find_spec("agentdojo")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("agentdojo is not installed: pip install --no-deps agentdojo==0.1.35")
    root, name = Path(found.submodule_search_locations[0]), "agentdojo.agent_pipeline"
    if name in sys.modules:
        return
    for part, folder in ((name, "agent_pipeline"), (f"{name}.llms", "agent_pipeline/llms")):
        package = types.ModuleType(part)
        package.__path__ = [str(root / folder)]
        sys.modules[part] = package
    constants = types.ModuleType(f"{name}.llms.google_llm")
    for node in ast.parse((root / "agent_pipeline" / "llms" / "google_llm.py").read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    setattr(constants, target.id, node.value.value)
    sys.modules[constants.__name__] = constants


_pass_over_the_models()
from agentdojo.agent_pipeline.tool_execution import tool_result_to_str  # noqa: E402
from agentdojo.functions_runtime import Function, FunctionCall, FunctionsRuntime  # noqa: E402
from agentdojo.task_suite.load_suites import get_suite  # noqa: E402


class _Suite:
    """One episode of a suite. Tools are methods, which ``_with_tools`` adds."""

    suite: Any

    def __init__(self, task: dict):
        self._task = self.suite.user_tasks[task["info"]["user_task"]]
        environment = self.suite.load_and_inject_default_environment({})
        self._environment = self._task.init_environment(environment)
        self._before = self._environment.model_copy(deep=True)
        self._runtime = FunctionsRuntime(self.suite.tools)

    def score(self, episode: Any) -> float:
        """AgentDojo's own verdict: of the calls where a task judges them, else of answer and state."""
        calls = [FunctionCall(function=call["name"], args=call["arguments"]) for call in episode.calls]
        judged = (episode.answer, self._before, self._environment)
        verdict = self._task.utility_from_traces(*judged, calls)
        return float(self._task.utility(*judged) if verdict is None else verdict)


class ToolFault(Exception):
    """What a tool of AgentDojo says went wrong."""


def _method(function: Function) -> Callable[..., str]:
    """A tool as a method, without the arguments that the state fills."""

    def call(self: _Suite, **arguments: Any) -> str:
        result, fault = self._runtime.run_function(self._environment, function.name, arguments)
        if fault is not None:
            raise ToolFault(fault)
        return tool_result_to_str(result)

    hints = typing.get_type_hints(function.run, include_extras=True)
    shown = [
        one for one in inspect.signature(function.run).parameters.values() if one.name not in function.dependencies
    ]
    kept = [one.replace(kind=one.KEYWORD_ONLY, annotation=hints[one.name]) for one in shown]
    this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    call.__signature__ = inspect.Signature([this, *kept])  # type: ignore[attr-defined]
    call.__annotations__ = {one.name: one.annotation for one in kept}
    call.__name__, call.__doc__ = function.name, _described(function)
    return call


def _described(function: Function) -> str:
    """Its docstring without the lines on arguments that the state fills."""
    lines = (function.full_docstring or function.description).splitlines()
    hidden = tuple(f":param {name}:" for name in function.dependencies)
    return "\n".join(line for line in lines if not line.strip().startswith(hidden))


def _with_tools(name: str) -> type[_Suite]:
    suite = get_suite(VERSION, name)
    methods = {function.name: _method(function) for function in suite.tools}
    return type(name.title(), (_Suite,), {"suite": suite, "__module__": __name__, **methods})


Banking, Slack, Travel, Workspace = map(_with_tools, ("banking", "slack", "travel", "workspace"))
