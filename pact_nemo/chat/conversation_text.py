"""Conversations as text: what the model's own chat template writes for them, and what it is found to write.

Every piece is cut out of the template, rendered on a dummy conversation. How it opens an assistant message, where it
puts thoughts and what it does with those of earlier messages is probed when a :class:`ConversationText` is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pact_nemo.chat import probing
from pact_nemo.chat.control_text import ControlText
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
from pact_nemo.chat.thoughts import ThoughtStyle, split_thought
from pact_nemo.chat.tool_formats import ToolFormat, Tools
from pact_nemo.environments.base import ToolCall
from pact_nemo.errors import ConfigError, DataError

MARK, OBSERVED = "\u2042MARK\u2042", "OBSERVED-MARK"
ASSISTANT = {"role": "assistant", "content": MARK}


class ConversationText:
    """The text of conversations under one chat template and tool format.

    Attributes:
        tool_format: how tools, calls and observations are written.
        source: where the chat template stands, for messages.
        shows_tools: whether tools are passed to the template; else the tool format's own text goes into the system
            message.
        generation: the generation prompt: what the template writes to open an assistant message.
        generation_thought: the end of the generation prompt that belongs to a thought: its opening marker, or a whole
            empty thought; else empty.
        thought: how the policy writes thoughts; None for a template that knows none, and where the generation prompt
            closes an empty thought.
        earlier_thoughts: what the template does with the thought of an assistant message before the last one: ``kept``;
            ``until_user``: kept until a user speaks again; ``dropped`` as soon as anything follows. The empty thought
            of a generation prompt counts as one.
        hidden_text: what the template writes in the place of a thought that it has dropped (between the role header and
            the visible text).

    Args:
        tokenizer: fast tokenizer with a chat template.
        tool_format: instance from :data:`pact_nemo.chat.tool_formats.TOOL_FORMATS`.
        template_kwargs: constants handed to the chat template.

    Raises:
        ConfigError, DataError: the template can't be cut into pieces, or has no use for one of ``template_kwargs``.
    """

    thought: ThoughtStyle | None
    earlier_thoughts: Earlier
    hidden_text: str

    def __init__(self, tokenizer: Any, tool_format: ToolFormat, template_kwargs: Mapping[str, Any]):
        self.tool_format = tool_format
        self._template = ChatTemplate(tokenizer, template_kwargs, tool_use=tool_format.native)
        self.source = self._template.source
        self._control = ControlText(tokenizer, tool_format.render_calls([ToolCall(TOOL["name"], {})]))
        self.thought, self.generation_thought = None, ""
        self.shows_tools = tool_format.native and shows_tools(self._template.render, tool_format.render_calls)
        self.generation = generation_text(self.plain, self.source)
        self.thought, self.generation_thought = find_thoughts(self.plain, self.source, self.generation)
        self.earlier_thoughts, self.hidden_text = probing.earlier_thoughts(
            self.plain, self.source, self.generation, self.generation_thought, self.thought, self.observed()
        )

    @property
    def opens_thought(self) -> bool:
        """Whether the generation prompt leaves a thought open: what the policy writes begins inside it."""
        return self.thought is not None and self.thought.opened

    def render(self, messages: Sequence[Message], tools: Tools = (), generation: bool = True) -> str:
        """Text of a conversation. Tools go to the template where the format prefers that and the template shows them;
        else into the system message.

        Special tokens inside message contents are broken up first, assistant messages included.

        Raises:
            DataError: the template refuses the conversation, or fails on it.
        """
        conversation = [self.laid_out(self._control.neutral(message)) for message in messages]
        tools = [self._control.neutral_tool(tool) for tool in tools]
        if tools and not self.shows_tools:
            text = self.tool_format.render_tools(tools)
            if conversation and conversation[0]["role"] == "system":
                conversation[0]["content"] = f"{conversation[0]['content']}\n\n{text}"
            else:
                conversation.insert(0, {"role": "system", "content": text})
        native = [openai_tool(tool) for tool in tools] if tools and self.shows_tools else None
        return self._template.render(conversation, native, generation)

    def check_fields(self, start: Sequence[Message]) -> None:
        """Raises ConfigError where the template writes down a field of messages that the project doesn't tell, e.g. the
        name of the tool.
        """
        conversation = [*start, ASSISTANT, *self.observed(), ASSISTANT]
        missing = self._template.not_given(conversation, [openai_tool(TOOL)] if self.shows_tools else None)
        if missing is not None:
            raise ConfigError(
                f"{self.source} writes the {missing!r} of a message, which messages here don't have; take a template"
                " that doesn't"
            )

    def check_shown(self, messages: Sequence[Message], text: str) -> None:
        """Raises DataError unless every message is in the rendering, each behind the one before it: a template may pass
        over a second system message, say, also where its words occur in another one.
        """
        position = 0
        for message in messages:
            content = self._control.neutral(message)["content"].strip()
            # a thought may be dropped: earlier_thoughts goes by that
            if self.thought is not None and message["role"] == "assistant":
                content = split_thought(content, self.opens_thought)[1]
            forms = observation_forms(content) if message["role"] == "tool" else [content]
            ends = [at + len(form) for form in map(str.strip, forms) if (at := text.find(form, position)) >= 0]
            if not ends:
                raise DataError(
                    f"{self.source} leaves out or alters a message of role {message['role']!r}: {content[:60]!r};"
                    " change the messages"
                )
            position = min(ends)

    def laid_out(self, message: dict[str, Any]) -> dict[str, Any]:
        """An assistant message's thought where the template looks for it."""
        return (
            {**message, **self.thought.message(message["content"])}
            if self.thought is not None and message["role"] == "assistant"
            else message
        )

    def plain(self, messages: Sequence[Message], generation: bool) -> str:
        """A conversation that pieces are cut from: with a tool where the template itself shows tools, for it may write
        other delimiters then.
        """
        return self._template.render(messages, [openai_tool(TOOL)] if self.shows_tools else None, generation)

    def observed(self) -> list[dict[str, str]]:
        return self.tool_format.render_observation([OBSERVED])

    def after_assistant(self, messages: Sequence[Message], generation: bool) -> str:
        """Template text between the last character of an assistant message and the end (``generation``: the next
        assistant message).
        """
        text = self.plain([USER, ASSISTANT, *(self._control.neutral(message) for message in messages)], generation)
        if text.count(MARK) != 1:
            raise ConfigError(
                f"{self.source} alters or repeats assistant content; it can't be cut at a message boundary"
            )
        return text.partition(MARK)[2]
