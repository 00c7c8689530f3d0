"""A client of the real server, its requests, episodes of two turns, and transformers' log-probs of what was sampled."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from pact_nemo.chat.template import ChatFormat
from pact_nemo.environments.base import Outcome, Task, ToolCall
from pact_nemo.rollouts.batch import run_batch
from pact_nemo.rollouts.episode import EpisodeSetup, SeedPath
from pact_nemo.rollouts.types import Rollout
from pact_nemo.serving.client import Completion, GenerationRequest, RolloutClient
from pact_nemo.serving.config import EpisodeLimits, Sampling
from pact_nemo.serving.server import RolloutServer

LIMITS = EpisodeLimits(
    max_turns_per_user_turn=3, max_turns=6, max_turn_tokens=24, max_response_tokens=200, max_model_len=1024
)


def client_of(server: RolloutServer, **changes: Any) -> RolloutClient:
    settings: dict[str, Any] = dict(
        endpoint=server.endpoint, weight_version=0, request_timeout_s=120.0, connect_retries=1, admin_timeout_s=120.0
    )
    return RolloutClient(**(settings | changes))


def sample(client: RolloutClient, *requests: GenerationRequest) -> list[Completion]:
    async def call() -> list[Completion]:
        async with client:
            return list(await asyncio.gather(*(client.generate(request) for request in requests)))

    return asyncio.run(call())


def request(chat: ChatFormat, text: str = "Name three colours.", **changes: Any) -> GenerationRequest:
    prompt = tuple(chat.prompt_ids([{"role": "user", "content": text}], []))
    settings: dict[str, Any] = dict(
        max_tokens=24, temperature=1.0, top_p=1.0, stop_token_ids=tuple(chat.eos_ids), seed=11
    )
    return GenerationRequest(prompt, **(settings | changes))


@torch.no_grad()
def reference_logprobs(
    folder: Path, prompt: Sequence[int], sampled: Sequence[int], temperature: float = 1.0, top_p: float = 1.0
) -> torch.Tensor:
    """transformers' log-probs of the sampled tokens under the distribution that a sampler with these settings draws
    from.
    """
    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits = model(torch.tensor([[*prompt, *sampled]])).logits[0, len(prompt) - 1 : -1] / temperature
    if top_p < 1:
        values, order = logits.softmax(-1).sort(-1, descending=True)
        outside = values.cumsum(-1) - values >= top_p
        logits[torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, outside)] = -torch.inf
    return logits.log_softmax(-1).gather(-1, torch.tensor(sampled)[:, None])[:, 0]


@dataclass
class TwoTurnSession:
    task: Task
    left: int = 1

    def execute(self, calls: list[ToolCall]) -> list[str]:
        return ["done"] * len(calls)

    def next_user_turn(self, message: str = "") -> tuple[list[dict[str, str]], list[Any]] | None:
        self.left -= 1
        return ([{"role": "user", "content": "And one more?"}], []) if self.left >= 0 else None

    def outcome(self) -> Outcome:
        return Outcome(True, 1.0)

    def close(self) -> None:
        pass


class TwoTurns:
    def tasks(self) -> list[Task]:
        return []

    def close(self) -> None: ...

    def start(self, task: Task) -> TwoTurnSession:
        return TwoTurnSession(task)


def play(
    server: RolloutServer,
    chat: ChatFormat,
    client: RolloutClient | list[RolloutClient],
    tasks: int = 2,
    samples: int = 2,
    concurrency: int = 8,
) -> list[Rollout]:
    texts = [f"Name a number larger than {i}." for i in range(tasks)]
    items = [
        Task(f"t{i}", f"t{i}", "c", (({"role": "user", "content": text},),), (), ((),)) for i, text in enumerate(texts)
    ]
    settings: dict[str, Any] = dict(
        setup=EpisodeSetup(TwoTurns(), chat, LIMITS, Sampling(), SeedPath(3, 1)),
        concurrency=concurrency,
    )
    return asyncio.run(run_batch(items, samples, clients=client if isinstance(client, list) else [client], **settings))
