"""Chat template to token ids: prompts, what comes between two assistant messages, and assistant text itself.

Every piece is cut out of the model's own chat template, rendered on a dummy conversation. So ``prompt + sampled ids + continuation + …``
is what the template would render for the whole conversation, while sampled ids are never re-tokenised.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError

from pact_nemo.chat.tool_formats import ToolFormat, Tools, tool_format
from pact_nemo.errors import ConfigError, DataError

Message = Mapping[str, Any]

BOUNDARY_TEXT = "The reference attempt ends here. Now solve the task yourself from the start."
_TEMPLATE_FAILS = (
    TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError, SyntaxError, MemoryError
)  # fmt: skip
_USER = {"role": "user", "content": "U"}
_MARK = "\u2042MARK\u2042"
_ASSISTANT = {"role": "assistant", "content": _MARK}
_END_TOKENS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "</s>")


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


class ChatFormat:
    """The text and token conventions of one model folder with one tool format.

    Attributes:
        tokenizer: the Hugging Face fast tokenizer.
        tool_format: how tools, calls and observations are written.
        end_of_turn_id: the token that the chat template puts after an assistant message.
        eos_ids: token ids that stop generation; the first one is ``end_of_turn_id``.

    Args:
        tokenizer: fast tokenizer with a chat template.
        tool_format: instance from :data:`pact_nemo.chat.tool_formats.TOOL_FORMATS`.
        template_kwargs: constants handed to the chat template, e.g. ``{"enable_thinking": False}`` or ``{"date_string": "1 Jan 2026"}``.

    Raises:
        ConfigError: no chat template, no fast tokenizer, or the template doesn't end an assistant message with a special token.
    """

    def __init__(self, tokenizer: Any, tool_format: ToolFormat, template_kwargs: Mapping[str, Any] | None = None):
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError("the tokenizer has no chat template; add chat_template.jinja to the model folder")
        if not tokenizer.is_fast:
            raise ConfigError("a fast tokenizer is needed: character offsets come from it")
        self.tokenizer = tokenizer
        self.tool_format = tool_format
        self._kwargs = dict(template_kwargs or {})
        self._lock = threading.Lock()  # fast tokenizers may refuse concurrent use ("Already borrowed")
        self._native_tools = tool_format.native and "tools" in str(tokenizer.chat_template)
        self._special = re.compile("|".join(re.escape(token) for token in sorted(tokenizer.all_special_tokens, key=len, reverse=True)))
        try:
            end_ids = self._tokenize(self._after_assistant([], generation=False))
        except DataError as error:
            raise ConfigError(f"the model's chat template can't be used: {error}") from error
        if not end_ids or end_ids[0] not in tokenizer.all_special_ids:
            raise ConfigError("the chat template doesn't end an assistant message with a special token")
        self.end_of_turn_id: int = end_ids[0]
        vocabulary = tokenizer.get_vocab()
        extra = [tokenizer.eos_token_id, *(vocabulary.get(token) for token in _END_TOKENS)]
        self.eos_ids: list[int] = list(dict.fromkeys([self.end_of_turn_id, *(i for i in extra if i is not None)]))
        self._continuation = lru_cache(maxsize=4096)(self._continuation_uncached)

    @classmethod
    def from_pretrained(
        cls, model_dir: str | os.PathLike[str], tool_format_name: str, template_kwargs: Mapping[str, Any] | None = None
    ) -> ChatFormat:
        """Load the tokenizer of a local Hugging Face folder. Raises ConfigError for an unknown tool format or an unfit tokenizer."""
        from transformers import AutoTokenizer  # takes seconds: not for --help and --dry-run

        try:
            tokenizer = AutoTokenizer.from_pretrained(os.fspath(model_dir), local_files_only=True)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{os.fspath(model_dir)}: no tokenizer could be loaded: {error}") from error
        return cls(tokenizer, tool_format(tool_format_name), template_kwargs)

    # --- rendering -----------------------------------------------------------------------------------------------------------------

    def _neutral(self, message: Message) -> dict[str, Any]:
        """The message with special tokens in its content broken up (``<|im_end|>`` → ``< |im_end|>``): content can't forge a role or end
        a turn.
        """
        content = str(message["content"])
        return {**message, "content": self._special.sub(lambda match: f"{match.group()[0]} {match.group()[1:]}", content)}

    def render(self, messages: Sequence[Message], tools: Tools = (), generation: bool = True) -> str:
        """Text of a conversation. Tools go to the template where the format prefers that and the template can; else into the system
        message.

        Special tokens inside message contents are broken up first, assistant messages included.

        Raises:
            DataError: the template refuses the conversation, or fails on it.
        """
        conversation = [self._neutral(message) for message in messages]
        native: list[dict[str, Any]] | None = None
        if tools and self._native_tools:
            native = [{"type": "function", "function": dict(tool)} for tool in tools]
        elif tools:
            text = self.tool_format.render_tools(tools)
            if conversation and conversation[0]["role"] == "system":
                conversation[0]["content"] = f"{conversation[0]['content']}\n\n{text}"
            else:
                conversation.insert(0, {"role": "system", "content": text})
        try:
            return str(
                self.tokenizer.apply_chat_template(conversation, tools=native, tokenize=False, add_generation_prompt=generation, **self._kwargs)
            )
        except _TEMPLATE_FAILS as error:
            # a template is a program of its own that sees whatever the conversation holds; Python may refuse what jinja makes of it
            raise DataError(f"the chat template can't render this conversation: {error!r}; change the conversation or the template") from error

    def _after_assistant(self, messages: Sequence[Message], generation: bool) -> str:
        """Template text between the last character of an assistant message and the end (``generation``: the next assistant message)."""
        text = self.render([_USER, _ASSISTANT, *messages], generation=generation)
        if text.count(_MARK) != 1:
            raise ConfigError("the chat template alters or repeats assistant content; it can't be cut at a message boundary")
        return text.partition(_MARK)[2]

    def _tokenize(self, text: str) -> list[int]:
        return self.encode_assistant(text)[0]

    # --- pieces of a conversation --------------------------------------------------------------------------------------------------

    def prompt_ids(self, messages: Sequence[Message], tools: Tools = ()) -> list[int]:
        """x: token ids of ``messages`` with the tool schemas, ending with the generation prompt."""
        return self._tokenize(self.render(messages, tools))

    def continuation_ids(self, messages: Sequence[Message], after_eos: bool, new_tools: Tools = ()) -> list[int]:
        """Tokens between the end of a sampled assistant message and the start of the next one.

        Args:
            messages: the tool or user messages in between.
            after_eos: the sampled ids already end with the end-of-turn token, so it is not repeated.
            new_tools: tools revealed now; their text is put before the first of ``messages``.
        """
        return self._cut(messages, after_eos, new_tools, generation=True)

    def interlude_ids(self, messages: Sequence[Message], after_eos: bool, new_tools: Tools = ()) -> list[int]:
        """:meth:`continuation_ids` without the closing generation prompt: ends after the last message's closing delimiter."""
        return self._cut(messages, after_eos, new_tools, generation=False)

    def boundary_ids(self, text: str = BOUNDARY_TEXT) -> list[int]:
        """Tokens from the end of h* to the start of the rollout: a user turn that closes the trace, and the generation prompt.

        Raises:
            ConfigError: the template renders earlier turns differently once a user turn follows.
        """
        observation = self.tool_format.render_observation(["O"])
        head = self.render([_USER, _ASSISTANT, *observation], generation=False)
        whole = self.render([_USER, _ASSISTANT, *observation, {"role": "user", "content": text}], generation=True)
        if not whole.startswith(head):
            raise ConfigError("the chat template rewrites earlier turns when a user turn follows; literal concatenation is impossible")
        return self._tokenize(whole[len(head) :])

    def generation_ids(self) -> list[int]:
        """Tokens that open an assistant message, e.g. ``<|im_start|>assistant\\n``."""
        whole, head = self.render([_USER], generation=True), self.render([_USER], generation=False)
        if not whole.startswith(head):
            raise ConfigError("the chat template's generation prompt is not a suffix")
        return self._tokenize(whole[len(head) :])

    def continuation(self, messages: Sequence[Message], new_tools: Tools = (), generation: bool = True) -> Continuation:
        """Everything from an assistant message's end-of-turn token on, as text, ids and offsets; cached."""
        conversation = [dict(message) for message in messages]
        if new_tools:
            if not conversation:
                raise ConfigError("tools can only be revealed together with a message")
            conversation[0]["content"] = f"{self.tool_format.render_new_tools(new_tools)}\n{conversation[0]['content']}"
        return self._continuation(json.dumps(conversation, ensure_ascii=False), generation)

    def _cut(self, messages: Sequence[Message], after_eos: bool, new_tools: Tools, generation: bool) -> list[int]:
        return list(self.continuation(messages, new_tools, generation).ids[1 if after_eos else 0 :])

    def _continuation_uncached(self, messages_json: str, generation: bool) -> Continuation:
        text = self._after_assistant(json.loads(messages_json), generation)
        ids, offsets = self.encode_assistant(text)
        if ids[0] != self.end_of_turn_id:
            raise ConfigError("the chat template ends assistant messages differently depending on what follows")
        return Continuation(text, tuple(ids), tuple(offsets))

    # --- assistant text ------------------------------------------------------------------------------------------------------------

    def encode_assistant(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of an assistant message, end-of-turn left out, and each token's half-open character range in ``text``.

        Raises:
            DataError: the text holds half a surrogate pair.
        """
        try:
            with self._lock:
                encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        except (TypeError, UnicodeError) as error:  # what the tokenizer says of half a surrogate pair
            raise DataError(f"a text can't be made into tokens: {error}; take out what isn't Unicode") from error
        return list(encoded["input_ids"]), [(int(a), int(b)) for a, b in encoded["offset_mapping"]]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens other than a trailing end-of-turn included (a model may write ``<tool_call>`` as one)."""
        kept = list(ids)
        while kept and kept[-1] in self.eos_ids:
            kept.pop()
        with self._lock:
            return str(self.tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False))
