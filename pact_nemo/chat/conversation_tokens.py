"""Conversations as token ids: prompts, what comes between two assistant messages, and assistant text itself.

``prompt + sampled ids + continuation + …`` is what the template would render for the whole conversation, while sampled
ids are never re-tokenised.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pact_nemo.chat.conversation_text import ASSISTANT, OBSERVED, ConversationText
from pact_nemo.chat.encoding import TextEncoder
from pact_nemo.chat.probing import USER
from pact_nemo.chat.rendering import Message
from pact_nemo.chat.tool_formats import SEPARATOR, ToolFormat, Tools
from pact_nemo.errors import ConfigError, DataError

BOUNDARY_TEXT = "The reference attempt ends here. Now solve the task yourself from the start."
#: end the turn where they are special tokens of the tokenizer
_END_TOKENS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
)


@dataclass(frozen=True)
class Continuation:
    """Template text after an assistant message.

    Attributes:
        text: from the end-of-turn token on.
        ids: its token ids; ``ids[0]`` is the end-of-turn token.
        offsets: half-open character range of each token in ``text``.
    """

    text: str
    ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class AssistantParts:
    """An assistant message as the policy writes it behind the generation prompt; the four texts concatenate to it.

    Attributes:
        opening: the marker that opens the thought; empty without thoughts, and where the generation prompt holds it.
        reasoning: u.
        switch: what leads from the reasoning to the call: the marker that closes the thought, else one line break.
        calls: the call text a, or a final answer.
    """

    opening: str
    reasoning: str
    switch: str
    calls: str

    @property
    def text(self) -> str:
        return self.opening + self.reasoning + self.switch + self.calls


class ConversationTokens(ConversationText):
    """The pieces of conversations as token ids of one tokenizer.

    Attributes:
        tokenizer: the Hugging Face fast tokenizer.
        end_of_turn_id: the token that the chat template puts after an assistant message.
        eos_ids: token ids that stop generation; the first one is ``end_of_turn_id``.

    Args:
        tokenizer: fast tokenizer with a chat template.
        tool_format: instance from :data:`pact_nemo.chat.tool_formats.TOOL_FORMATS`.
        template_kwargs: constants handed to the chat template.
        end_ids: further ids that stop generation.

    Raises:
        ConfigError: the template can't be cut into pieces, or ends an assistant message without a special token.
    """

    def __init__(
        self, tokenizer: Any, tool_format: ToolFormat, template_kwargs: Mapping[str, Any], end_ids: Sequence[int]
    ):
        self.tokenizer = tokenizer
        try:
            super().__init__(tokenizer, tool_format, template_kwargs)
            self._encoder = TextEncoder(tokenizer, self.plain([USER], True))
            after = self.after_assistant(self.observed(), generation=True)
            end_ids = [*self._encoder.whole(after)[0][:1], *end_ids]
        except DataError as error:
            raise ConfigError(f"the model's chat template can't be used: {error}") from error
        special = self._control.special
        if end_ids[0] not in tokenizer.convert_tokens_to_ids(sorted(special)):
            raise ConfigError(
                f"{self.source} doesn't end an assistant message with a special token; take a template that does"
            )
        self._control.guard_observations(after, thoughts=self.thought is not None or bool(self.generation_thought))
        self.end_of_turn_id: int = end_ids[0]
        extra = [
            tokenizer.eos_token_id,
            *tokenizer.convert_tokens_to_ids([token for token in _END_TOKENS if token in special]),
        ]
        self.eos_ids: list[int] = list(
            dict.fromkeys([*end_ids[:1], *(i for i in extra if i is not None), *end_ids[1:]])
        )
        self._continuation = lru_cache(maxsize=4096)(self._continuation_uncached)

    def prompt_ids(self, messages: Sequence[Message], tools: Tools = ()) -> list[int]:
        """x: token ids of ``messages`` with the tool schemas, ending with the generation prompt.

        Raises:
            DataError: the template refuses the conversation, or leaves one of its messages out.
        """
        text = self.render(messages, tools)
        self.check_shown(messages, text)
        return self.encode_whole(text)

    def continuation_ids(self, messages: Sequence[Message], after_eos: bool, new_tools: Tools = ()) -> list[int]:
        """Tokens between the end of a sampled assistant message and the start of the next one.

        Args:
            messages: the tool or user messages in between.
            after_eos: the sampled ids already end with the end-of-turn token, so it is not repeated.
            new_tools: tools revealed now; their text is put before the first of ``messages``.
        """
        return list(self.continuation(messages, new_tools).ids[1 if after_eos else 0 :])

    def boundary_ids(self, text: str = BOUNDARY_TEXT) -> list[int]:
        """Tokens from the end of h* to the start of the rollout: a user turn that closes the trace, and the generation
        prompt.

        Raises:
            ConfigError: the template renders an earlier tool result differently once a user turn follows.
        """
        conversation = [USER, ASSISTANT, *self.observed()]
        try:
            head = self.plain(conversation, generation=False)
            whole = self.plain([*conversation, {"role": "user", "content": text}], generation=True)
        except DataError as error:
            raise ConfigError(
                f"a user turn that follows a tool result, as the end of a trace has it: {error}"
            ) from error
        end = head.rpartition(OBSERVED)[2]
        tail = whole.rpartition(OBSERVED)[2]
        if not tail.startswith(end):
            raise ConfigError(
                f"{self.source} rewrites tool results when a user turn follows; literal concatenation is impossible"
            )
        return self._encoder.after(whole.removesuffix(tail) + end, tail.removeprefix(end))[0]

    def boundary_after_nothing_ids(self, text: str = BOUNDARY_TEXT) -> list[int]:
        """:meth:`boundary_ids` where no trace stands before it: closes x's assistant message, in which nothing is said.

        Raises:
            ConfigError: the generation prompt opens a thought, which an empty message would leave open.
        """
        if self.opens_thought:
            raise ConfigError(
                f"traces.control=none: the generation prompt of {self.source} opens a thought; take"
                " traces.control=other_task"
            )
        return self.continuation_ids([{"role": "user", "content": text}], after_eos=False)

    def generation_ids(self) -> list[int]:
        """Tokens that open an assistant message, e.g. ``<|im_start|>assistant\\n``."""
        return self._encoder.after(self.plain([USER], False), self.generation)[0]

    def visible_generation_ids(self) -> list[int]:
        """:meth:`generation_ids` without what belongs to the thought: the start of an earlier message whose thought the
        template drops; there ``hidden_text`` and the visible text follow.
        """
        return self._encoder.after(self.plain([USER], False), self.generation.removesuffix(self.generation_thought))[0]

    def continuation(self, messages: Sequence[Message], new_tools: Tools = (), generation: bool = True) -> Continuation:
        """Everything from an assistant message's end-of-turn token on, as text, ids and offsets; cached."""
        conversation = [dict(message) for message in messages]
        if new_tools:
            if not conversation:
                raise ConfigError("tools can only be revealed together with a message")
            revealed = self.tool_format.render_new_tools([self._control.neutral_tool(tool) for tool in new_tools])
            conversation[0]["content"] = f"{revealed}\n{conversation[0]['content']}"
        return self._continuation(json.dumps(conversation, ensure_ascii=False), generation)

    def _continuation_uncached(self, messages_json: str, generation: bool) -> Continuation:
        messages = json.loads(messages_json)
        text = self.after_assistant(messages, generation)
        self.check_shown([message for message in messages if message["role"] != "assistant"], text)
        ids, offsets = self._encoder.whole(text)
        if ids[0] != self.end_of_turn_id:
            raise ConfigError(f"{self.source} ends assistant messages differently depending on what follows")
        return Continuation(text, tuple(ids), tuple(offsets))

    def assistant_parts(self, reasoning: str, calls: str) -> AssistantParts:
        """An assistant message with this reasoning and call text (or answer) in the form that the policy samples behind
        the generation prompt.

        A thinking model writes the reasoning as its thought, and an empty thought where there is none. Others put a
        line break between the two.
        """
        if self.thought is None:
            return AssistantParts("", reasoning, SEPARATOR if reasoning and calls else "", calls)
        return AssistantParts(self.thought.written, reasoning, self.thought.closing, calls)

    def encode_whole(self, text: str) -> list[int]:
        """Token ids of a rendered conversation from its start."""
        return self._encoder.whole(text)[0]

    def encode_assistant(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of an assistant message, end-of-turn left out, and each token's half-open character range in
        ``text``.

        Raises:
            DataError: the text holds half a surrogate pair.
        """
        return self._encoder.assistant(text)

    def check_assistant(self, ids: Sequence[int]) -> None:
        """Raises DataError where an assistant message's ids, end-of-turn left out, hold a token that ends a turn or
        opens a role: text that a message may quote, but the tokenizer makes such a token of it.
        """
        found = self._control.steering_token(ids)
        if found is not None:
            raise DataError(
                f"a message holds the text of the special token {self.tokenizer.convert_ids_to_tokens(found)!r}; take"
                " it out"
            )

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens other than a trailing end-of-turn included (a model may write
        ``<tool_call>`` as one).
        """
        kept = list(ids)
        while kept and kept[-1] in self.eos_ids:
            kept.pop()
        return self._encoder.decode(kept)
