"""vLLM itself, killed and stopped in the middle of generation: the episodes are those of an undisturbed server."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pact_nemo.chat.template import ChatFormat
from pact_nemo.checkpoints.embedded import materialise_embedded_model
from pact_nemo.environments.base import Outcome, Task
from pact_nemo.rollouts.batch import run_batch
from pact_nemo.rollouts.episode import EpisodeSetup, SeedPath
from pact_nemo.rollouts.types import Rollout
from pact_nemo.serving.config import EpisodeLimits, RolloutServerConfig, Sampling
from pact_nemo.serving.server import RolloutServer, group_members
from pact_nemo.serving.supervisor import SupervisedServer
from tests.faults import tally

pytest.importorskip("vllm")
REPO = Path(__file__).resolve().parents[2]
LIMITS = EpisodeLimits(
    max_turns_per_user_turn=3, max_turns=6, max_turn_tokens=24, max_response_tokens=200, max_model_len=512
)


class OneTurn:
    def start(self, task: Task) -> Any:
        class Session:
            def next_user_turn(self, message: str = "") -> None:
                return None

            def execute(self, calls: Any) -> list[str]:
                return ["ok"] * len(calls)

            def outcome(self) -> Outcome:
                return Outcome(True, 1.0)

            def close(self) -> None:
                pass

        return Session()


class Stage:
    """vLLM under supervision, and faults that happen while a request of a given number is on its way."""

    def __init__(self, folder: Path):
        model = materialise_embedded_model(REPO / ".cache" / "pact_nemo")
        self.chat = ChatFormat.from_pretrained(model, "pythonic")
        config = RolloutServerConfig(
            device="cpu",
            dtype="float32",
            max_model_len=512,
            max_num_seqs=8,
            max_num_batched_tokens=512,
            heartbeat_s=1.0,
            heartbeat_timeout_s=20.0,
            max_restarts=3,
        )
        self.sent: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.at: dict[int, Any] = {}
        self.server = RolloutServer(config, model, log_file=folder / "server.log")
        self.server.launch()
        self.supervised = SupervisedServer(self.server, note=self.notes.append, on_request=self._on_request, like=model)

    def _on_request(self, body: dict[str, Any]) -> None:
        self.sent.append(body)
        if len(self.sent) in self.at:  # the request is on its way; it is answered after some tenths of a second
            threading.Timer(0.1, self.at.pop(len(self.sent))).start()

    def play(self) -> list[Rollout]:
        tasks = [
            Task(f"t{i}", "g", "c", (({"role": "user", "content": f"Name a number above {i}."},),), (), ((),))
            for i in range(4)
        ]
        setup = EpisodeSetup(OneTurn(), self.chat, LIMITS, Sampling(), SeedPath(3, 1))
        settings: Any = dict(setup=setup, concurrency=4)
        return asyncio.run(run_batch(tasks, 2, clients=[self.supervised], **settings))

    def engine(self) -> int:
        """The process of the group that isn't its leader: vLLM's engine."""
        assert self.server.pid is not None
        return max(pid for pid in group_members(self.server.pid) if pid != self.server.pid)

    def faults(self) -> dict[str, Callable[[], None]]:
        return {
            "front end killed": lambda: os.kill(self.server.pid or 0, signal.SIGKILL),
            "engine killed": lambda: os.kill(self.engine(), signal.SIGKILL),
            "engine stopped": lambda: os.kill(self.engine(), signal.SIGSTOP),
        }


def content(rollouts: list[Rollout]) -> list[Any]:
    return [(r.task_id, r.sample, r.status, r.token_ids, r.loss_mask, r.weight_version) for r in rollouts]


def largest_difference(again: list[Rollout], plain: list[Rollout]) -> float:
    """Of their log-probs, token by token."""
    pairs = [
        pair
        for x, y in zip(again, plain, strict=True)
        for pair in zip(x.sampler_logprobs, y.sampler_logprobs, strict=True)
    ]
    return max(abs(a - b) for a, b in pairs)


@pytest.mark.slow
@pytest.mark.faults
def test_vllm_killed_and_stopped_in_mid_generation(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    server, supervised, sent, notes = stage.server, stage.supervised, stage.sent, stage.notes
    try:
        supervised.wait_ready()
        plain = stage.play()
        assert all(rollout.status != "failed" for rollout in plain)
        for number, (name, fault) in enumerate(stage.faults().items(), 1):
            sent.clear()
            stage.at[3] = fault
            group = server.pid
            again = stage.play()
            assert content(again) == content(plain), name
            difference = largest_difference(again, plain)
            print(f"{name}: {len(sent)} requests sent, log-probs differ by at most {difference:g}; {notes[-2:]}")
            assert difference < 1e-4 and supervised.health.restarts == number and len(sent) > 8, notes
            assert group is not None and group_members(group) == []
        tally.record("vLLM killed or stopped in mid-generation", injected=3, survived=3, lost=0)
    finally:
        server.close()
