"""An OpenAI-compatible chat-completions endpoint as one function."""

from __future__ import annotations

import http.client
import json
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pact_nemo.errors import ServerError
from pact_nemo.serving import proxies

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

    A proxy of the environment is used for addresses that are neither this machine's nor private
    (:mod:`pact_nemo.serving.proxies`).

    Raises:
        ServerError: (from the function) the endpoint is unreachable, late, or answers something else than a chat
            completion.
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
            with proxies.opener(base_url).open(request, timeout=timeout_seconds) as response:
                reply = json.load(response)
            message = reply["choices"][0]["message"]
            usage = reply.get("usage") or {}
            if on_usage is not None:
                on_usage(int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))
        except (OSError, http.client.HTTPException, ValueError, KeyError, IndexError, TypeError) as error:
            raise ServerError(f"chat endpoint {base_url}: {error!r}{proxies.in_between(base_url)}") from error
        if not isinstance(message, dict):
            raise ServerError(f"chat endpoint {base_url}: the answer holds no message")
        return message

    return complete
