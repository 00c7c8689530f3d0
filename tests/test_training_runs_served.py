"""Whole runs of the real recipe with rollout servers: its own, beside the update, and two that run elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from pact_nemo.checkpoints.resume_folders import steps as resume_steps
from pact_nemo.config.load import load_config
from tests.workers.recipe_runs import REPO, recipe, records, weights

#: refits bring adapters
ADAPTERS = ["policy.lora.rank=8", "policy.lora.alpha=16", "rollout.lora_refit=adapter"]
#: for runs with a warm-up, which leaves the adapters' reference
WITHOUT_REFERENCE = ["objective.kl_coef=0"]
every_kind = pytest.mark.parametrize("trained", ["all", "adapters"])


def what(trained: str) -> list[str]:
    return [*ADAPTERS, *WITHOUT_REFERENCE] if trained == "adapters" else []


def assert_refits_brought(run: Path, trained: str) -> None:
    for folder in run.glob("exports/v*"):
        assert (folder / "adapter_model.safetensors").is_file() == (trained == "adapters"), folder


def test_a_run_with_its_own_server(stage: dict[str, Any]) -> None:
    """The real thing at its smallest: server, evaluation, refit by export, version stamps, and no trace in any
    request.
    """
    words = [
        "trainer.replay=null",
        "trainer.steps=1",
        "rollout.sampling.max_turn_tokens=24",
        "rollout.server.max_model_len=512",
    ]
    run = recipe(stage, "served", *words)
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary["eval"]) == {"base", "before", "after"}
    assert [summary["eval"][name]["weight_version"] for name in ("base", "before", "after")] == [0, 1, 2]
    assert all(summary["eval"][name]["n"] == 2 and summary["eval"][name]["failed"] == 0 for name in summary["eval"])
    rollouts = [json.loads(line) for line in (run / "rollouts" / "step_000000.jsonl").read_text().splitlines()]
    assert (
        len(rollouts) == 16
        and {r["weight_version"] for r in rollouts} == {1}
        and all(r["status"] != "failed" for r in rollouts)
    )
    (row,) = [r for r in records(run) if r["stage"] == "rl"]
    assert (
        row["mismatch/mean_abs"] < 2e-3
    )  # sampler and trainer compute in float32: what was sampled is what is trained on
    assert summary["peak_memory_bytes"]["server"] > 0 and summary["seconds"]["rollout"] > 0

    from pact_nemo.chat.template import ChatFormat
    from pact_nemo.data.dataset import build_dataset
    from pact_nemo.data.tasks import build_environment
    from pact_nemo.environments.base import Task
    from pact_nemo.tracking.terminal import RunProgress
    from pact_nemo.training.generation import Generator

    config = load_config(stage["preset"], [*stage["words"], *words])
    chat = ChatFormat.from_pretrained(run / "hf", config.model.tool_format)
    environment = build_environment(config)
    dataset = build_dataset(config, environment, chat)
    tasks: list[Task] = dataset.train[:3]
    bodies: list[dict[str, Any]] = []
    with RunProgress(total_steps=1, enabled=False) as progress:
        generator = Generator(config, chat, environment, progress, stage["folder"] / "again.log")
        generator.on_request = bodies.append
        try:
            generator.launch(run / "hf")  # vLLM serves the export as it is
            generator.wait_ready()
            played = generator.rollouts(tasks, 2, step=0, version=0)
        finally:
            generator.close()
    assert len(bodies) == sum(len(r.turns) for r in played) >= 6
    sent = {tuple(body["token_ids"]) for body in bodies}
    allowed = {(*r.prompt_ids, *r.token_ids[: turn.start]) for r in played for turn in r.turns}
    assert sent == allowed  # a request is the prompt and what this very rollout wrote and saw, nothing else
    flat = " ".join(chat.decode(ids) for ids in sent)
    for task in tasks:
        for turn in dataset.traces[task.id].turns:
            for segment in turn.segments:
                assert segment.text.strip() not in flat


def learnt(run: Path) -> list[dict[str, Any]]:
    """A run's records without what its refits and moves of memory took."""
    return [{k: v for k, v in row.items() if not k.startswith(("refit/", "moved/"))} for row in records(run)]


TWO_STEPS = [
    "trainer.replay=null",
    "trainer.steps=2",
    "evaluation.before=false",
    "rollout.sampling.concurrency=1",
    "rollout.sampling.max_turn_tokens=16",
    "rollout.sampling.max_turns=2",
    "rollout.server.max_model_len=512",
    "rollout.server.cpu_threads=1",  # engines share the cores: another number of threads changes last bits
    "trainer.batch_size=2",
    "objective.group_size=2",
]


@pytest.fixture(scope="module")
def without_turns(stage: dict[str, Any]) -> Path:
    """Two ranks beside one engine, and nothing is moved."""
    return recipe(stage, "turns-none", *TWO_STEPS, "rollout.server.time_sharing=false", ranks=2)


@pytest.mark.slow
@pytest.mark.parametrize("engines", [1, 2, 4])
def test_two_ranks_and_engines_that_take_turns_change_no_bit(
    stage: dict[str, Any], without_turns: Path, engines: int
) -> None:
    """vLLM beside two ranks whose storages are really given back. One request at a time: what is computed together
    changes last bits.
    """
    words = [*TWO_STEPS, "rollout.server.time_sharing=true", f"rollout.server.engines={engines}"]
    run = recipe(stage, f"turns-{engines}", *words, ranks=2)
    assert learnt(run) == learnt(without_turns)
    one, other = weights(without_turns), weights(run)
    assert one.keys() == other.keys() and all(torch.equal(other[name], value) for name, value in one.items())
    moved = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(row["moved/copied"] > 0 for row in moved if row["stage"] == "rl")
    logs = sorted(run.glob("server*.log"))
    assert len(logs) == engines
    for said in (log.read_text() for log in logs):
        assert said.count("to fall asleep") >= 4 and said.count("to wake up tags") >= 6


@pytest.mark.slow
def test_refits_of_adapters_through_sleep_and_resume_change_no_bit(stage: dict[str, Any]) -> None:
    """One run has its server awake all the time. The other is cut after a step, resumed on the restored adapter, and
    takes turns with its server.
    """
    words = [
        "trainer.replay=null",
        *ADAPTERS,
        "warmup.steps=0",
        "evaluation.before=false",
        "rollout.sampling.concurrency=1",
        "rollout.sampling.max_turn_tokens=16",
        "rollout.sampling.max_turns=2",
        "rollout.server.max_model_len=512",
        "trainer.batch_size=2",
        "objective.group_size=2",
    ]
    whole = recipe(stage, "adapters-awake", *words)
    first = recipe(stage, "adapters-cut", *words, "rollout.server.time_sharing=true", "trainer.steps=1")
    resumed = recipe(stage, "adapters-cut", "trainer.steps=2", resume=first)
    rows = [learnt(run) for run in (whole, resumed)]
    assert rows[0] == rows[1] and len(rows[0]) == 2
    assert all(row["mismatch/mean_abs"] < 2e-3 for row in rows[0])
    one, other = weights(whole), weights(resumed)
    assert all(torch.equal(other[name], value) for name, value in one.items())
    for run, versions in ((whole, ["v000001", "v000002"]), (resumed, ["v000001", "v000002"])):
        exports = sorted(run.glob("exports/v*"))
        assert [path.name for path in exports] == versions
        assert all((path / "adapter_model.safetensors").is_file() for path in exports)
    scores = json.loads((resumed / "summary.json").read_text())["eval"]
    assert scores["after"]["weight_version"] == 2 and scores["after"]["failed"] == 0
    said = (resumed / "server.log").read_text()
    assert said.count("to fall asleep") >= 3 and said.count("Loaded new LoRA adapter: name 'policy-v000001-") == 2


@pytest.mark.slow
@every_kind
def test_generation_ahead_is_one_version_behind_and_survives_a_cut(stage: dict[str, Any], trained: str) -> None:
    """``trainer.overlap``: the first step samples from the weights it trains, later ones from those before; a
    checkpoint holds what was sampled.
    """
    words = [
        "trainer.replay=null",
        "trainer.overlap=true",
        "trainer.steps=3",
        "objective.schedule.horizon=3",
        "warmup.steps=0",
    ]
    words += [
        "rollout.sampling.max_turn_tokens=24",
        "rollout.server.max_model_len=512",
        "evaluation.before=false",
        "evaluation.after=false",
    ]
    words += ["trainer.keep_checkpoints=2", *(ADAPTERS if trained == "adapters" else [])]
    run = recipe(stage, f"ahead-{trained}", *words)
    assert_refits_brought(run, trained)
    rows = [row for row in records(run) if row["stage"] == "rl"]
    assert [row["rollout/lag"] for row in rows] == [0, 1, 1]
    dumped = [
        [json.loads(line) for line in (run / "rollouts" / f"step_{i:06d}.jsonl").read_text().splitlines()]
        for i in range(3)
    ]
    assert [{row["weight_version"] for row in step} for step in dumped] == [{0}, {0}, {1}]
    whole, uncut = weights(run), rows[-1]
    # under the policy that is one update on, the sampler's own log-probs are off by more than rounding
    assert rows[0]["mismatch/mean_abs"] < 2e-3 < rows[-1]["mismatch/mean_abs"]

    newest = max(resume_steps(run / "checkpoints"))
    shutil.rmtree(run / "checkpoints" / f"step_{newest:06d}")  # as if the run had died in its last step
    shutil.rmtree(run / "hf")
    again = recipe(stage, f"ahead-{trained}", *words, resume=run)
    last = [row for row in records(again) if row["stage"] == "rl"][-1]
    assert {k: v for k, v in last.items() if not k.startswith("refit/")} == {
        k: v for k, v in uncut.items() if not k.startswith("refit/")
    }
    after = weights(again)
    assert all(torch.equal(after[name], value) for name, value in whole.items())


@pytest.mark.slow
@every_kind
def test_two_servers_that_run_elsewhere_are_shared_and_refitted_together(stage: dict[str, Any], trained: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PACT_ROLLOUT_API_KEY": "a key of this run"}
    folder = stage["folder"] / f"servers-{trained}"
    folder.mkdir()
    serve = [
        sys.executable,
        str(REPO / "tools" / "serve.py"),
        "--config",
        stage["preset"],
        f"model.path={stage['folder'] / 'model'}",
        *what(trained),
    ]
    servers = [
        subprocess.Popen(
            [*serve, "--ready", str(folder / f"{i}.url"), "--log", str(folder / f"{i}.log")], env=environment, cwd=REPO
        )
        for i in (0, 1)
    ]
    try:
        deadline = time.monotonic() + 240
        while len(list(folder.glob("*.url"))) < 2:
            assert time.monotonic() < deadline and all(server.poll() is None for server in servers)
            time.sleep(0.5)
        urls = ",".join(path.read_text().strip() for path in sorted(folder.glob("*.url")))
        words = [
            "--config",
            stage["preset"],
            *stage["words"],
            f"run.name=shared-{trained}",
            "trainer.replay=null",
            *what(trained),
            f"rollout.server.url={urls}",
        ]
        short = [
            "trainer.steps=1",
            "trainer.batch_size=2",
            "trainer.mini_batch_size=2",
            "rollout.sampling.max_turn_tokens=24",
        ]
        command = [sys.executable, str(REPO / "recipes" / "pact_bfcl.py"), *words, *short]
        done = subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=REPO, env=environment)
        assert done.returncode == 0, f"{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
        assert "2 rollout servers ready" in done.stdout
        run = stage["folder"] / "runs" / f"shared-{trained}-pact-seed1234-1"
        assert_refits_brought(run, trained)
        summary = json.loads((run / "summary.json").read_text())
        assert [summary["eval"][name]["weight_version"] for name in ("base", "before", "after")] == [0, 1, 2]
        assert all(summary["eval"][name]["failed"] == 0 for name in summary["eval"])
        (row,) = [r for r in records(run) if r["stage"] == "rl"]
        assert (
            row["mismatch/mean_abs"] < 2e-3 and row["rollout/failed"] == 0
        )  # both servers sample what the trainer computes
        assert "a key of this run" not in (run / "config.yaml").read_text() + done.stdout + done.stderr
        assert all(server.poll() is None for server in servers)  # an attached server is left running
    finally:
        for server in servers:
            server.terminate()
        assert [server.wait(30) for server in servers] == [0, 0]


@pytest.mark.slow
@every_kind
def test_a_run_of_two_nodes_has_an_engine_on_each(stage: dict[str, Any], trained: str) -> None:
    """Two ranks that are two nodes: engines, evaluations, a step, refits of both, and a clean end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    environment = {**os.environ, **shared, "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    words = [
        "--config",
        stage["preset"],
        *stage["words"],
        f"run.name=nodes-{trained}",
        "trainer.replay=null",
        "trainer.steps=1",
    ]
    words += ["trainer.batch_size=2", "trainer.mini_batch_size=2", "rollout.sampling.max_turn_tokens=24"]
    words += ["rollout.server.max_model_len=512", "rollout.server.engines=all", *what(trained)]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(REPO / "recipes" / "pact_bfcl.py"), *words],
            env={**environment, "RANK": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=REPO,
        )
        for number in (0, 1)
    ]
    try:
        said = [one.communicate(timeout=580)[0] for one in ranks]
    finally:
        for one in ranks:
            one.kill()
    assert [one.returncode for one in ranks] == [0, 0], said
    run = stage["folder"] / "runs" / f"nodes-{trained}-pact-seed1234-1"
    assert_refits_brought(run, trained)
    assert "2 rollout servers ready" in said[0]
    assert sorted(path.name for path in run.glob("server*.log")) == ["server-0.log", "server-1.log"]
    summary = json.loads((run / "summary.json").read_text())
    assert [summary["eval"][name]["weight_version"] for name in ("base", "before", "after")] == [0, 1, 2]
    assert all(summary["eval"][name]["failed"] == 0 for name in summary["eval"])
    (row,) = [r for r in records(run) if r["stage"] == "rl"]
    assert row["mismatch/mean_abs"] < 2e-3 and row["rollout/failed"] == 0 and row["engines/share"] == 1
    assert serving(stage["folder"] / "model") == []


def serving(model: Path) -> list[str]:
    """Processes that serve a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"--model={model}" in (entry / "cmdline").read_text().replace("\0", " "):
                found.append(entry.name)
    return found
