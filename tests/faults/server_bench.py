"""A supervised fake server (fake_server.py) with faults on order, and small episodes against it."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from pact_nemo.chat.contexts import Contexts
from pact_nemo.checkpoints.adapter_exports import BASE_KEY, PEFT_FACTS, base_digest
from pact_nemo.checkpoints.manifest import new_export
from pact_nemo.environments.base import Outcome, Task
from pact_nemo.errors import ServerError
from pact_nemo.rollouts.batch import run_batch
from pact_nemo.rollouts.episode import EpisodeSetup, SeedPath
from pact_nemo.rollouts.types import Rollout
from pact_nemo.serving.adapters import AdapterRoom
from pact_nemo.serving.config import EpisodeLimits, RolloutServerConfig, Sampling
from pact_nemo.serving.fleet import Fleet
from pact_nemo.serving.refit import check_export, load
from pact_nemo.serving.server import RolloutServer
from pact_nemo.serving.supervisor import SupervisedServer

CONFIG: dict[str, Any] = dict(
    device="cpu",
    request_timeout_s=3.0,
    heartbeat_s=0.1,
    heartbeat_timeout_s=3.0,
    connect_retries=1,
    refit_timeout_s=2.0,
    max_restarts=3,
    start_timeout_s=20.0,
)
LIMITS = EpisodeLimits(
    max_turns_per_user_turn=3, max_turns=6, max_turn_tokens=12, max_response_tokens=200, max_model_len=1024
)
EPISODES, TURNS = 6, 3


class Chat:
    """The least that an episode needs."""

    eos_ids = [1]

    @property
    def tool_format(self) -> Any:
        return self

    def parse(self, text: str, tools: Any) -> Any:
        return type("Parsed", (), {"calls": [], "errors": []})

    def prompt_ids(self, messages: Any, tools: Any) -> list[int]:
        return [ord(letter) for letter in messages[0]["content"]]

    def continuation_ids(self, messages: Any, after_eos: bool, new_tools: Any = ()) -> list[int]:
        return [5, 6]

    def decode(self, ids: Any) -> str:
        return str(list(ids))

    opened_ids: list[int] = []

    def earlier_ids(self, ids: Any, user: bool) -> list[int] | None:
        return None

    def contexts(self) -> Contexts:
        return Contexts(self)


class Turns:
    """Three user turns, and a note of every message, to see that no turn of an episode is played twice."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, str]] = []

    def start(self, task: Task) -> Any:
        environment = self

        class Session:
            left = TURNS - 1

            def next_user_turn(self, message: str = "") -> Any:
                environment.heard.append((task.id, message))
                self.left -= 1
                return ([{"role": "user", "content": "on"}], []) if self.left >= 0 else None

            def outcome(self) -> Outcome:
                return Outcome(True, 1.0)

            def close(self) -> None:
                pass

        Session.task = task  # type: ignore[attr-defined]
        return Session()


class Bench:
    """One supervised fake server.

    Args:
        adapters: refits bring them alone.
    """

    def __init__(self, folder: Path, *, adapters: bool = False):
        self.folder, self.adapters = folder, AdapterRoom(1, ("layer",)) if adapters else None
        self.notes: list[str] = []
        self.supervised: SupervisedServer | None = None

    def export(self, version: int) -> Path:
        model = self.folder / "model"
        facts = {**PEFT_FACTS, BASE_KEY: base_digest(model)} if self.adapters is not None else {}
        with new_export(self.folder / "exports", version, facts) as folder:
            (self._model if self.adapters is None else self._adapter)(folder, version)
        return self.folder / "exports" / f"v{version:06d}"

    @staticmethod
    def _model(folder: Path, number: int) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text("{}")
        tensors = {"w": np.full(8, number, np.float32), "layer.weight": np.full((4, 4), number, np.float32)}
        save_file(tensors, folder / "model.safetensors")

    @staticmethod
    def _adapter(folder: Path, number: int) -> None:
        (folder / "adapter_config.json").write_text("{}")
        factors = {"A": np.full((1, 4), number, np.float32), "B": np.full((4, 1), number, np.float32)}
        tensors = {f"base_model.model.layer.lora_{name}.weight": factor for name, factor in factors.items()}
        save_file(tensors, folder / "adapter_model.safetensors")

    def fault(self, *faults: dict[str, Any]) -> None:
        """What is to go wrong from now on, instead of what was."""
        (self.folder / "faults.json").write_text(json.dumps(faults))

    def launch(self, *faults: dict[str, Any], **settings: Any) -> SupervisedServer:
        self._model(self.folder / "model", 0)
        self.fault(*faults)
        for count in self.folder.glob("*.count"):
            count.unlink()
        server = RolloutServer(
            RolloutServerConfig(**{**CONFIG, **settings}),
            self.folder / "model",
            log_file=self.folder / "server.log",
            adapters=self.adapters,
        )
        server.program = (sys.executable, str(Path(__file__).with_name("fake_server.py")), str(self.folder))
        server.launch()
        self.supervised = SupervisedServer(server, note=self.notes.append, like=self.folder / "model")
        self.supervised.wait_ready()
        return self.supervised

    def close(self) -> None:
        if self.supervised is not None:
            self.supervised.server.close()

    def refit(self, version: int) -> None:
        """As Generator.refit does."""
        served = self.supervised
        assert served is not None
        folder = (
            self.export(version)
            if not (self.folder / "exports" / f"v{version:06d}").exists()
            else self.folder / "exports" / f"v{version:06d}"
        )
        check_export([served.client], folder, version, like=self.folder / "model")
        served.refitting(folder, version)
        try:
            load(served.client, folder, version)
            served.refitted()
        except ServerError as error:
            served.recover(str(error))


def play(
    served: SupervisedServer | Fleet, step: int = 0, tasks: int = EPISODES // 2, *, whole: bool = True
) -> list[Rollout]:
    """Two episodes of each task. ``whole``: none of them is cut short by a limit, as a model's may be."""
    items = [
        Task(f"t{i}", f"t{i}", "c", (({"role": "user", "content": f"task {i}"},),), (), ((),)) for i in range(tasks)
    ]
    environment = Turns()
    batch = run_batch(
        items,
        2,
        clients=served.routes(tasks) if isinstance(served, Fleet) else [served],
        setup=EpisodeSetup(environment, Chat(), LIMITS, Sampling(), SeedPath(3, step)),
        concurrency=4,
    )  # type: ignore[arg-type]
    rollouts = asyncio.run(batch)
    assert len(environment.heard) == 2 * tasks * TURNS or not whole
    return rollouts


def content(rollouts: list[Rollout]) -> list[Any]:
    return [
        (r.task_id, r.sample, r.status, r.token_ids, r.loss_mask, r.sampler_logprobs, r.weight_version)
        for r in rollouts
    ]
