"""Episodes through a chat-completions endpoint, for models that are only evaluated: messages in, messages out, no token
ids.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from pact_nemo.chat.json_calls import call_from
from pact_nemo.chat.thoughts import OPENING, thoughts_and_visible
from pact_nemo.environments.base import Environment, Task, ToolCall
from pact_nemo.environments.sessions import opening_messages, seed_session
from pact_nemo.errors import EnvironmentFailure, ServerError, ToolCallError
from pact_nemo.rollouts.types import Rollout, Turn
from pact_nemo.serving.chat_endpoint import CUT, Complete
from pact_nemo.serving.config import EpisodeLimits

#: where servers put a thought: DeepSeek's and older vLLM's name, then the one of current vLLM and OpenRouter
_THOUGHT_KEYS = ("reasoning_content", "reasoning")


class Watcher(Protocol):
    """Hears of an episode as it is played."""

    def assistant(self, answer: Mapping[str, Any], turn: Turn) -> None:
        """An assistant message and the turn made of it, its calls executed."""
        ...

    def user(self, messages: Sequence[dict[str, str]], revealed: Sequence[dict[str, Any]], user_turn: int) -> None:
        """User turn ``user_turn`` begins; ``revealed``: tools that are new from here on."""
        ...


def read_calls(message: Mapping[str, Any], tools: Sequence[Mapping[str, Any]] = ()) -> list[tuple[str, ToolCall | str]]:
    """(call id, the call or what is wrong with it) of each tool call of an assistant message; read as
    :mod:`pact_nemo.chat.json_calls` says.
    """
    calls: list[tuple[str, ToolCall | str]] = []
    given = message.get("tool_calls") or []
    if not isinstance(given, list):
        return [("0", f"tool_calls is no list: {given!r:.60}")]
    for index, item in enumerate(given):
        identifier = str(item.get("id") or index) if isinstance(item, dict) else str(index)
        try:
            function = item.get("function") if isinstance(item, dict) else item
            calls.append(
                (identifier, call_from(function, tools))
            )  # what else an endpoint says of a call is its own business
        except ToolCallError as error:
            calls.append((identifier, str(error)))
    return calls


def content_text(message: Mapping[str, Any]) -> str:
    """The content of an assistant message as text; of a list of parts, its texts."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return str(content or "")


def message_parts(message: Mapping[str, Any]) -> tuple[str, str]:
    """(thought, visible text) of an assistant message, both without outer white space.

    A server with a reasoning parser puts the thought beside the content; one without leaves it in the content, between
    its markers. The opening marker is missing there where the generation prompt holds it. A content that begins with a
    thought of its own has both.
    """
    text = content_text(message)
    beside = next(
        (message[key].strip() for key in _THOUGHT_KEYS if isinstance(message.get(key), str) and message[key].strip()),
        "",
    )
    if beside and not text.lstrip().startswith(
        OPENING
    ):  # what the parser left is all visible, a closing marker in it a word
        return beside, text.strip()
    inside, visible = thoughts_and_visible(text)
    return "\n\n".join(dict.fromkeys(piece for piece in (beside, inside) if piece)), visible


def _answers(session: Any, named: list[tuple[str, ToolCall | str]], turn: Turn) -> list[dict[str, Any]]:
    """Run the calls of a turn, note in it what they were and gave, and return their messages in the calls' order."""
    turn.calls = [call for _, call in named if isinstance(call, ToolCall)]
    turn.call_errors = [call for _, call in named if isinstance(call, str)]
    unread = [f"Error: the call could not be read: {error}" for error in turn.call_errors]
    observations = _observe(session, turn.calls)
    good, bad = iter(observations), iter(unread)
    turn.observations = observations + unread
    return [
        {
            "role": "tool",
            "tool_call_id": identifier,
            "content": next(good) if isinstance(call, ToolCall) else next(bad),
        }
        for identifier, call in named
    ]


def play_by_chat(
    environment: Environment,
    task: Task,
    sample: int,
    complete: Complete,
    limits: EpisodeLimits,
    watcher: Watcher | None = None,
) -> Rollout:
    """One episode. Malformed calls are answered by error observations; never raises for a server or environment
    failure.

    What the watcher raises ends the episode and is passed on.

    Returns:
        a rollout without tokens (``prompt_ids`` and ``token_ids`` are empty): for scoring, not for training.
    """
    started = time.perf_counter()
    rollout = Rollout(task.id, sample, [], [], [], [], [], None, 0)
    messages: list[dict[str, Any]] = []
    tools, user_turn, here = list(task.tools), 0, 0
    session = None
    try:
        session = environment.start(task)
        seed_session(session, sample)
        messages += opening_messages(session, task)
        while True:
            if here >= limits.max_turns_per_user_turn or len(rollout.turns) >= limits.max_turns:
                rollout.status, rollout.limit, rollout.error = "truncated", "turns", f"no end after {here} turns"
                break
            answer = complete(messages, tools)
            here += 1
            turn = Turn(0, 0, text := content_text(answer), user_turn=user_turn)
            rollout.turns.append(turn)
            if _cut_off(rollout, answer):
                break
            named = read_calls(answer, tools)
            if named:
                said = {"role": "assistant", "content": text, "tool_calls": answer["tool_calls"]}
                messages += [said, *_answers(session, named, turn)]
            if watcher is not None:
                watcher.assistant(answer, turn)
            if named:
                continue
            messages.append({"role": "assistant", "content": text})
            if (following := session.next_user_turn(turn.visible)) is None:
                break
            turn.reply = [dict(message) for message in following[0]]
            user_turn, here = user_turn + 1, 0
            if watcher is not None:
                watcher.user(*following, user_turn)
            messages += [dict(message) for message in following[0]]
            tools += following[1]
        rollout.outcome = session.outcome()
    except (ServerError, EnvironmentFailure) as error:
        rollout.status, rollout.outcome, rollout.error = "failed", None, f"{type(error).__name__}: {error}"
    finally:
        if session is not None:
            session.close()
    rollout.seconds = time.perf_counter() - started
    return rollout


def _cut_off(rollout: Rollout, answer: Mapping[str, Any]) -> bool:
    """Whether the endpoint's limit cut the last turn's message off. It is not acted on, as in training."""
    if not answer.get(CUT):
        return False
    rollout.turns[-1].finish_reason, rollout.status, rollout.limit = "length", "truncated", "turn_tokens"
    rollout.error = f"assistant turn {len(rollout.turns)} was cut at the endpoint's limit"
    return True


def _observe(session: Any, calls: list[ToolCall]) -> list[str]:
    if not calls:
        return []
    try:
        return list(session.execute(calls))
    except ToolCallError as error:
        return [f"Error: {error}"] * len(calls)
