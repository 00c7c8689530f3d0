"""Which conversation an answer comes from, and the reference memory and calls that are made of it.

``bfcl-eval`` ships the source of each answer, a quotation with gaps, and no calls. What is made of the quotations here
is for training alone: a published evaluation reads nothing of it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pact_nemo.environments.base import ToolCall
from pact_nemo.environments.bfcl.agentic_data import AgenticEntry
from pact_nemo.environments.bfcl.agentic_session import contains_answer

_GAP = re.compile(r"\.\.\.|…|: ")
_SENTENCE = re.compile(r"(?<=[.!?])\s")
_KEY_WORDS = 6


@dataclass(frozen=True)
class Fact:
    """A question's answer in the user's own words.

    Attributes:
        question: what asks for it.
        conversation: where the user says it.
        turn: index of the user turn that says most of it.
        text: the quotation, without outer quotes and gaps.
    """

    question: AgenticEntry
    conversation: AgenticEntry
    turn: int
    text: str


def _plain(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def spoken(conversation: AgenticEntry) -> list[str]:
    """What the user says, per user turn."""
    return ["\n".join(row["content"] for row in turn) for turn in conversation.user_turns]


def find_fact(question: AgenticEntry, conversations: Sequence[AgenticEntry]) -> Fact | None:
    """Where the user says the answer: the first conversation that has every piece of the quotation. None where no
    conversation has all of them.
    """
    pieces = [piece for piece in map(_plain, _GAP.split(question.source)) if piece]
    for conversation in conversations:
        turns = [_plain(text) for text in spoken(conversation)]
        if pieces and all(any(piece in turn for turn in turns) for piece in pieces):
            hits = [sum(len(piece) for piece in pieces if piece in turn) for turn in turns]
            text = " ".join(question.source.split()).strip(" \"'“”…").removeprefix("...").removesuffix("...").strip()
            return Fact(question, conversation, hits.index(max(hits)), text)
    return None


def is_sayable(fact: Fact) -> bool:
    """Whether BFCL's checker finds the answer in the quotation, so that a memory that holds the user's words has it."""
    return contains_answer(fact.text, fact.question.answers)[0]


def _key(text: str, taken: set[str]) -> str:
    """A key that BFCL's key-value memory takes, made of the first words; no other entry has it."""
    words = re.findall(r"[a-z]+", text.lower())[:_KEY_WORDS]
    key = stem = "_".join(words) or "note"
    number = 2
    while key in taken:
        key, number = f"{stem}_{number}", number + 1
    taken.add(key)
    return key


def write_call(backend: str, text: str, taken: set[str]) -> ToolCall:
    """The call that puts a quotation into a memory; ``taken`` gets its key."""
    if backend == "MemoryAPI_rec_sum":
        return ToolCall("memory_append", {"text": f"{text}\n"})
    if backend == "MemoryAPI_vector":
        return ToolCall("archival_memory_add", {"text": text})
    return ToolCall("archival_memory_add", {"key": _key(text, taken), "value": text})


def write_calls(facts: Sequence[Fact], conversation: AgenticEntry) -> tuple[tuple[ToolCall, ...], ...]:
    """Per user turn, the calls that keep what is asked for later, each quotation once; of a turn that nothing is asked
    of, its longest sentence, as nobody can know that then.
    """
    taken: set[str] = set()
    calls = []
    for turn, words in enumerate(spoken(conversation)):
        texts = list(dict.fromkeys(fact.text for fact in facts if fact.turn == turn))
        texts = texts or [max(_SENTENCE.split(words.strip()), key=len)]
        calls.append(tuple(write_call(conversation.backend, text, taken) for text in texts))
    return tuple(calls)


def keep_calls(facts: Sequence[Fact], backend: str) -> tuple[ToolCall, ...]:
    """The calls that fill the reference memory of a chain: every quotation once."""
    taken: set[str] = set()
    return tuple(write_call(backend, text, taken) for text in dict.fromkeys(fact.text for fact in facts))


def read_calls(fact: Fact, stored: Sequence[ToolCall]) -> tuple[ToolCall, ...]:
    """The calls that bring an answer in from the reference memory: none where the prompt shows all of it.

    Args:
        fact: of the question.
        stored: the calls that filled the memory.
    """
    backend = fact.question.backend
    if backend == "MemoryAPI_rec_sum":
        return ()
    if backend == "MemoryAPI_vector":
        return (ToolCall("archival_memory_retrieve", {"query": fact.question.user_turns[0][-1]["content"]}),)
    key = next(call.arguments["key"] for call in stored if call.arguments["value"] == fact.text)
    return (ToolCall("archival_memory_list_keys", {}), ToolCall("archival_memory_retrieve", {"key": key}))
