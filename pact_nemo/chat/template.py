"""The chat format of a model folder: the text and the tokens of its conversations, checked against its own template.

Every piece is cut out of the model's own chat template, rendered on a dummy conversation. So
``prompt + sampled ids + continuation + …`` is what the template would render for the whole conversation, while sampled
ids are never re-tokenised. That this holds is checked when a :class:`ChatFormat` is made
(:mod:`pact_nemo.chat.checks`); a template or tokenizer of which it doesn't hold is refused by name.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from pact_nemo.chat.checks import check_conversation
from pact_nemo.chat.contexts import EARLIER_THOUGHTS, KEEP, Contexts
from pact_nemo.chat.conversation_text import ASSISTANT, MARK
from pact_nemo.chat.conversation_tokens import ConversationTokens
from pact_nemo.chat.probing import USER, Earlier
from pact_nemo.chat.rendering import Message
from pact_nemo.chat.thoughts import CLOSING, OPENING
from pact_nemo.chat.tool_formats import ToolFormat, tool_format
from pact_nemo.errors import ConfigError, DataError


class ChatFormat(ConversationTokens):
    """The text and token conventions of one model folder with one tool format, and how its contexts show thoughts of
    earlier messages.

    Attributes beyond those of :class:`~pact_nemo.chat.conversation_text.ConversationText` and
    :class:`~pact_nemo.chat.conversation_tokens.ConversationTokens`:
        context_thoughts: ``earlier_thoughts`` as contexts have it: ``kept`` where that was asked for.
        opened_ids: the tokens of ``generation_thought``, which contexts lose with the thought; empty where they keep
            it.

    Args:
        tokenizer: fast tokenizer with a chat template.
        tool_format: instance from :data:`pact_nemo.chat.tool_formats.TOOL_FORMATS`.
        template_kwargs: constants handed to the chat template, e.g. ``{"enable_thinking": False}`` or
            ``{"date_string": "1 Jan 2026"}``.
        end_ids: further ids that stop generation, e.g. those of ``generation_config.json``.
        earlier_thoughts: ``keep`` leaves thoughts of earlier messages in the context; ``template`` or None does as the
            template does.

    Raises:
        ConfigError: no chat template, no fast tokenizer, or a template that drops, alters or repeats what the project
            has to show, that the conversation can't be cut from exactly, or that has no use for one of
            ``template_kwargs``. The message names template and remedy.
    """

    def __init__(
        self,
        tokenizer: Any,
        tool_format: ToolFormat,
        template_kwargs: Mapping[str, Any] | None = None,
        end_ids: Sequence[int] = (),
        earlier_thoughts: str | None = None,
    ):
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError("the tokenizer has no chat template; add chat_template.jinja to the model folder")
        if not tokenizer.is_fast:
            raise ConfigError("a fast tokenizer is needed: character offsets come from it")
        super().__init__(tokenizer, tool_format, template_kwargs or {}, end_ids)
        self._earlier_frame = lru_cache(maxsize=2)(self._earlier_frame_uncached)
        self.context_thoughts, self.opened_ids = self._context_thoughts(earlier_thoughts)
        check_conversation(self)

    @classmethod
    def from_pretrained(
        cls,
        model_dir: str | os.PathLike[str],
        tool_format_name: str,
        template_kwargs: Mapping[str, Any] | None = None,
        earlier_thoughts: str | None = None,
    ) -> ChatFormat:
        """Load the tokenizer of a local Hugging Face folder. Raises ConfigError for an unknown tool format or an unfit
        tokenizer.
        """
        from transformers import AutoTokenizer  # takes seconds: not for --help and --dry-run

        form = tool_format(tool_format_name)
        try:
            # without the last word transformers asks on the terminal whether to run the folder's own code
            tokenizer = AutoTokenizer.from_pretrained(
                os.fspath(model_dir), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # files of any content: each reader of them raises what it likes
            said = " ".join(f"{type(error).__name__}: {error}".split())
            raise ConfigError(
                f"{os.fspath(model_dir)}: no tokenizer could be loaded ({said}); "
                "copy tokenizer.json and tokenizer_config.json of the published model there"
            ) from error
        return cls(
            tokenizer, form, template_kwargs, _generation_end_ids(Path(model_dir), len(tokenizer)), earlier_thoughts
        )

    def contexts(self) -> Contexts:
        """The contexts of a new conversation."""
        return Contexts(self)

    def _context_thoughts(self, asked: str | None) -> tuple[Earlier, list[int]]:
        if asked not in (None, *EARLIER_THOUGHTS):
            raise ConfigError(
                f"model.earlier_thoughts={asked!r}: must be one of {', '.join(EARLIER_THOUGHTS)}, or null"
            )
        if asked == KEEP or self.earlier_thoughts == "kept":
            return "kept", []
        whole, visible = self.generation_ids(), self.visible_generation_ids()
        if whole[: len(visible)] != visible:
            raise ConfigError(
                f"{self.source} opens a thought within a token of its generation prompt; set"
                " model.earlier_thoughts=keep"
            )
        return self.earlier_thoughts, whole[len(visible) :]

    def earlier_ids(self, ids: Sequence[int], user: bool) -> list[int] | None:
        """How a sampled message is shown once the conversation goes on: None = as it was sampled, behind the whole
        generation prompt.

        Else the message without its thought: ``hidden_text``, and the sampled ids from behind the thought on. Only
        where the template's text begins within a token, or is another than the sampled one, that text is tokenised.

        Args:
            ids: the message, end-of-turn token included.
            user: whether a user has spoken since (else only tools).
        """
        if self.context_thoughts == "kept" or (self.context_thoughts == "until_user" and not user):
            return None
        text = self.decode(ids)
        shown, whole = self._earlier_text(text, user), self.generation_thought + text
        # without a thought, white space at most differs: ids stay as they came
        if shown == whole or not (OPENING in whole or CLOSING in whole):
            return None
        said = len(ids)
        while said and ids[said - 1] in self.eos_ids:
            said -= 1
        hidden = self.hidden_text if shown.startswith(self.hidden_text) else ""
        start = self._token_boundary(ids[:said], text, shown[len(hidden) :])
        if start is None:
            return [*self.encode_assistant(shown)[0], *ids[said:]]
        return [*(self.encode_assistant(hidden)[0] if hidden else []), *ids[start:]]

    def _earlier_text(self, text: str, user: bool) -> str:
        """What the template writes for an assistant message ``text`` that a user, or else tools, followed."""
        before, after = self._earlier_frame(user)
        whole = self.plain(self._earlier_conversation(text, user), False)
        if not (whole.startswith(before) and whole.endswith(after) and len(whole) >= len(before) + len(after)):
            raise DataError(f"{self.source} changes the conversation around an assistant message: {text!r:.80}")
        return whole[len(before) : len(whole) - len(after)]

    def _earlier_conversation(self, text: str, user: bool) -> list[Message]:
        return [USER, self.laid_out({"role": "assistant", "content": text}), *([USER] if user else self.observed())]

    def _earlier_frame_uncached(self, user: bool) -> tuple[str, str]:
        """Template text before such a message, its thought included, and after it."""
        before = self.plain([USER], True).removesuffix(self.generation_thought)
        conversation = self._earlier_conversation("", user)
        # as content: a template with a field for thoughts would take a message for an open one
        conversation[1] = ASSISTANT
        _, mark, after = self.plain(conversation, False).partition(MARK)
        if not mark:
            raise ConfigError(f"{self.source} drops what the assistant wrote earlier; take a template that shows it")
        return before, after

    def _token_boundary(self, ids: Sequence[int], text: str, tail: str) -> int | None:
        """Index of the token that ``tail``, the end of ``text``, begins with; None where it begins within one."""
        if not text.endswith(tail):
            return None
        head = text[: len(text) - len(tail)]
        start = bisect_left(range(len(ids)), len(head), key=lambda count: len(self.decode(ids[:count])))
        return start if self.decode(ids[:start]) == head else None


def _generation_end_ids(folder: Path, size: int) -> list[int]:
    """``eos_token_id`` of ``generation_config.json``: what stops the published model.

    Raises:
        ConfigError: the file can't be read, or names ids that the tokenizer hasn't.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return []
    try:
        value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError, OSError) as error:
        raise ConfigError(f"{path}: not a JSON object: {error}; take the file of the published model") from error
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(item, int) and not isinstance(item, bool) and 0 <= item < size for item in ids):
        raise ConfigError(f"{path}: eos_token_id={value}: not ids of the tokenizer, which has {size}; repair it")
    return list(ids)
