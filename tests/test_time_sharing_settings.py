"""Which runs let trainer and engines take turns, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pact_nemo.config.load import load_config
from pact_nemo.config.schema import takes_turns
from pact_nemo.errors import ConfigError
from pact_nemo.serving.config import RolloutServerConfig
from pact_nemo.serving.endpoint import ServerEndpoint
from pact_nemo.serving.launch import engine_arguments


@pytest.mark.parametrize(
    ("words", "cuda", "on"),
    [
        ([], True, True),
        ([], False, False),
        (["rollout.server.time_sharing=true"], False, True),
        (["rollout.server.time_sharing=false"], True, False),
        (["rollout.server.url=http://10.0.0.1:8000"], True, False),
        (["trainer.overlap=true", "rollout.importance=tis"], True, False),
        (["trainer.replay=runs/before", "rollout.server.time_sharing=true"], True, False),
    ],
)
def test_who_takes_turns(words: list[str], cuda: bool, on: bool) -> None:
    assert takes_turns(load_config(None, words), cuda=cuda) is on


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["rollout.server.url=http://10.0.0.1:8000"], "rollout.server.url=http://10.0.0.1:8000 don't sleep"),
        (["trainer.overlap=true", "rollout.importance=tis"], "trainer.overlap=true"),
    ],
)
def test_servers_that_cannot_sleep_are_refused_by_name(words: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load_config(None, ["rollout.server.time_sharing=true", *words])


def test_only_a_server_on_a_gpu_is_started_for_sleep_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    def arguments(**settings: Any) -> list[str]:
        config = RolloutServerConfig(**settings)
        return engine_arguments(config, Path("/m"), ServerEndpoint("http://127.0.0.1:1", "k"), 1)

    assert "--enable-sleep-mode" not in arguments(device="cpu", time_sharing=True)  # vLLM refuses it there
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "--enable-sleep-mode" in arguments(device="cuda", time_sharing=True)
    assert "--enable-sleep-mode" not in arguments(device="cuda")
