"""A client of the real server, its requests, episodes of two turns, and transformers' log-probs of what was sampled."""

import asyncio
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM

from pact_nemo.environments.base import Outcome, Task
from pact_nemo.rollouts.batch import run_batch
from pact_nemo.rollouts.episode import EpisodeSetup, SeedPath
from pact_nemo.serving.client import GenerationRequest, RolloutClient
from pact_nemo.serving.config import EpisodeLimits, Sampling

LIMITS = EpisodeLimits(
    max_turns_per_user_turn=3, max_turns=6, max_turn_tokens=24, max_response_tokens=200, max_model_len=1024
)


def client_of(server, **changes):
    settings = dict(
        endpoint=server.endpoint, weight_version=0, request_timeout_s=120.0, connect_retries=1, admin_timeout_s=120.0
    )
    return RolloutClient(**(settings | changes))


def sample(client, *requests):
    async def call():
        async with client:
            return await asyncio.gather(*(client.generate(request) for request in requests))

    return asyncio.run(call())


def request(chat, text="Name three colours.", **changes):
    prompt = tuple(chat.prompt_ids([{"role": "user", "content": text}], []))
    settings = dict(max_tokens=24, temperature=1.0, top_p=1.0, stop_token_ids=tuple(chat.eos_ids), seed=11)
    return GenerationRequest(prompt, **(settings | changes))


@torch.no_grad()
def reference_logprobs(folder, prompt, sampled, temperature=1.0, top_p=1.0):
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

    def execute(self, calls):
        return ["done"] * len(calls)

    def next_user_turn(self, message: str = ""):
        self.left -= 1
        return ([{"role": "user", "content": "And one more?"}], []) if self.left >= 0 else None

    def outcome(self):
        return Outcome(True, 1.0)

    def close(self):
        pass


class TwoTurns:
    def start(self, task):
        return TwoTurnSession(task)


def play(server, chat, client, tasks=2, samples=2, concurrency=8):
    texts = [f"Name a number larger than {i}." for i in range(tasks)]
    items = [
        Task(f"t{i}", f"t{i}", "c", (({"role": "user", "content": text},),), (), ((),)) for i, text in enumerate(texts)
    ]
    settings = dict(
        setup=EpisodeSetup(TwoTurns(), chat, LIMITS, Sampling(), SeedPath(3, 1)),
        concurrency=concurrency,
    )
    return asyncio.run(run_batch(items, samples, clients=client if isinstance(client, list) else [client], **settings))
