"""Text that stands inside a conversation as token ids: the same ids as in the whole, whatever the tokenizer does at the
start of a text.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from pact_nemo.errors import ConfigError, DataError

#: how assistant messages begin; white space is left out, because byte-level tokenizers join it to a line break before
#: it
_BEGINNINGS = ("Use ls.", "[ls()]", '{"name": "ls"}', "<tool_call>", "<think>", "(a", "1", "é")

Encoded = tuple[list[int], list[tuple[int, int]]]


class TextEncoder:
    """Token ids of pieces of a conversation.

    SentencePiece-style tokenizers put a word boundary before a text. A piece that stands behind other text has none in
    the whole conversation. Such a piece is encoded behind the text that precedes it, and cut off there.

    Attributes:
        context: text before an assistant message (a whole prompt), if the tokenizer needs one to be exact; else empty.

    Args:
        tokenizer: Hugging Face fast tokenizer.
        prompt: a rendered conversation that ends where an assistant message begins.

    Raises:
        ConfigError: the tokenizer joins the end of the prompt and the start of an assistant message.
    """

    def __init__(self, tokenizer: Any, prompt: str):
        self._tokenizer = tokenizer
        self._lock = threading.Lock()  # fast tokenizers may refuse concurrent use ("Already borrowed")
        self.context = ""
        head = self.whole(prompt)[0]
        behind = {text: self.whole(prompt + text)[0] for text in _BEGINNINGS}
        kept = [
            text for text, ids in behind.items() if ids[: len(head)] == head
        ]  # "\n[" may be one token; sampled ids are never joined so
        if not kept:
            raise ConfigError(
                f"the tokenizer joins the end of the generation prompt {prompt[-20:]!r} and the start of an assistant"
                " message; use a chat template whose generation prompt ends in a special token or a line break"
            )
        if any(behind[text][len(head) :] != self.whole(text)[0] for text in kept):
            self.context = prompt
        self._context_ids = self.whole(self.context)[0]

    def whole(self, text: str) -> Encoded:
        """Ids of a text, and each token's half-open character range in it. No special token is added.

        Raises:
            DataError: the text holds half a surrogate pair.
        """
        try:
            with self._lock:
                encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        except (TypeError, UnicodeError) as error:  # what the tokenizer says of half a surrogate pair
            raise DataError(f"a text can't be made into tokens: {error}; take out what isn't Unicode") from error
        return list(encoded["input_ids"]), [(int(a), int(b)) for a, b in encoded["offset_mapping"]]

    def after(self, before: str, text: str) -> Encoded:
        """:meth:`whole` of ``text`` as it stands behind ``before``.

        Raises:
            DataError: a token covers the end of ``before`` and the start of ``text``.
        """
        if not self.context:
            return self.whole(text)
        head = self.whole(before)[0]
        ids, offsets = self.whole(before + text)
        if ids[: len(head)] != head:
            raise DataError(
                f"the tokenizer joins {before[-20:]!r} and {text[:20]!r} into one token; they can't be told apart"
            )
        return ids[len(head) :], [(max(a - len(before), 0), b - len(before)) for a, b in offsets[len(head) :]]

    def assistant(self, text: str) -> Encoded:
        """:meth:`after` a generation prompt."""
        return self.after(self.context, text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of an assistant message's ids, special tokens included; the inverse of :meth:`assistant`."""
        with self._lock:
            text = str(self._decode([*self._context_ids, *ids]))
            return text[len(self._decode(self._context_ids)) :] if self.context else text

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
