"""A user behind an OpenAI-compatible endpoint: a model that is told what it wants, and answers what the assistant says.

It sees the conversation with the roles swapped: its own words are the assistant's, the policy's are the user's. Calls,
observations and system messages are none of its business. What the policy says is data for it, and a policy can learn
to talk a user into saying that all is well: a check that is code looks at what was done.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from pact_nemo.environments.answers import visible
from pact_nemo.environments.own.asked import Asked
from pact_nemo.environments.own.judge import text_of
from pact_nemo.environments.own.settings import UserConfig
from pact_nemo.errors import EnvironmentFailure, ServerError
from pact_nemo.serving.chat_endpoint import chat_endpoint, whole

_TRIES = 2  #: of each reply, where it says nothing
_SEEDS = 1 << 31  #: endpoints take seeds below


class EndpointUser:
    """Plays the users of all episodes; thread-safe.

    Attributes:
        instructions: what every user is told; empty where only the rows tell.
        settings: the section ``agent.user``; its ``url`` is set.

    Raises:
        ConfigError: the instructions or the cache can't be read.
    """

    def __init__(self, settings: UserConfig):
        self.settings = settings
        assert settings.url is not None and settings.model is not None  # the settings were checked
        path, remedy = settings.instructions, "say how a user talks, or leave it to the rows' user_instructions"
        self.instructions = "" if path is None else text_of("agent.user.instructions", path, remedy)
        key = os.environ.get(settings.key_env, "none")
        self._complete = chat_endpoint(settings.url, settings.model, key, settings.timeout, settings.temperature)
        self._known = Asked("agent.user.cache", settings.cache, "reply", _words)

    def reply(self, told: str, messages: Sequence[Mapping[str, Any]], seed: int) -> str:
        """What the user says next.

        Args:
            told: the row's instructions, which follow those of every user.
            messages: the conversation so far, in OpenAI's format, with calls and observations.
            seed: of this rollout and turn; sent where the temperature is above 0.

        Raises:
            EnvironmentFailure: the endpoint doesn't answer, or says nothing. That is never a reward of 0.
        """
        asked = self.seen(told, messages)
        if self.settings.temperature > 0:
            return self._asked(asked, seed % _SEEDS)
        words = (self.settings.url, self.settings.model, *(each[key] for each in asked for key in ("role", "content")))
        return self._known.get(words, lambda: self._asked(asked, None))

    def seen(self, told: str, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
        """The messages that the endpoint is asked with: a system message, the greeting, and what both said."""
        swapped = {"user": "assistant", "assistant": "user"}
        said = [
            {"role": swapped[message["role"]], "content": message["content"]}
            for message in messages
            if message["role"] in swapped and message["content"] and not message.get("tool_calls")
        ]
        system = "\n\n".join(text for text in (self.instructions, told) if text)
        return [{"role": "system", "content": system}, {"role": "user", "content": self.settings.greeting}, *said]

    def ends(self, reply: str) -> bool:
        """Whether a reply says that the conversation is over."""
        return any(word in reply for word in self.settings.stop)

    def _asked(self, messages: list[dict[str, str]], seed: int | None) -> str:
        for _ in range(_TRIES):
            try:
                answer = whole(self._complete(messages, [], seed), "the user's message")
            except ServerError as error:
                raise EnvironmentFailure(f"agent.user: {error}") from error
            if (said := _words(answer.get("content"))) is not None:
                return said
        raise EnvironmentFailure(f"agent.user: the user says nothing; the endpoint answers {str(answer)[:200]}")


def _words(content: Any) -> str | None:
    """What a message says outside of its thoughts; None for nothing."""
    return (visible(content) or None) if isinstance(content, str) else None
