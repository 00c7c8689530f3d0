"""Episodes with thoughts: three kinds of a Qwen3 chat format, what a scripted policy says in them, and the rollouts
that come of it.
"""

from __future__ import annotations

import asyncio
from functools import cache
from typing import Any

from pact_nemo.chat.template import ChatFormat
from pact_nemo.chat.tool_formats import TOOL_FORMATS
from pact_nemo.environments.base import Outcome, Task, ToolCall
from pact_nemo.rollouts.episode import EpisodeSetup, SeedPath, run_episode
from pact_nemo.rollouts.types import Rollout
from pact_nemo.serving.client import Completion
from pact_nemo.serving.config import EpisodeLimits, Sampling
from tests.fixtures.chat_models import tokenizer

LS = {
    "name": "ls",
    "description": "List a folder.",
    "parameters": {"type": "object", "properties": {"a": {"type": "boolean"}}},
}
CD = {
    "name": "cd",
    "description": "Enter a folder.",
    "parameters": {"type": "object", "properties": {"to": {"type": "string"}}},
}
LIMITS = EpisodeLimits(
    max_turns_per_user_turn=6, max_turns=20, max_turn_tokens=256, max_response_tokens=4096, max_model_len=8192
)
LATER = ["Now enter docs.", "And what is in it?"]
# (thought, visible): two tool turns and an answer for the first user, a tool turn and an answer for the second, an
# answer for the third
SPOKEN = [
    ("I have to look first.\nls shows files.", '<tool_call>\n{"name": "ls", "arguments": {"a": true}}\n</tool_call>'),
    ("Once more.", '<tool_call>\n{"name": "ls", "arguments": {}}\n</tool_call>'),
    ("That is all.", "There are two files: a and é."),
    ("cd it is.", '<tool_call>\n{"name": "cd", "arguments": {"to": "docs"}}\n</tool_call>'),
    ("", "I am in docs."),
    ("Nothing was listed.", "I don't know."),
]
KINDS = (
    "thinks",
    "opened",
    "silent",
)  #: Qwen3; a Qwen3 whose generation prompt opens the thought; Qwen3 with enable_thinking=false


@cache
def chat_of(kind: str, earlier_thoughts: str | None = None) -> ChatFormat:
    base = tokenizer("qwen3")
    if kind == "opened":
        before, prompt, after = str(base.chat_template).rpartition("{{- '<|im_start|>assistant\\n' }}")
        base.chat_template = before + prompt.replace("assistant\\n", "assistant\\n<think>\\n") + after
    constants = {"enable_thinking": False} if kind == "silent" else None
    return ChatFormat(base, TOOL_FORMATS["hermes"], constants, earlier_thoughts=earlier_thoughts)


def written(kind: str, thought: str, visible: str) -> str:
    """What the policy samples behind the generation prompt."""
    if kind == "silent" or (kind == "thinks" and not thought):
        return visible
    return f"{'' if kind == 'opened' else '<think>' + chr(10)}{thought}\n</think>\n\n{visible}"


def make_task() -> Task:
    return Task(
        "t0",
        "t0",
        "scripted",
        (({"role": "user", "content": "What is in here?"},),),
        (LS, CD),
        ((ToolCall("ls", {"a": True}),),),
    )


class Session:
    def __init__(self) -> None:
        self.later = list(LATER)

    def execute(self, calls: Any) -> list[str]:
        return [f"ran {call.name}" for call in calls]

    def next_user_turn(self, message: str = "") -> Any:
        return ([{"role": "user", "content": self.later.pop(0)}], []) if self.later else None

    def outcome(self) -> Outcome:
        return Outcome(True, 1.0)

    def close(self) -> None:
        pass


class ScriptedEnvironment:
    def tasks(self) -> list[Task]:
        return []

    def start(self, task: Task) -> Session:
        return Session()


class ScriptedPolicy:
    weight_version = 3

    def __init__(self, chat: ChatFormat, texts: list[str]):
        self.chat, self.texts, self.requests = chat, texts, []

    async def generate(self, request: Any) -> Completion:
        ids = [*self.chat.encode_assistant(self.texts[len(self.requests)])[0], self.chat.end_of_turn_id]
        self.requests.append(list(request.prompt_ids))
        ids = ids[: request.max_tokens]
        return Completion(ids, [-0.5 - 0.01 * i for i in range(len(ids))], "stop", self.weight_version)


def play(chat: ChatFormat, texts: list[str], limits: EpisodeLimits = LIMITS) -> tuple[Rollout, list[list[int]]]:
    """The rollout, and the ids of each request."""
    policy = ScriptedPolicy(chat, texts)
    environment: Any = ScriptedEnvironment()
    rollout = asyncio.run(
        run_episode(make_task(), 0, EpisodeSetup(environment, chat, limits, Sampling(), SeedPath(1, 0)), policy)
    )
    assert rollout.status != "failed", rollout.error
    return rollout, policy.requests


def texts_of(kind: str) -> list[str]:
    return [written(kind, thought, visible) for thought, visible in SPOKEN]
