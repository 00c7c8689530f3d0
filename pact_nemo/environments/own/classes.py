"""What a reference offers: a class, one instance a rollout, or a module of functions.

Runs in the processes that run tools, and in the trainer's with ``agent.isolation=thread``; imports little.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from pact_nemo.environments.own.signatures import ArgumentFault, Signature, as_json, as_text, signature
from pact_nemo.errors import ConfigError
from pact_nemo.runtime.plugins import line_of, load_module, load_plugin

KEY = "agent.tools"
MAX_CHARS = 10_000_000  #: of an observation; a longer one is cut
_MAX_ERROR_CHARS = 2_000
_RESERVED = {"reset": 1, "state": 0, "score": 1, "close": 0}  #: no tools; the most arguments that each takes
_NO_TOOLS = ("builtins", "pydantic", "abc", "typing", "typing_extensions")  #: packages whose public methods don't count


@dataclass(frozen=True)
class Episode:
    """What ``score(episode)`` gets.

    Attributes:
        task: the row of the task.
        messages: the conversation, in OpenAI's format.
        calls: every call that was made, in order.
        answer: the closing message.
    """

    task: dict[str, Any]
    messages: list[dict[str, Any]]
    calls: list[Any]
    answer: str


class Failed(Exception):
    """What isn't the policy's fault: a constructor, ``state()`` or ``score()`` that raised or gave nonsense."""


class Offered:
    """The tools of a reference, imported into this process.

    Args:
        reference: ``path.py:Class``, ``module:Class``, ``path.py`` or ``module``.
        include: names of the only tools; empty: all.
        shadow: the folder of a file comes first among those that modules are imported from, as Python has it for the
            file that it runs. False: it comes last.

    Raises:
        ConfigError: it can't be imported, isn't of that kind, or a tool can't be described to a model.
    """

    def __init__(self, reference: str, include: Sequence[str] = (), *, shadow: bool = True):
        self.place, self.source = _load(reference, shadow)
        self.name = self.source.__name__ if isinstance(self.source, type) else Path(self.place).name
        found = _callables(self.source)
        self._trl = "get_reward" in found
        if self._trl and "score" in found:
            raise ConfigError(f"{self.where('score')}: there is get_reward, too; keep the one that gives the reward")
        reserved = {*_RESERVED, "get_reward"} if self._trl else set(_RESERVED)
        for name in reserved & set(found):
            self._check_reserved(name, *found[name])
        tools = {name: one for name, one in found.items() if name not in reserved}
        unknown = [name for name in include if name not in tools]
        if unknown or not tools:
            there = ", ".join(tools) or "no public function with a name of its own"
            what = f"agent.include names {unknown[0]!r}" if unknown else f"{KEY}={reference!r} offers no tool"
            raise ConfigError(f"{what}; {self.name} has {there}")
        self.tools: dict[str, Signature] = {
            name: signature(function, name, self.where(name), method=method)
            for name, (function, method) in tools.items()
            if not include or name in include
        }
        self.reward = "get_reward" if self._trl else "score" if "score" in found else None
        self.has = frozenset(reserved & set(found))
        self.takes_task = isinstance(self.source, type) and self._constructor_takes_task()

    @property
    def schemas(self) -> list[dict[str, Any]]:
        return [tool.schema for tool in self.tools.values()]

    @property
    def offers(self) -> list[str]:
        there = {"state": "state" in self.has, "score": bool(self.reward), "opening": "reset" in self.has}
        return [name for name, has in there.items() if has]

    @property
    def warnings(self) -> list[str]:
        return [words for tool in self.tools.values() for words in tool.warnings]

    def where(self, name: str) -> str:
        """``shop.py:Shop.lookup``, or ``tools.py:lookup``."""
        return (
            f"{self.place}:{self.source.__name__}.{name}" if isinstance(self.source, type) else f"{self.place}:{name}"
        )

    def _check_reserved(self, name: str, function: Callable[..., Any], method: bool) -> None:
        most = _RESERVED.get(name, 0)
        needed = [one for one in _parameters(function, method) if one.default is one.empty and one.kind not in _STARS]
        if name != "reset" and len(needed) > most:
            raise ConfigError(
                f"{self.where(name)}: {name} is no tool but a part of the agent, and takes"
                f" {'one argument' if most else 'no argument'}; rename it where it is meant as a tool"
            )

    def _constructor_takes_task(self) -> bool:
        assert isinstance(self.source, type)
        if inspect.isabstract(self.source):
            missing = ", ".join(sorted(getattr(self.source, "__abstractmethods__", ())))
            raise ConfigError(f"{self.place}:{self.name} is abstract; it lacks {missing}")
        try:
            parameters = list(inspect.signature(self.source).parameters.values())
        except (TypeError, ValueError):  # some classes written in C
            return False
        needed = [one for one in parameters if one.default is one.empty and one.kind not in _STARS]
        if len(needed) > 1 or any(one.kind is one.KEYWORD_ONLY for one in needed):
            names = ", ".join(one.name for one in needed)
            raise ConfigError(
                f"{self.where('__init__')}: it needs {names}, and is called with the task's row only; give the others"
                " a default"
            )
        return bool(needed) or bool(parameters and parameters[0].name == "task" and parameters[0].kind not in _STARS)


_STARS = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _parameters(function: Callable[..., Any], method: bool) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())[int(method) :]


def _load(reference: str, shadow: bool) -> tuple[str, type | ModuleType]:
    place, colon, attribute = reference.rpartition(":")
    place = place if colon else reference
    if place.endswith(".py"):
        folder = str(Path(place).expanduser().resolve().parent)
        if shadow:
            sys.path.insert(0, folder)
        elif folder not in sys.path:
            sys.path.append(folder)
    if not colon:
        module: ModuleType = load_module(KEY, reference, place)
        return place, module
    found = load_plugin(KEY, reference, {})
    if not isinstance(found, type):
        remedy = f"say {KEY}={place} agent.include=[{attribute}]" if inspect.isroutine(found) else "name its class"
        raise ConfigError(f"{KEY}={reference!r}: {attribute} is no class; {remedy}")
    return place, found


def _callables(source: type | ModuleType) -> dict[str, tuple[Callable[..., Any], bool]]:
    """Public functions by name, in the order of their definition: each, and whether its first argument is the instance
    or the class.
    """
    found: dict[str, tuple[Callable[..., Any], bool]] = {}
    if isinstance(source, ModuleType):
        own = {name: value for name, value in vars(source).items() if _is_function(value)}
        found = {name: (value, False) for name, value in own.items() if value.__module__ == source.__name__}
    else:
        for base in reversed(source.__mro__):
            for name, value in vars(base).items():
                if not _is_method(value):
                    found.pop(name, None)  # lookup = None takes an inherited method away
                elif base.__module__.partition(".")[0] not in _NO_TOOLS:
                    bound = isinstance(value, staticmethod | classmethod)
                    found[name] = (value.__func__ if bound else value, not isinstance(value, staticmethod))
    return {name: one for name, one in found.items() if not name.startswith("_")}


def _is_function(value: Any) -> bool:
    """Functions, and what wraps them: a cache, a decorator of the user's own."""
    return inspect.isroutine(value) or (
        callable(value) and not isinstance(value, type) and inspect.isroutine(getattr(value, "__wrapped__", None))
    )


def _is_method(value: Any) -> bool:
    return isinstance(value, staticmethod | classmethod) or _is_function(value)


class Instance:
    """The tools of one rollout. For one thread at a time."""

    def __init__(self, offered: Offered):
        self._offered = offered
        self._object: Any = None
        self._runner: asyncio.Runner | None = None

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Do what a request asks for; never raises. In the answer are ``value``, or ``failure``, what went wrong that
        isn't the policy's fault; and ``traceback``, where something raised.
        """
        try:
            return getattr(self, f"_{request['do']}")(**{key: one for key, one in request.items() if key != "do"})
        except Failed as error:
            cause = error.__cause__
            return {"failure": str(error)} | ({"traceback": _traced(cause)} if cause is not None else {})
        except BaseException as error:
            return {"failure": f"{request['do']}: {_described(error)}", "traceback": _traced(error)}

    def _open(self, task: dict[str, Any]) -> dict[str, Any]:
        offered, opening = self._offered, None
        self._object = offered.source
        if isinstance(offered.source, type):
            arguments = (task,) if offered.takes_task else ()
            self._object = self._own(f"{offered.name}()", lambda: offered.source(*arguments))  # type: ignore[operator]
        if "reset" in offered.has:
            opening = self._own("reset()", lambda: self._reset(task))
        if opening is not None and not isinstance(opening, str):
            raise Failed(
                f"{offered.where('reset')} returned {type(opening).__name__}; it returns None, or a text for the model"
            )
        return {"value": opening or ""}

    def _reset(self, task: dict[str, Any]) -> Any:
        """``reset()``, ``reset(task)``, or with the row's keys that it names."""
        function = self._object.reset
        parameters = _parameters(function, False)
        names = [one.name for one in parameters if one.kind not in _STARS]
        if names == ["task"]:
            return function(task)
        every = any(one.kind is one.VAR_KEYWORD for one in parameters)
        missing = [one.name for one in parameters if one.default is one.empty and one.name in names]
        missing = [name for name in missing if name not in task]
        if missing:
            raise Failed(
                f"{self._offered.where('reset')} needs {missing[0]!r}, which the task's row does not have;"
                f" it has {', '.join(task)}. For the whole row, write reset(self, task)"
            )
        return function(**{key: value for key, value in task.items() if every or key in names})

    def _call(self, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        tool = self._offered.tools.get(name)
        if tool is None:
            known = ", ".join(self._offered.tools)
            return {"value": f'Error: UnknownTool: there is no tool "{name[:60]}"; tools: {known}'}
        try:
            bound = tool.bind(arguments)
        except ArgumentFault as error:
            return {"value": f"Error: ValidationError: {error}"}
        try:
            return {"value": as_text(self._run(lambda: getattr(self._object, name)(**bound)))[:MAX_CHARS]}
        except BaseException as error:  # sys.exit() and the like are no more than an error of the tool
            return {"value": f"Error: {_described(error)}", "traceback": _traced(error)}

    def _state(self) -> dict[str, Any]:
        found = self._own("state()", lambda: self._object.state())
        try:
            return {"value": as_json(found)}
        except ValueError as error:
            raise Failed(f"{self._offered.where('state')} gave no JSON value: {error}") from error

    def _score(self, episode: dict[str, Any]) -> dict[str, Any]:
        name = self._offered.reward or "score"
        function = getattr(self._object, name)
        shown = Episode(**{key: episode.get(key) for key in ("task", "messages", "calls", "answer")})  # type: ignore[arg-type]
        arguments = (shown,) if _parameters(function, False) else ()
        found = self._own(f"{name}()", lambda: function(*arguments))
        number = found.item() if callable(getattr(found, "item", None)) else found  # NumPy's and the like
        if not isinstance(number, int | float) or not 0 <= number <= 1:  # NaN is in no range
            shown_value = f"{found!r}"[:100]
            raise Failed(f"{self._offered.where(name)} gave {shown_value}; it gives a number in [0, 1]")
        return {"value": float(number)}

    def _close(self) -> dict[str, Any]:
        try:
            if "close" in self._offered.has and self._object is not None:
                self._own("close()", lambda: self._object.close())
        finally:
            if self._runner is not None:
                self._runner.close()
        return {"value": None}

    def _own(self, what: str, call: Callable[[], Any]) -> Any:
        """Run what is no tool.

        Raises:
            Failed: it raised.
        """
        try:
            return self._run(call)
        except Failed:
            raise
        except BaseException as error:
            raise Failed(f"{what} raised {_described(error)}{line_of(error)}") from error

    def _run(self, call: Callable[[], Any]) -> Any:
        """Coroutines of one rollout run in one loop, so that what one opened another can use."""
        found = call()
        if not inspect.isawaitable(found):
            return found
        if self._runner is None:
            self._runner = asyncio.Runner()
        return self._runner.run(_awaited(found))


async def _awaited(found: Any) -> Any:
    return await found


def _described(error: BaseException) -> str:
    try:
        text = str(error)
    except BaseException:  # the text of an exception is code, too
        text = ""
    name = type(error).__name__
    return f"{name}: {text[:_MAX_ERROR_CHARS]}" if text else name


def _traced(error: BaseException) -> str:
    try:
        return "".join(traceback.format_exception(error, limit=-20))[-8_000:]
    except BaseException:
        return type(error).__name__
