"""Dumped rollouts without a server: the real episode loop and environment, with a scripted policy in the server's
place.
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

from pact_nemo.batches.prompt_groups import Gate, TraceUse, form_group
from pact_nemo.chat.template import ChatFormat
from pact_nemo.config.limits import training_limits
from pact_nemo.config.schema import Config
from pact_nemo.data.dataset import build_dataset
from pact_nemo.data.tasks import build_environment, prompts_of_step
from pact_nemo.environments.base import Task
from pact_nemo.methods.registry import make_method
from pact_nemo.rollouts.episode import EpisodeSetup, SeedPath, run_episode
from pact_nemo.rollouts.types import Rollout
from pact_nemo.serving.client import Completion, GenerationRequest
from pact_nemo.serving.config import Sampling
from pact_nemo.tracking.episodes import dump_step
from pact_nemo.tracking.run_folder import Workspace


class ScriptedPolicy:
    """Answers each request with the next of its texts; log-probs are made up (a replay doesn't correct for them)."""

    weight_version = 0

    def __init__(self, chat: ChatFormat, texts: list[str]):
        self.chat, self.texts = chat, list(texts)

    async def generate(self, request: GenerationRequest) -> Completion:
        text = self.texts.pop(0) if self.texts else "Done."
        ids = [*self.chat.encode_assistant(text)[0], self.chat.end_of_turn_id][: request.max_tokens]
        return Completion(ids, [-1.0] * len(ids), "stop", 0)


def scripts(task: Task, chat: ChatFormat, generator: random.Random) -> list[str]:
    """Right, half right, malformed or no call at all."""
    calls = [call for turn in task.reference_calls for call in turn]
    right = chat.tool_format.render_calls(calls)
    kind = generator.choice(["right", "first", "malformed", "silent", "twice"])
    if kind == "right":
        return ["Use it.\n" + right, "Done."]
    if kind == "first":
        return [chat.tool_format.render_calls(calls[:1]), "That should be all."]
    if kind == "malformed":
        return ["[" + right, "Sorry."]
    if kind == "twice":
        return [right, right, "Done."]
    return ["I can't do that."]


def write_replay(config: Config, model: Path, folder: Path, steps: int) -> None:
    """A run folder with ``steps`` dumped training steps of ``config``."""
    chat = ChatFormat.from_pretrained(model, config.model.tool_format)
    environment = build_environment(config)
    dataset = build_dataset(config, environment, chat)
    limits = training_limits(config)

    def play(task: Task, k: int, step: int) -> Rollout:
        client: Any = ScriptedPolicy(chat, scripts(task, chat, random.Random(f"{task.id}{k}{step}")))
        return asyncio.run(
            run_episode(task, k, EpisodeSetup(environment, chat, limits, Sampling(), SeedPath(1, step)), client)
        )

    for step in range(steps):
        groups, gate = [], Gate(config.run.seed, step, config.objective.anchor_prob)
        for task in prompts_of_step(dataset.train, step, config.trainer.batch_size, config.run.seed):
            rollouts = [play(task, k, step) for k in range(config.objective.group_size)]
            groups.append(
                form_group(task, rollouts, TraceUse(dataset.trace_tokens.get(task.id)), make_method(config), gate)
            )
        dump_step(Workspace(folder).step_rollouts(step), groups)
