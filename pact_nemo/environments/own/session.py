"""One episode of an own agent: calls go to the user's tools, user turns come from the task, the verdict from the first
judge that the task has.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pact_nemo.environments.answers import visible
from pact_nemo.environments.base import Outcome, Task, ToolCall
from pact_nemo.environments.own.hosts import OpenTools
from pact_nemo.environments.own.names import Aliases
from pact_nemo.environments.own.scoring import answer_score, expected_share
from pact_nemo.environments.own.settings import OwnConfig
from pact_nemo.environments.own.user import EndpointUser
from pact_nemo.environments.sessions import after_the_end, shown_to_policy
from pact_nemo.objective.rewards import values_equal

ERROR = "Error"  #: how the observation of a call begins that went wrong
Message = dict[str, Any]


@dataclass(frozen=True)
class ExpectedState:
    """What ``state()`` gives after the expected calls; a JSON value, ``None`` too."""

    value: Any


@dataclass(frozen=True)
class Judge:
    """How an episode is judged.

    Attributes:
        settings: the section ``agent``.
        scored: the tools have a ``score()``.
        expected_state: that the expected calls lead to; None where the state is no judge.
        endpoint: scores an episode that nothing else judges; None: there is no such judge.
    """

    settings: OwnConfig
    scored: bool
    expected_state: ExpectedState | None
    endpoint: Callable[[Mapping[str, Any]], float] | None = None


class Simulated:
    """The user of one episode whom a model plays.

    Args:
        user: plays them.
        told: the task's own instructions for them.
        script: what the user says later, for episodes that are played without a policy. None: the model is asked.

    Attributes:
        seed: of the episode.
        turns: user messages so far, the request among them.
        stopped: whether the user ended the conversation.
    """

    def __init__(self, user: EndpointUser, told: str, script: Sequence[Sequence[Message]] | None = None):
        self._user, self._told = user, told
        self._script = None if script is None else list(script)
        self.seed, self.turns, self.stopped = 0, 1, False

    def following(self, messages: Sequence[Message]) -> list[Message]:
        """The user's next messages, in answer to a conversation; the last ones where :attr:`stopped` is set then. Empty
        where the assistant has said nothing, or the turns are used up.

        Raises:
            EnvironmentFailure: the model doesn't answer.
        """
        if self._script is not None:
            found = [dict(each) for each in self._script.pop(0)] if self._script else []
            self.stopped = not found
            found = found or [{"role": "user", "content": self._user.settings.stop[0]}]
        elif self.turns >= self._user.settings.max_turns or not visible(messages[-1]["content"]):
            return []
        else:
            said = self._user.reply(self._told, messages, self.seed + self.turns)
            self.stopped = self._user.ends(said)
            found = [{"role": "user", "content": said}]
        self.turns += not self.stopped
        return found


class OwnSession:
    """An episode. Which judge speaks: ``score()``, else the answer, the state, the endpoint, the expected calls.

    Args:
        task: what is being solved.
        tools: of this episode alone.
        aliases: names of tools and arguments as the model sees them.
        judge: how the episode is judged.
        max_observation_chars: longer observations are cut for the policy; judges see them whole. None: no limit.
        user: plays the user after the request; None: the task tells what is said.
    """

    def __init__(
        self,
        task: Task,
        tools: OpenTools,
        aliases: Aliases,
        judge: Judge,
        max_observation_chars: int | None,
        user: Simulated | None = None,
    ):
        self.task = task
        self._user = user
        self._tools, self._aliases, self._judge = tools, aliases, judge
        self._limit = max_observation_chars
        self._offered = {tool["name"] for tool in task.tools}
        self._calls: list[list[tuple[ToolCall, str]]] = [[]]
        self._messages: list[Message] = [dict(message) for message in task.user_turns[0]]
        self._answer = ""
        self._closed = False

    def execute(self, calls: list[ToolCall]) -> list[str]:
        """See :class:`~pact_nemo.environments.base.Session`. Judges see the calls by the tools' own names."""
        if self._closed:
            raise after_the_end(self.task)
        own = [self._aliases.own(call) for call in calls]
        observations = [self._run(shown, call) for shown, call in zip(calls, own, strict=True)]
        self._calls[-1] += zip(own, observations, strict=True)
        first = sum(len(message.get("tool_calls", ())) for message in self._messages)
        names = [f"call_{first + index}" for index in range(len(own))]
        self._messages.append({"role": "assistant", "content": None, "tool_calls": list(map(_tool_call, names, own))})
        self._messages += [
            {"role": "tool", "tool_call_id": name, "content": text}
            for name, text in zip(names, observations, strict=True)
        ]
        return shown_to_policy(observations, self._limit)

    def _run(self, shown: ToolCall, own: ToolCall) -> str:
        if shown.name not in self._offered:
            return f"{ERROR}: unknown tool {shown.name!r}. Available: {', '.join(sorted(self._offered))}"
        text = self._tools.call(own.name, own.arguments)
        return self._aliases.shown_text(own.name, text) if text.startswith(f"{ERROR}:") else text

    def next_user_turn(self, message: str = "") -> tuple[list[dict[str, str]], list[dict[str, Any]]] | None:
        """See :class:`~pact_nemo.environments.base.Session`. The task's user turns come one after another, or a model
        says them.

        Raises:
            EnvironmentFailure: it doesn't answer.
        """
        self._answer = message
        self._messages.append({"role": "assistant", "content": message})
        if self._user is not None:
            messages = self._user.following(self._messages)
        elif len(self._calls) < len(self.task.user_turns):
            messages = [dict(each) for each in self.task.user_turns[len(self._calls)]]
        else:
            messages = []
        self._messages += messages
        if not messages or (self._user is not None and self._user.stopped):
            return None
        self._calls.append([])
        return messages, []

    def seeded(self, seed: int) -> None:
        """See :class:`~pact_nemo.environments.base.Session`."""
        if self._user is not None:
            self._user.seed = seed

    def outcome(self) -> Outcome:
        """See :class:`~pact_nemo.environments.base.Session`.

        Raises:
            EnvironmentFailure: the user's ``score()`` or ``state()`` failed, or the judge's endpoint. That is never a
                reward of 0.
        """
        judge, score = self._judged()
        done = [text for turn in self._calls for _, text in turn]
        metrics = {
            "calls": float(len(done)),
            "invocation_errors": float(sum(text.startswith(f"{ERROR}:") for text in done)),
        }
        if self._user is not None:
            metrics |= {"user_turns": float(self._user.turns), "user_stopped": float(self._user.stopped)}
        if any(self.task.data["expected"]):
            metrics["expected_calls"] = self._expected_share()
        success = score >= self._judge.settings.success_score
        return Outcome(success, score, "ok" if success else judge, metrics)

    def _judged(self) -> tuple[str, float]:
        """(name of the judge for a failure, score)."""
        if self._judge.scored:
            return "score", self._tools.score(self._episode())
        if self.task.data["answers"]:
            if not visible(self._answer):
                return "no closing message", 0.0
            return "wrong answer", answer_score(self._judge.settings.answer, self._answer, self.task.data["answers"])
        if self._judge.expected_state is not None:
            return "wrong state", float(values_equal(self._tools.state(), self._judge.expected_state.value))
        if self._judge.endpoint is not None:
            return "judge", self._judge.endpoint(self._episode())
        return "expected calls missing", float(self._expected_share() == 1.0)

    def _expected_share(self) -> float:
        made = [[call for call, _ in turn] for turn in self._calls]
        reads = self._judge.settings.read_only  # no reference calls, so nobody waits for them here either
        expected = [[call for call in calls if call.name not in reads] for calls in self.task.data["expected"]]
        if self.task.any_turn:
            made, expected = [sum(made, [])], [sum(map(list, expected), [])]
        return expected_share(made, expected)

    def _episode(self) -> dict[str, Any]:
        return {
            "task": self.task.data["row"],
            "messages": self._messages,
            "calls": [
                {"name": call.name, "arguments": call.arguments, "observation": text, "user_turn": index}
                for index, turn in enumerate(self._calls)
                for call, text in turn
            ],
            "answer": self._answer,
        }

    def close(self) -> None:
        """See :class:`~pact_nemo.environments.base.Session`."""
        if not self._closed:
            self._closed = True
            self._tools.close()


def _tool_call(name: str, call: ToolCall) -> dict[str, Any]:
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return {"id": name, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def state_after(tools: OpenTools, calls: Sequence[Sequence[ToolCall]]) -> tuple[Any, str | None]:
    """(state after the calls, the first observation that is an error); the tools are closed."""
    try:
        observations = [tools.call(call.name, call.arguments) for turn in calls for call in turn]
        return tools.state(), next((text for text in observations if text.startswith(f"{ERROR}:")), None)
    finally:
        tools.close()
