"""Traces from a teacher model behind an OpenAI-compatible endpoint: it solves the task with the same tools; the checker verifies."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pact_nemo.environments.base import Environment, Task, ToolCall
from pact_nemo.errors import ServerError
from pact_nemo.traces.builder import TraceBuilder
from pact_nemo.traces.schema import ReasoningSegment, Trace
from pact_nemo.traces.segments import split_reasoning

Segment = Callable[[str, Sequence[str]], list[tuple[str, str]]]
Complete = Callable[[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]], Mapping[str, Any]]


def chat_endpoint(
    base_url: str,
    model: str,
    api_key: str,
    timeout_seconds: float,
    temperature: float,
    on_usage: Callable[[int, int], None] | None = None,
) -> Complete:
    """A function (messages, tools) → assistant message dict that asks ``POST <base_url>/chat/completions``.

    ``on_usage`` hears of the prompt and completion tokens of every answer that says them.

    Raises:
        ServerError: (from the function) the endpoint is unreachable, late, or answers something else than a chat completion.
    """

    def complete(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        body: dict[str, Any] = {
            "model": model,
            "messages": list(messages),
            "temperature": temperature,
        }
        if tools:
            body["tools"] = [{"type": "function", "function": dict(tool)} for tool in tools]
        request = urllib.request.Request(
            f"{base_url.rstrip('/')}/chat/completions",
            data=json.dumps(body).encode("utf-8"),
            headers={"Content-Type": "application/json", "Authorization": f"Bearer {api_key}"},
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout_seconds) as response:
                reply = json.load(response)
            message = reply["choices"][0]["message"]
            usage = reply.get("usage") or {}
            if on_usage is not None:
                on_usage(int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))
        except (urllib.error.URLError, TimeoutError, ValueError, KeyError, IndexError, TypeError) as error:
            raise ServerError(f"teacher endpoint {base_url}: {error!r}") from error
        if not isinstance(message, dict):
            raise ServerError(f"teacher endpoint {base_url}: the answer holds no message")
        return message

    return complete


def _calls(message: Mapping[str, Any]) -> list[tuple[str, ToolCall]]:
    """(call id, call) of each tool call; ValueError for a malformed one."""
    calls = []
    for item in message.get("tool_calls") or []:
        arguments = json.loads(item["function"]["arguments"] or "{}")
        if not isinstance(arguments, dict):
            raise ValueError("arguments are not an object")
        calls.append((str(item["id"]), ToolCall(str(item["function"]["name"]), arguments)))
    return calls


def teacher_trace(
    environment: Environment, task: Task, complete: Complete, max_turns: int, segment: Segment = split_reasoning
) -> Trace | None:
    """One teacher rollout as a trace, its messages without calls (answers) left out; ``verified`` is the checker's verdict.

    The result still has to pass :func:`pact_nemo.traces.filters.reject_reason`.

    Args:
        environment: where the calls run.
        task: what to solve. The teacher sees its user turns and tools, never its reference calls.
        complete: (messages, tools) → assistant message; see :func:`chat_endpoint`.
        max_turns: assistant turns per user turn.
        segment: (reasoning, tool names) → typed pieces whose texts concatenate to the reasoning.

    Returns:
        None if the teacher wrote a malformed call, made no call, or reached ``max_turns``.

    Raises:
        ServerError: from ``complete``.
    """
    tools = list(task.tools)
    messages: list[dict[str, Any]] = [dict(message) for message in task.user_turns[0]]
    builder = TraceBuilder()
    session = environment.start(task)
    user_turn = 0
    try:
        while True:
            for _ in range(max_turns):
                answer = complete(messages, tools)
                try:
                    named = _calls(answer)
                except (ValueError, KeyError, TypeError):
                    return None
                messages.append({"role": "assistant", "content": answer.get("content") or "", "tool_calls": answer.get("tool_calls") or []})
                if not named:
                    messages[-1].pop("tool_calls")
                    break
                observations = session.execute([call for _, call in named])
                for (call_id, _), text in zip(named, observations, strict=True):
                    messages.append({"role": "tool", "tool_call_id": call_id, "content": text})
                reasoning = str(answer.get("reasoning_content") or answer.get("content") or "")
                segments = [ReasoningSegment(*piece) for piece in segment(reasoning, [tool["name"] for tool in tools])]
                builder.assistant(segments, [call for _, call in named], observations, user_turn)
            else:
                return None
            upcoming = session.next_user_turn(str(answer.get("content") or ""))
            if upcoming is None:
                break
            following, revealed = upcoming
            if not builder.acted_in(user_turn):
                builder.assistant([ReasoningSegment("other", "No call is needed here.")], [], [], user_turn)
            builder.user(following, revealed)
            user_turn += 1
            messages += [dict(message) for message in following]
            tools += revealed
        outcome = session.outcome()
    finally:
        session.close()
    return builder.build(task.id, "teacher", outcome.success)
