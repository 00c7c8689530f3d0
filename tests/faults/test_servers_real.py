"""vLLM itself, killed and stopped in the middle of generation: the episodes are those of an undisturbed server."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
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


@pytest.mark.slow
@pytest.mark.faults
def test_vllm_killed_and_stopped_in_mid_generation(tmp_path: Path) -> None:
    model = materialise_embedded_model(REPO / ".cache" / "pact_nemo")
    chat = ChatFormat.from_pretrained(model, "pythonic")
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
    sent: list[dict[str, Any]] = []
    notes: list[str] = []
    at: dict[int, Any] = {}

    def on_request(body: dict[str, Any]) -> None:
        sent.append(body)
        if len(sent) in at:  # the request is on its way; it is answered after some tenths of a second
            threading.Timer(0.1, at.pop(len(sent))).start()

    server = RolloutServer(config, model, log_file=tmp_path / "server.log")
    server.launch()
    supervised = SupervisedServer(server, note=notes.append, on_request=on_request, like=model)

    def play() -> list[Rollout]:
        tasks = [
            Task(f"t{i}", "g", "c", (({"role": "user", "content": f"Name a number above {i}."},),), (), ((),))
            for i in range(4)
        ]
        settings: Any = dict(setup=EpisodeSetup(OneTurn(), chat, LIMITS, Sampling(), SeedPath(3, 1)), concurrency=4)
        return asyncio.run(run_batch(tasks, 2, clients=[supervised], **settings))

    def engine() -> int:
        """The process of the group that isn't its leader: vLLM's engine."""
        assert server.pid is not None
        return max(pid for pid in group_members(server.pid) if pid != server.pid)

    def content(rollouts: list[Rollout]) -> list[Any]:
        return [(r.task_id, r.sample, r.status, r.token_ids, r.loss_mask, r.weight_version) for r in rollouts]

    try:
        supervised.wait_ready()
        plain = play()
        assert all(rollout.status != "failed" for rollout in plain)
        faults = {
            "front end killed": lambda: os.kill(server.pid or 0, signal.SIGKILL),
            "engine killed": lambda: os.kill(engine(), signal.SIGKILL),
            "engine stopped": lambda: os.kill(engine(), signal.SIGSTOP),
        }
        for number, (name, fault) in enumerate(faults.items(), 1):
            sent.clear()
            at[3] = fault
            group = server.pid
            again = play()
            assert content(again) == content(plain), name
            pairs = [
                pair
                for x, y in zip(again, plain, strict=True)
                for pair in zip(x.sampler_logprobs, y.sampler_logprobs, strict=True)
            ]
            difference = max(abs(a - b) for a, b in pairs)
            print(f"{name}: {len(sent)} requests sent, log-probs differ by at most {difference:g}; {notes[-2:]}")
            assert difference < 1e-4 and supervised.health.restarts == number and len(sent) > 8, notes
            assert group is not None and group_members(group) == []
        tally.record("vLLM killed or stopped in mid-generation", injected=3, survived=3, lost=0)
    finally:
        server.close()
