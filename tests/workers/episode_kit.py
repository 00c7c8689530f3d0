"""A policy and an environment that keep to a script, for tests of episodes and of batches of them."""

import threading
from dataclasses import dataclass, field

from pact_nemo.environments.base import Outcome, Task, ToolCall
from pact_nemo.rollouts.episode import SeedPath
from pact_nemo.serving.client import Completion
from pact_nemo.serving.config import EpisodeLimits

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
    max_turns_per_user_turn=4, max_turns=8, max_turn_tokens=64, max_response_tokens=1024, max_model_len=2048
)
SEEDS = SeedPath(run_seed=1, step=0)


def make_task(task_id="t0", text="What is in here?"):
    return Task(
        task_id, task_id, "scripted", (({"role": "user", "content": text},),), (LS,), ((ToolCall("ls", {"a": True}),),)
    )


@dataclass
class ScriptedSession:
    task: Task
    later_turns: list = field(default_factory=list)
    fail: object = None
    executed: list = field(default_factory=list)
    closed: int = 0
    threads: set = field(default_factory=set)

    def execute(self, calls):
        self.threads.add(threading.get_ident())
        if self.fail is not None:
            raise self.fail
        self.executed += calls
        return [f"ran {call.name}" for call in calls]

    def next_user_turn(self, message: str = ""):
        return self.later_turns.pop(0) if self.later_turns else None

    def outcome(self):
        return Outcome(bool(self.executed), float(bool(self.executed)))

    def close(self):
        self.closed += 1


@dataclass
class ScriptedEnvironment:
    later_turns: list = field(default_factory=list)
    fail: object = None
    sessions: list = field(default_factory=list)

    def tasks(self):
        return []

    def start(self, task):
        self.sessions.append(ScriptedSession(task, list(self.later_turns), self.fail))
        return self.sessions[-1]


class ScriptedPolicy:
    """Says the texts in order; an exception instead of a text is raised; ``cut`` leaves out the end-of-turn token."""

    def __init__(self, chat, texts, cut=(), version=3):
        self.chat, self.texts, self.cut, self.weight_version = chat, list(texts), set(cut), version
        self.requests = []

    async def generate(self, request):
        index = len(self.requests)
        self.requests.append(request)
        text = self.texts[index]
        if isinstance(text, Exception):
            raise text
        ids = self.chat.encode_assistant(text)[0]
        cut = index in self.cut or len(ids) + 1 > request.max_tokens
        ids = ids[: request.max_tokens] if cut else [*ids, self.chat.eos_ids[0]]
        return Completion(ids, [-0.5 - index] * len(ids), "length" if cut else "stop", self.weight_version)

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        return None
