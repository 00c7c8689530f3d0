"""The check of a chat format when it is made: a whole conversation, rendered by the template at once, against the
pieces that runs use.
"""

from __future__ import annotations

from dataclasses import dataclass

from pact_nemo.chat.conversation_text import ASSISTANT
from pact_nemo.chat.conversation_tokens import ConversationTokens
from pact_nemo.chat.probing import HARD, TOOL, Message, check_marks, first_difference, observation_forms
from pact_nemo.environments.base import ToolCall
from pact_nemo.errors import ConfigError, DataError

_APPENDS = "take a template that only appends"
#: what normalisation folds, and what a vocabulary without bytes lacks
_UNUSUAL = "\u2460\ufb01\uff21 \u6f22\u5b57 \U0001f600\t\u201cx\u201d \u2013 \u00e4"
_LONG, _MANY = 100_000, 40  #: characters of a long message; turns of a long conversation


@dataclass(frozen=True)
class _Turn:
    """An assistant message and what follows it; ``mark`` stands in ``visible``."""

    mark: str
    thought: str
    visible: str
    after: list[dict[str, str]]

    @property
    def user_follows(self) -> bool:
        return any(message["role"] == "user" for message in self.after)


def check_conversation(chat: ConversationTokens) -> None:
    """System text, tools, thoughts, calls, several observations in a turn and a second user turn: everything is in the
    rendering, once and as it is, in order, and the pieces concatenate to it, as text and as tokens. So it is with long
    messages and with many. Tokens say what the text says.

    Raises:
        ConfigError: they don't; names the template and what it drops, alters, repeats or asks for.
    """
    system = {"role": "system", "content": f"MARK-SYSTEM {HARD}"}
    users = [{"role": "user", "content": f"MARK-USER-{index} {HARD}"} for index in range(3)]
    turns = _turns(chat, users)
    try:
        with_system = _renders(chat, [system, users[0]])
        start = [*([system] if with_system else []), users[0]]
        for count in range(1, len(turns) + 1):
            _check_prefix(chat, start, turns[:count])
        chat.boundary_ids()
        chat.check_fields(start)
        _check_results(chat, start)
        _check_long(chat, start)
        for written in (_written(chat, turns[0]), _UNUSUAL):
            _check_tokens(chat, written)
    except DataError as error:
        raise ConfigError(f"the model's chat template can't be used: {error}") from error


def _renders(chat: ConversationTokens, messages: list[dict[str, str]]) -> bool:
    """Whether the template takes a system message. Only where tools are passed to it can the project do without."""
    try:
        chat.render(messages, [TOOL])
        return True
    except DataError:
        chat.render(messages[1:], [TOOL])  # fails where the tools need the system message
        return False


def _turns(chat: ConversationTokens, users: list[dict[str, str]]) -> list[_Turn]:
    """Two tool turns, an answer, the second user turn, a tool turn, an answer, the third user turn."""
    observe = chat.tool_format.render_observation
    numbered = iter(range(100))

    def call_turn(observations: int) -> _Turn:
        i = next(numbered)
        calls = [ToolCall("mark_tool", {"mark_argument": f"MARK-CALL-{i}-{k} {HARD}"}) for k in range(observations)]
        text = chat.tool_format.render_calls(calls)
        after = observe([f"MARK-RESULT-{i}-{k} {HARD}" for k in range(observations)])
        if chat.thought is None:
            return _Turn(f"MARK-TEXT-{i}", "", chat.assistant_parts(f"MARK-TEXT-{i} {HARD}", text).text, after)
        return _Turn(f"MARK-CALL-{i}-0", f"MARK-THOUGHT-{i} {HARD}", text, after)

    def answer(after: list[dict[str, str]]) -> _Turn:
        i = next(numbered)
        return _Turn(
            f"MARK-ANSWER-{i}",
            "" if chat.thought is None else f"MARK-THOUGHT-{i} {HARD}",
            f"MARK-ANSWER-{i} {HARD}",
            after,
        )

    return [call_turn(2), call_turn(1), answer([users[1]]), call_turn(2), answer([users[2]])]


def _check_prefix(chat: ConversationTokens, start: list[dict[str, str]], turns: list[_Turn]) -> None:
    messages: list[Message] = list(start)
    for turn in turns:
        messages += [{"role": "assistant", "content": _written(chat, turn)}, *turn.after]
    whole = chat.render(messages, [TOOL])
    if chat.render(messages, [TOOL]) != whole:
        raise ConfigError(f"{chat.source} writes another text each time; take out what is random in it")
    if not whole.endswith(chat.generation):
        raise ConfigError(
            f"{chat.source} opens an assistant message behind {turns[-1].after[-1]['role']!r} otherwise than at the"
            f" start; {_APPENDS}"
        )
    check_marks(chat.source, whole, _marks(chat, start, turns))
    later_user = [any(after.user_follows for after in turns[index:]) for index in range(len(turns))]
    dropped = [
        chat.earlier_thoughts == "dropped" or (chat.earlier_thoughts == "until_user" and later) for later in later_user
    ]
    text, ids = _pieces(chat, start, turns, dropped)
    if text != whole:
        raise ConfigError(
            f"{chat.source} writes a whole conversation otherwise than its pieces: {first_difference(text, whole)}; "
            f"training needs exactly what the model sees; {_APPENDS}"
        )
    if ids != chat.encode_whole(whole):
        raise ConfigError(
            f"the tokenizer makes other tokens of a whole conversation of {chat.source} than of its pieces; use another"
            " tokenizer"
        )


def _check_long(chat: ConversationTokens, start: list[dict[str, str]]) -> None:
    """What the template does with long messages, with many of them, and with more results in a turn."""
    observe, fill = chat.tool_format.render_observation, "go on, " * (_LONG // 7)
    messages = [{**message, "content": f"{message['content']} {fill}END"} for message in start]
    marks = [_mark(message) for message in messages]
    for index in range(_MANY):
        more = 3 if index == 1 else 0
        text = f"MARK-LATE-{index}. {fill if index == 0 else ''}END"
        after = observe([f"MARK-LATE-RESULT-{index}-{k} {fill if index == 0 else ''}END" for k in range(1 + more)])
        messages += [
            {"role": "assistant", "content": text if chat.thought is None else chat.assistant_parts("", text).text},
            *after,
        ]
        marks += [("what the assistant writes (text and calls)", f"MARK-LATE-{index}.", [text]), *map(_mark, after)]
    check_marks(f"{chat.source}, in a long conversation,", chat.render(messages, [TOOL]), marks)


def _check_results(chat: ConversationTokens, start: list[dict[str, str]]) -> None:
    """An empty result, and one that says what another one said, are results as well: the model has to see how many
    there were.
    """

    def rendered(results: list[str]) -> str:
        return chat.render([*start, ASSISTANT, *chat.tool_format.render_observation(results)], [TOOL])

    for what, more, fewer in (
        ("an empty result", ["MARK-A", ""], ["MARK-A"]),
        ("an empty result", ["", "MARK-A"], ["MARK-A"]),
        ("a result that is like the one before it", ["MARK-A", "MARK-A"], ["MARK-A"]),
        ("a result that is like the one before it", ["MARK-A", "MARK-B", "MARK-B"], ["MARK-A", "MARK-B"]),
    ):
        if rendered(more) == rendered(fewer):
            raise ConfigError(f"{chat.source} drops {what} of several calls; take a template that writes every result")


def _check_tokens(chat: ConversationTokens, written: str) -> None:
    """A tokenizer that folds case, accents or blanks, or has no token for a quote or bracket, would show and teach
    another text.
    """
    told = chat.decode(chat.encode_assistant(written)[0])
    if told != written:
        raise ConfigError(
            f"the tokenizer changes what is written: {first_difference(written, told)}; use one that keeps every"
            " character"
        )


def _written(chat: ConversationTokens, turn: _Turn) -> str:
    return turn.visible if chat.thought is None else chat.assistant_parts(turn.thought, turn.visible).text


def _pieces(
    chat: ConversationTokens, start: list[dict[str, str]], turns: list[_Turn], dropped: list[bool]
) -> tuple[str, list[int]]:
    """The conversation put together as runs and traces do it; turns whose thought is ``dropped`` without it."""
    tail = chat.generation_thought
    text = chat.render(start, [TOOL])
    ids = chat.encode_whole(text.removesuffix(tail) if dropped[0] else text)
    for index, turn in enumerate(turns):
        if dropped[index]:
            text, written = text.removesuffix(tail), chat.hidden_text + turn.visible
        else:
            written = _written(chat, turn)
        continuation = chat.continuation(turn.after)
        text += written + continuation.text
        ids += chat.encode_assistant(written)[0] + list(chat.continuation(turn.after, generation=False).ids)
        ids += chat.visible_generation_ids() if index + 1 < len(turns) and dropped[index + 1] else chat.generation_ids()
    return text, ids


def _marks(
    chat: ConversationTokens, start: list[dict[str, str]], turns: list[_Turn]
) -> list[tuple[str, str, list[str]]]:
    """What has to be in the rendering: (what, its word, accepted forms) each, in order."""
    found = [_mark(message) for message in start]
    if not chat.shows_tools:  # at the end of the system message
        found.insert(
            len(start) - 1,
            ("the tools (in the system message)", "MARK-DESCRIPTION", [chat.tool_format.render_tools([TOOL])]),
        )
    for turn in turns:
        found += [("what the assistant writes (text and calls)", turn.mark, [turn.visible]), *map(_mark, turn.after)]
    return found


def _mark(message: dict[str, str]) -> tuple[str, str, list[str]]:
    names = {"system": "the system message", "user": "what a user says", "tool": "the results of tools (role 'tool')"}
    forms = observation_forms(message["content"]) if message["role"] == "tool" else [message["content"]]
    return names[message["role"]], message["content"].split(" ", 1)[0], forms
