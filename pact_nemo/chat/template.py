"""Chat template to token ids: prompts, what comes between two assistant messages, and assistant text itself.

Every piece is cut out of the model's own chat template, rendered on a dummy conversation. So
``prompt + sampled ids + continuation + …`` is what the template would render for the whole conversation, while sampled
ids are never re-tokenised. That this holds is checked when a :class:`ChatFormat` is made
(:mod:`pact_nemo.chat.checks`); a template or tokenizer of which it doesn't hold is refused by name.
"""

from __future__ import annotations

import json
import os
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pact_nemo.chat import probing
from pact_nemo.chat.contexts import EARLIER_THOUGHTS, KEEP, Contexts
from pact_nemo.chat.encoding import TextEncoder
from pact_nemo.chat.probing import (
    TOOL,
    USER,
    Earlier,
    find_thoughts,
    generation_text,
    observation_forms,
    openai_tool,
    shows_tools,
)
from pact_nemo.chat.rendering import ChatTemplate, Message
from pact_nemo.chat.thoughts import CLOSING, OPENING, ThoughtStyle, split_thought
from pact_nemo.chat.tool_formats import SEPARATOR, ToolFormat, Tools, tool_format
from pact_nemo.environments.base import ToolCall
from pact_nemo.errors import ConfigError, DataError

BOUNDARY_TEXT = "The reference attempt ends here. Now solve the task yourself from the start."
_MARK, _OBSERVED = "\u2042MARK\u2042", "OBSERVED-MARK"
_ASSISTANT = {"role": "assistant", "content": _MARK}
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
_TAG = re.compile(r"</?[A-Za-z_][\w.:-]*>|<[|\uff5c][^<>\s]*[|\uff5c]>|\[/?[A-Z_]+\]")


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


class ChatFormat:
    """The text and token conventions of one model folder with one tool format.

    Attributes:
        tokenizer: the Hugging Face fast tokenizer.
        tool_format: how tools, calls and observations are written.
        source: where the chat template stands, for messages.
        end_of_turn_id: the token that the chat template puts after an assistant message.
        eos_ids: token ids that stop generation; the first one is ``end_of_turn_id``.
        thought: how the policy writes thoughts; None for a template that knows none, and where the generation prompt
            closes an empty thought.
        earlier_thoughts: what the template does with the thought of an assistant message before the last one: ``kept``;
            ``until_user``: kept until a user speaks again; ``dropped`` as soon as anything follows. The empty thought
            of a generation prompt counts as one.
        generation: the generation prompt: what the template writes to open an assistant message.
        generation_thought: the end of the generation prompt that belongs to a thought: its opening marker, or a whole
            empty thought; else empty.
        shows_tools: whether tools are passed to the template; else the tool format's own text goes into the system
            message.
        context_thoughts: ``earlier_thoughts`` as contexts have it: ``kept`` where that was asked for.
        opened_ids: the tokens of ``generation_thought``, which contexts lose with the thought; empty where they keep
            it.
        hidden_text: what the template writes in the place of a thought that it has dropped (between the role header and
            the visible text).

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

    thought: ThoughtStyle | None
    earlier_thoughts: Earlier
    hidden_text: str

    def __init__(
        self,
        tokenizer: Any,
        tool_format: ToolFormat,
        template_kwargs: Mapping[str, Any] | None = None,
        end_ids: Sequence[int] = (),
        earlier_thoughts: str | None = None,
    ):
        from pact_nemo.chat.checks import check_conversation

        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError("the tokenizer has no chat template; add chat_template.jinja to the model folder")
        if not tokenizer.is_fast:
            raise ConfigError("a fast tokenizer is needed: character offsets come from it")
        self.tokenizer = tokenizer
        self.tool_format = tool_format
        self._template = ChatTemplate(tokenizer, template_kwargs or {}, tool_use=tool_format.native)
        self.source = self._template.source
        special, control = _control_tokens(tokenizer)
        self._special = _any_of(special)
        self._forgeable = self._special
        #: special tokens that the policy writes itself: thought markers, and the marks of a call
        written = tool_format.render_calls([ToolCall(TOOL["name"], {})])
        self._own = (OPENING, CLOSING, *(token for token in special if token in written))
        self._steering = set(tokenizer.convert_tokens_to_ids(sorted(special.difference(self._own))))
        self.thought, self.generation_thought = None, ""
        try:
            self.shows_tools = tool_format.native and shows_tools(self._template.render, tool_format.render_calls)
            self.generation = generation_text(self._plain, self.source)
            self.thought, self.generation_thought = find_thoughts(self._plain, self.source, self.generation)
            self.earlier_thoughts, self.hidden_text = probing.earlier_thoughts(
                self._plain, self.source, self.generation, self.generation_thought, self.thought, self._observed()
            )
            self._encoder = TextEncoder(tokenizer, self._plain([USER], True))
            after = self._after_assistant(self._observed(), generation=True)
            end_ids = [*self._encoder.whole(after)[0][:1], *end_ids]
        except DataError as error:
            raise ConfigError(f"the model's chat template can't be used: {error}") from error
        if end_ids[0] not in tokenizer.convert_tokens_to_ids(sorted(special)):
            raise ConfigError(
                f"{self.source} doesn't end an assistant message with a special token; take a template that does"
            )
        # an observation can't end itself, open a thought or write a call: neither as a token nor as the text that the
        # template writes around it
        thoughts = {OPENING, CLOSING} if self.thought is not None or self.generation_thought else set()
        self._forgeable = _any_of({*control, *thoughts, *_TAG.findall(after)})
        self.end_of_turn_id: int = end_ids[0]
        extra = [
            tokenizer.eos_token_id,
            *tokenizer.convert_tokens_to_ids([token for token in _END_TOKENS if token in special]),
        ]
        self.eos_ids: list[int] = list(
            dict.fromkeys([*end_ids[:1], *(i for i in extra if i is not None), *end_ids[1:]])
        )
        self._continuation = lru_cache(maxsize=4096)(self._continuation_uncached)
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

    @property
    def opens_thought(self) -> bool:
        """Whether the generation prompt leaves a thought open: what the policy writes begins inside it."""
        return self.thought is not None and self.thought.opened

    # --- rendering
    # -----------------------------------------------------------------------------------------------------------------

    def _neutral(self, message: Message) -> dict[str, Any]:
        """The message with control text in its content broken up (``<|im_end|>`` → ``< |im_end|>``): content can't
        forge a role or end a turn. Of a tool's content, which strangers write, every marker is broken up; of other
        messages, special tokens.
        """
        content = str(message["content"])
        pattern = self._forgeable if message["role"] == "tool" else self._special
        kept = self._own if message["role"] == "assistant" else ()
        return {**message, "content": _broken_up(pattern, content, kept)}

    def _neutral_tool(self, value: Any) -> Any:
        """A tool's schema with the special tokens in its texts broken up."""
        if isinstance(value, str):
            return _broken_up(self._special, value)
        if isinstance(value, Mapping):
            return {_broken_up(self._special, str(key)): self._neutral_tool(item) for key, item in value.items()}
        return [self._neutral_tool(item) for item in value] if isinstance(value, list | tuple) else value

    def _laid_out(self, message: dict[str, Any]) -> dict[str, Any]:
        """An assistant message's thought where the template looks for it."""
        return (
            {**message, **self.thought.message(message["content"])}
            if self.thought is not None and message["role"] == "assistant"
            else message
        )

    def render(self, messages: Sequence[Message], tools: Tools = (), generation: bool = True) -> str:
        """Text of a conversation. Tools go to the template where the format prefers that and the template shows them;
        else into the system message.

        Special tokens inside message contents are broken up first, assistant messages included.

        Raises:
            DataError: the template refuses the conversation, or fails on it.
        """
        conversation = [self._laid_out(self._neutral(message)) for message in messages]
        tools = [self._neutral_tool(tool) for tool in tools]
        if tools and not self.shows_tools:
            text = self.tool_format.render_tools(tools)
            if conversation and conversation[0]["role"] == "system":
                conversation[0]["content"] = f"{conversation[0]['content']}\n\n{text}"
            else:
                conversation.insert(0, {"role": "system", "content": text})
        native = [openai_tool(tool) for tool in tools] if tools and self.shows_tools else None
        return self._template.render(conversation, native, generation)

    def _check_shown(self, messages: Sequence[Message], text: str) -> None:
        """Raises DataError unless every message is in the rendering: a template may pass over a second system message,
        say.
        """
        for message in messages:
            content = self._neutral(message)["content"].strip()
            if (
                self.thought is not None and message["role"] == "assistant"
            ):  # a thought may be dropped: earlier_thoughts goes by that
                content = split_thought(content, self.opens_thought)[1]
            if content not in text and not any(
                form.strip() in text for form in observation_forms(content) if message["role"] == "tool"
            ):
                raise DataError(
                    f"{self.source} leaves out or alters a message of role {message['role']!r}: {content[:60]!r};"
                    " change the messages"
                )

    def check_fields(self, start: Sequence[Message]) -> None:
        """Raises ConfigError where the template writes down a field of messages that the project doesn't tell, e.g. the
        name of the tool.
        """
        conversation = [*start, _ASSISTANT, *self._observed(), _ASSISTANT]
        missing = self._template.not_given(conversation, [openai_tool(TOOL)] if self.shows_tools else None)
        if missing is not None:
            raise ConfigError(
                f"{self.source} writes the {missing!r} of a message, which messages here don't have; take a template"
                " that doesn't"
            )

    def _plain(self, messages: Sequence[Message], generation: bool) -> str:
        """A conversation that pieces are cut from: with a tool where the template itself shows tools, for it may write
        other delimiters then.
        """
        return self._template.render(messages, [openai_tool(TOOL)] if self.shows_tools else None, generation)

    def _observed(self) -> list[dict[str, str]]:
        return self.tool_format.render_observation([_OBSERVED])

    def _after_assistant(self, messages: Sequence[Message], generation: bool) -> str:
        """Template text between the last character of an assistant message and the end (``generation``: the next
        assistant message).
        """
        text = self._plain([USER, _ASSISTANT, *(self._neutral(message) for message in messages)], generation)
        if text.count(_MARK) != 1:
            raise ConfigError(
                f"{self.source} alters or repeats assistant content; it can't be cut at a message boundary"
            )
        return text.partition(_MARK)[2]

    # --- pieces of a conversation
    # --------------------------------------------------------------------------------------------------

    def prompt_ids(self, messages: Sequence[Message], tools: Tools = ()) -> list[int]:
        """x: token ids of ``messages`` with the tool schemas, ending with the generation prompt.

        Raises:
            DataError: the template refuses the conversation, or leaves one of its messages out.
        """
        text = self.render(messages, tools)
        self._check_shown(messages, text)
        return self.encode_whole(text)

    def continuation_ids(self, messages: Sequence[Message], after_eos: bool, new_tools: Tools = ()) -> list[int]:
        """Tokens between the end of a sampled assistant message and the start of the next one.

        Args:
            messages: the tool or user messages in between.
            after_eos: the sampled ids already end with the end-of-turn token, so it is not repeated.
            new_tools: tools revealed now; their text is put before the first of ``messages``.
        """
        return self._cut(messages, after_eos, new_tools, generation=True)

    def interlude_ids(self, messages: Sequence[Message], after_eos: bool, new_tools: Tools = ()) -> list[int]:
        """:meth:`continuation_ids` without the closing generation prompt: ends after the last message's closing
        delimiter.
        """
        return self._cut(messages, after_eos, new_tools, generation=False)

    def boundary_ids(self, text: str = BOUNDARY_TEXT) -> list[int]:
        """Tokens from the end of h* to the start of the rollout: a user turn that closes the trace, and the generation
        prompt.

        Raises:
            ConfigError: the template renders an earlier tool result differently once a user turn follows.
        """
        conversation = [USER, _ASSISTANT, *self._observed()]
        try:
            head = self._plain(conversation, generation=False)
            whole = self._plain([*conversation, {"role": "user", "content": text}], generation=True)
        except DataError as error:
            raise ConfigError(
                f"a user turn that follows a tool result, as the end of a trace has it: {error}"
            ) from error
        end = head.rpartition(_OBSERVED)[2]
        tail = whole.rpartition(_OBSERVED)[2]
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
        return self._encoder.after(self._plain([USER], False), self.generation)[0]

    def visible_generation_ids(self) -> list[int]:
        """:meth:`generation_ids` without what belongs to the thought: the start of an earlier message whose thought the
        template drops; there ``hidden_text`` and the visible text follow.
        """
        return self._encoder.after(self._plain([USER], False), self.generation.removesuffix(self.generation_thought))[0]

    def continuation(self, messages: Sequence[Message], new_tools: Tools = (), generation: bool = True) -> Continuation:
        """Everything from an assistant message's end-of-turn token on, as text, ids and offsets; cached."""
        conversation = [dict(message) for message in messages]
        if new_tools:
            if not conversation:
                raise ConfigError("tools can only be revealed together with a message")
            revealed = self.tool_format.render_new_tools([self._neutral_tool(tool) for tool in new_tools])
            conversation[0]["content"] = f"{revealed}\n{conversation[0]['content']}"
        return self._continuation(json.dumps(conversation, ensure_ascii=False), generation)

    def _cut(self, messages: Sequence[Message], after_eos: bool, new_tools: Tools, generation: bool) -> list[int]:
        return list(self.continuation(messages, new_tools, generation).ids[1 if after_eos else 0 :])

    def _continuation_uncached(self, messages_json: str, generation: bool) -> Continuation:
        messages = json.loads(messages_json)
        text = self._after_assistant(messages, generation)
        self._check_shown([message for message in messages if message["role"] != "assistant"], text)
        ids, offsets = self._encoder.whole(text)
        if ids[0] != self.end_of_turn_id:
            raise ConfigError(f"{self.source} ends assistant messages differently depending on what follows")
        return Continuation(text, tuple(ids), tuple(offsets))

    # --- thoughts of earlier messages
    # ----------------------------------------------------------------------------------------------

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
        if shown == whole or not (
            OPENING in whole or CLOSING in whole
        ):  # without a thought, white space at most differs: ids stay as they came
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
        whole = self._plain(self._earlier_conversation(text, user), False)
        if not (whole.startswith(before) and whole.endswith(after) and len(whole) >= len(before) + len(after)):
            raise DataError(f"{self.source} changes the conversation around an assistant message: {text!r:.80}")
        return whole[len(before) : len(whole) - len(after)]

    def _earlier_conversation(self, text: str, user: bool) -> list[Message]:
        return [USER, self._laid_out({"role": "assistant", "content": text}), *([USER] if user else self._observed())]

    def _earlier_frame_uncached(self, user: bool) -> tuple[str, str]:
        """Template text before such a message, its thought included, and after it."""
        before = self._plain([USER], True).removesuffix(self.generation_thought)
        conversation = self._earlier_conversation("", user)
        # as content: a template with a field for thoughts would take a message for an open one
        conversation[1] = _ASSISTANT
        _, mark, after = self._plain(conversation, False).partition(_MARK)
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

    # --- assistant text
    # ------------------------------------------------------------------------------------------------------------

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
        found = next((token for token in ids if token in self._steering), None)
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


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the texts, longest first; nothing where there are none."""
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True) if token) or r"(?!)")


def _broken_up(pattern: re.Pattern[str], text: str, kept: Sequence[str] = ()) -> str:
    return pattern.sub(
        lambda match: match.group() if match.group() in kept else f"{match.group()[0]} {match.group()[1:]}", text
    )


def _control_tokens(tokenizer: Any) -> tuple[set[str], set[str]]:
    """(special tokens, all tokens that steer a conversation): added tokens with ``special=True``, and those that look
    like markers (``<tool_call>``, ``[INST]``).
    """
    added = list(tokenizer.added_tokens_decoder.values())
    special = {str(token.content) for token in added if token.special} | set(tokenizer.all_special_tokens)
    return special, special | {str(token.content) for token in added if _TAG.fullmatch(str(token.content))}


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
