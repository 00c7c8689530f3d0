"""An OpenAI-compatible chat-completions endpoint as one function."""

from __future__ import annotations

import http.client
import json
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from pact_nemo.errors import ConfigError, ServerError
from pact_nemo.serving import proxies

#: key of an answer that the endpoint's token limit cut off, with True
CUT = "cut"
Messages = Sequence[Mapping[str, Any]]
Complete = Callable[[Messages, Messages], Mapping[str, Any]]


class Seeded(Protocol):
    """A :data:`Complete` that can be asked with a seed."""

    def __call__(self, messages: Messages, tools: Messages, seed: int | None = None) -> Mapping[str, Any]: ...


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: it would carry the key to another host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def chat_endpoint(
    base_url: str,
    model: str,
    api_key: str,
    timeout_seconds: float,
    temperature: float,
    on_usage: Callable[[int, int], None] | None = None,
) -> Seeded:
    """A function (messages, tools) → assistant message dict that asks ``POST <base_url>/chat/completions``.

    A ``seed`` is sent where one is given; whether the endpoint heeds it is its own affair.

    An answer that was cut off (``finish_reason`` is ``length``) has the key :data:`CUT`.

    ``on_usage`` hears of the prompt and completion tokens of every answer that says them.

    A proxy of the environment is used for addresses that are neither this machine's nor private
    (:mod:`pact_nemo.serving.proxies`).

    Raises:
        ConfigError: the address is none of http, or no header can carry the key; the key itself is not repeated.
        ServerError: (from the function) the endpoint is unreachable, late, or answers something else than a chat
            completion.
    """

    if not base_url.startswith(("http://", "https://")):
        raise ConfigError(f"the endpoint {base_url!r} has to begin with http:// or https://")
    key = api_key.strip()
    if not key.isascii() or not key.isprintable():
        raise ConfigError(f"the key for {base_url} holds a character that no header can carry; look at its variable")

    def complete(messages: Messages, tools: Messages, seed: int | None = None) -> Mapping[str, Any]:
        body: dict[str, Any] = {
            "model": model,
            "messages": list(messages),
            "temperature": temperature,
        }
        if seed is not None:
            body["seed"] = seed
        if tools:
            body["tools"] = [{"type": "function", "function": dict(tool)} for tool in tools]
        request = urllib.request.Request(
            f"{base_url.rstrip('/')}/chat/completions",
            data=json.dumps(body).encode("utf-8"),
            headers={"Content-Type": "application/json", "Authorization": f"Bearer {key}"},
        )
        try:
            with proxies.opener(base_url, _NoRedirect()).open(request, timeout=timeout_seconds) as response:
                reply = json.load(response)
            message, reason = reply["choices"][0]["message"], reply["choices"][0].get("finish_reason")
            usage = reply.get("usage") or {}
            if on_usage is not None:
                on_usage(int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))
        except (OSError, http.client.HTTPException, ValueError, KeyError, IndexError, TypeError) as error:
            raise ServerError(f"chat endpoint {base_url}: {error!r}{proxies.in_between(base_url)}") from error
        if not isinstance(message, dict):
            raise ServerError(f"chat endpoint {base_url}: the answer holds no message")
        return {**message, CUT: True} if reason == "length" else message

    return complete


def whole(answer: Mapping[str, Any], what: str) -> Mapping[str, Any]:
    """An answer that was not cut off.

    Raises:
        ServerError: the endpoint's limit cut it off; ``what`` says whose it is.
    """
    if answer.get(CUT):
        raise ServerError(f"{what} was cut off at the endpoint's token limit; raise its limit for an answer")
    return answer
