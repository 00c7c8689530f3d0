"""In which order a run's engines and its policy start."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pact_nemo.config.load import load_config
from pact_nemo.training import open_run
from pact_nemo.training.generation import Generator


@pytest.mark.parametrize(
    ("cuda", "words", "order"),
    [
        # vLLM charges itself with what others take of its GPU while it starts: it has to be up before
        (True, (), ["plan", "launch", "ready", "sleep", "policy"]),
        (True, ("rollout.server.time_sharing=false",), ["plan", "launch", "ready", "policy"]),
        (True, ("rollout.server.url=http://a:1",), ["plan", "launch", "policy"]),
        # on a CPU both load at the same time; the plan measures it before they do
        (False, (), ["plan", "launch", "policy"]),
    ],
)
def test_engines_that_measure_a_gpu_are_up_before_the_policy_is_built(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cuda: bool, words: tuple[str, ...], order: list[str]
) -> None:
    done: list[str] = []
    config = load_config(None, [*words, "trainer.steps=1"])
    parts: Any = SimpleNamespace(close=lambda: None, train=[], traces={}, warmup_tasks=lambda count: [])
    space: Any = SimpleNamespace(
        folder=tmp_path, checkpoints=tmp_path, traces=tmp_path / "t", server_log=tmp_path / "log", exports=tmp_path
    )
    progress: Any = SimpleNamespace(message=lambda text: None, total_steps=1, phase=lambda *_, **__: nullcontext())
    for name in ("preflight", "check_batches", "write_traces", "served_path"):
        monkeypatch.setattr(open_run, name, lambda *_, **__: None)
    for name in ("model_path", "chat_format", "build_environment", "build_dataset", "weights_elsewhere", "TrainingRun"):
        monkeypatch.setattr(open_run, name, lambda *_, **__: parts)
    for name in ("on_cuda", "takes_turns"):
        on = cuda and not words if name == "takes_turns" else cuda
        monkeypatch.setattr(open_run, name, lambda *_, on=on, **__: on)
    monkeypatch.setattr("pact_nemo.training.generation.on_cuda", lambda settings: cuda)
    monkeypatch.setattr(open_run, "_settle", lambda config, *_: config)
    monkeypatch.setattr(open_run, "_plan", lambda *_: done.append("plan"))
    monkeypatch.setattr(open_run, "engine_share", lambda *_: 0.9)
    monkeypatch.setattr(open_run, "on_rank_zero", lambda call: call())
    monkeypatch.setattr(open_run, "rank", lambda: 0)
    monkeypatch.setattr(open_run.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(Generator, "launch", lambda *_: done.append("launch"))
    monkeypatch.setattr(Generator, "wait_ready", lambda *_: done.append("ready"))
    monkeypatch.setattr(Generator, "sleep", lambda *_, drop: done.append("sleep"))
    monkeypatch.setattr(open_run, "MegatronPolicy", lambda *_, **__: done.append("policy"))
    with ExitStack() as stack:
        open_run._build(stack, config, space, progress, SimpleNamespace(raise_if_set=None))  # type: ignore[arg-type]
    assert done == order
