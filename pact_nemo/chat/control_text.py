"""Text that steers a conversation (role markers, ends of turns, marks of calls) broken up where content holds it.

Content can't forge a role or end a turn then: neither what a user or the policy quotes, nor what a tool returns.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pact_nemo.chat.rendering import Message
from pact_nemo.chat.thoughts import CLOSING, OPENING

_TAG = re.compile(r"</?[A-Za-z_][\w.:-]*>|<[|\uff5c][^<>\s]*[|\uff5c]>|\[/?[A-Z_]+\]")


class ControlText:
    """What steers the conversations of one tokenizer and tool format.

    Attributes:
        special: special tokens of the tokenizer.

    Args:
        tokenizer: the Hugging Face fast tokenizer.
        call: a call as the tool format writes it; the special tokens in it are the policy's own.
    """

    def __init__(self, tokenizer: Any, call: str):
        self.special, self._control = _control_tokens(tokenizer)
        self._special = _any_of(self.special)
        self._forgeable = self._special
        #: special tokens that the policy writes itself: thought markers, and the marks of a call
        self._own = (OPENING, CLOSING, *(token for token in self.special if token in call))
        self._steering = set(tokenizer.convert_tokens_to_ids(sorted(self.special.difference(self._own))))

    def guard_observations(self, after: str, *, thoughts: bool) -> None:
        """From now on an observation can't end itself, open a thought or write a call: neither as a token nor as the
        text that the template writes around it.

        Args:
            after: what the template writes after an assistant message, with an observation in it.
            thoughts: whether the template knows thoughts.
        """
        markers = {OPENING, CLOSING} if thoughts else set()
        self._forgeable = _any_of({*self._control, *markers, *_TAG.findall(after)})

    def neutral(self, message: Message) -> dict[str, Any]:
        """The message with control text in its content broken up (``<|im_end|>`` → ``< |im_end|>``). Of a tool's
        content, which strangers write, every marker is broken up; of other messages, special tokens.
        """
        content = str(message["content"])
        pattern = self._forgeable if message["role"] == "tool" else self._special
        kept = self._own if message["role"] == "assistant" else ()
        return {**message, "content": _broken_up(pattern, content, kept)}

    def neutral_tool(self, value: Any) -> Any:
        """A tool's schema with the special tokens in its texts broken up."""
        if isinstance(value, str):
            return _broken_up(self._special, value)
        if isinstance(value, Mapping):
            return {_broken_up(self._special, str(key)): self.neutral_tool(item) for key, item in value.items()}
        return [self.neutral_tool(item) for item in value] if isinstance(value, list | tuple) else value

    def steering_token(self, ids: Sequence[int]) -> int | None:
        """The first id that ends a turn or opens a role; None without one."""
        return next((token for token in ids if token in self._steering), None)


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
