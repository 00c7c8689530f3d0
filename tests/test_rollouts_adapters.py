"""Adapters that refits bring to the real server beside its base: log-probs are the trainer's after each, and neither an
older adapter nor the base answers for it. (Servers that fail: faults/test_adapter_refits.py.)
"""

from __future__ import annotations

import os
import signal
import time
import typing
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pact_nemo.chat.template import ChatFormat
from pact_nemo.checkpoints.hf import export_adapter_to, export_version
from pact_nemo.errors import ConfigError, ServerError
from pact_nemo.policy.config import ADAPTER, LORA_MATRICES, LoraConfig
from pact_nemo.policy.policy import MegatronPolicy
from pact_nemo.policy.trees import TokenTree, TreeBuilder
from pact_nemo.serving import launch
from pact_nemo.serving.adapters import RANKS, AdapterRoom
from pact_nemo.serving.client import Completion, GenerationRequest, RolloutClient, StaleWeights
from pact_nemo.serving.config import RolloutServerConfig
from pact_nemo.serving.fleet import Fleet
from pact_nemo.serving.server import RolloutServer
from pact_nemo.serving.supervisor import SupervisedServer
from tests.workers.policy_kit import make_chat_model
from tests.workers.server_kit import request, sample
from tests.workers.small_policy import build

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

CONFIG = RolloutServerConfig(
    device="cpu", dtype="float32", max_model_len=1024, max_num_seqs=16, max_num_batched_tokens=1024
)
ROOM = AdapterRoom(6, tuple(name for names in LORA_MATRICES.values() for name in names))


@pytest.fixture(scope="module")
def fleet(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    log = tmp_path_factory.mktemp("server") / "server.log"
    server = RolloutServer(CONFIG, model_dir, log_file=log, adapters=ROOM)
    try:
        server.launch()
        fleet = Fleet([SupervisedServer(server, like=model_dir)], min_share=1.0, note=print)
        fleet.wait_ready()
        yield fleet
    finally:
        server.close()


@pytest.fixture(scope="module")
def policy(model_dir: Path) -> MegatronPolicy:
    return build(model_dir, lora=LoraConfig(rank=6, alpha=12.0), micro_batch_tokens=2048)


@torch.no_grad()
def move(policy: MegatronPolicy, *, seed: int | None = None, by: float = 1.0) -> None:
    """Other adapters: drawn, or the same with every B multiplied."""
    generator = torch.Generator().manual_seed(seed or 0)
    for name, param in policy.chunks[0].named_parameters():
        if name.endswith("linear_out.weight"):
            param.copy_(0.02 * torch.randn(param.shape, generator=generator) if seed is not None else by * param)


def tree(asked: GenerationRequest, answer: Completion) -> TokenTree:
    builder = TreeBuilder(asked.prompt_ids)
    builder.add(answer.token_ids, [True] * len(answer.token_ids), builder.root)
    return builder.build()


def off(policy: MegatronPolicy, asked: list[GenerationRequest], answers: list[Completion]) -> float:
    """Largest difference of the trainer's log-probs from the server's, nats."""
    trees = [tree(one, answer) for one, answer in zip(asked, answers, strict=True)]
    found = zip(policy.logprobs(trees), answers, strict=True)
    return max(float((ours - torch.tensor(answer.logprobs)).abs().max()) for ours, answer in found)


def test_each_refit_brings_the_trainers_adapters_and_no_others(
    fleet: Fleet, policy: MegatronPolicy, chat: ChatFormat, model_dir: Path, tmp_path: Path
) -> None:
    (engine,) = fleet.engines
    # a long prompt fills blocks of the prefix cache, which are another version's at the next refit
    asked = [request(chat, seed=1), request(chat, "Tell me about rivers. " * 40, seed=2)]
    seen = {0: sample(engine.client, *asked)}
    assert off(policy, asked, seen[0]) < 2e-3, "B is 0: the base"
    names: list[str] = []
    for version, change in ((1, {"seed": 5}), (2, {"seed": 6}), (3, {"by": 2.0}), (4, {"by": -1.0})):
        move(policy, **change)
        folder = export_version(policy, tmp_path, version, kind=ADAPTER)
        start = time.perf_counter()
        (report,) = fleet.refit(folder, version, like=model_dir)
        print(f"version {version}: {report.bytes / 1e6:.1f} MB in {time.perf_counter() - start:.2f} s")
        assert engine.health.restarts == 0 and report.bytes < 20e6
        names.append(engine.client.model)
        assert engine.client.admin.adapters() == [names[-1]], "the old one was dropped"
        again = sample(engine.client, *asked)
        assert {answer.weight_version for answer in again} == {version}
        difference = off(policy, asked, again)
        print(f"version {version}: {difference:.2g} nats from the trainer's")
        assert difference < 2e-3
        assert off(policy, asked, seen[version - 1]) > 0.05, "and the version before said something else"
        seen[version] = again
    assert len(set(names)) == 4
    stale = RolloutClient(
        engine.server.endpoint, weight_version=4, request_timeout_s=60, connect_retries=0, admin_timeout_s=60
    )
    stale.model = names[0]
    with pytest.raises(StaleWeights, match="has no policy-v000001"):
        sample(stale, asked[0])

    group = engine.server.pid
    assert group is not None
    os.killpg(group, signal.SIGKILL)
    engine.recover("killed")
    assert engine.client.admin.adapters() == [names[-1]] and engine.weight_version == 4
    after = sample(engine.client, *asked)
    assert [answer.token_ids for answer in after] == [answer.token_ids for answer in seen[4]]
    assert off(policy, asked, after) < 2e-3


def test_what_vllm_passes_over_is_refused(
    fleet: Fleet, policy: MegatronPolicy, chat: ChatFormat, model_dir: Path, tmp_path: Path
) -> None:
    """An adapter of matrices that the server was not started for. vLLM takes it and leaves them out."""
    (engine,) = fleet.engines
    server = RolloutServer(
        CONFIG, model_dir, log_file=tmp_path / "server.log", adapters=AdapterRoom(6, ("q_proj", "k_proj", "v_proj"))
    )
    with server:
        admin = server.admin()
        folder = export_version(policy, tmp_path / "exports", 7, kind=ADAPTER)
        with pytest.raises(ServerError, match=r"90 of its 210 matrices are computed with"):
            admin.load_adapter("policy-v000007", folder, 7)
        assert admin.loaded_version() == -1
        facts = admin.adapter_facts()
        assert (facts.rank, facts.runtime) == (8, True) and set(facts.targets or ()) == {"q_proj", "k_proj", "v_proj"}
        assert ROOM.lacks(facts.rank, facts.targets, facts.runtime) == [
            f"--lora-target-modules {' '.join(ROOM.targets)}"
        ]
        # attached to by a run whose adapters it has no room for, and by one that brings whole models
        os.environ["TEST_ADAPTERS_KEY"] = server.endpoint.api_key
        attached: dict[str, Any] = dict(
            config=RolloutServerConfig(url=server.endpoint.url, api_key_env="TEST_ADAPTERS_KEY"),
            model_path=model_dir,
            log_file=tmp_path / "log",
        )
        with pytest.raises(ConfigError, match=r"without --lora-target-modules q_proj.*rollout\.lora_refit=merged"):
            RolloutServer(**attached, adapters=ROOM).__enter__()
        with RolloutServer(**attached) as whole:
            assert whole.admin().adapters() == [] and whole.admin().loaded_version() is None


def test_a_server_that_is_split_over_ranks_computes_with_whole_adapters(
    chat: ChatFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the recipes of eight GPUs serve: each rank has a part of A or B of each matrix."""
    unbound = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}  # two ranks on any number of cores
    on_cpu = launch._on_cpu
    monkeypatch.setattr(launch, "_on_cpu", lambda config, cores: on_cpu(config, cores) | unbound)
    model = make_chat_model(tmp_path / "model")
    policy = build(model, lora=LoraConfig(rank=6, alpha=12.0), micro_batch_tokens=2048)
    asked = [request(chat, seed=1), request(chat, "Tell me about rivers. " * 40, seed=2)]
    split = replace(CONFIG, tensor_parallel_size=2)
    with RolloutServer(split, model, log_file=tmp_path / "server.log", adapters=ROOM) as server:
        engine = SupervisedServer(server, like=model)
        fleet = Fleet([engine], min_share=1.0, note=print)
        fleet.wait_ready()
        before = sample(engine.client, *asked)
        for version, change in ((1, {"seed": 5}), (2, {"by": -1.0})):
            move(policy, **change)
            fleet.refit(export_version(policy, tmp_path / "exports", version, kind=ADAPTER), version, like=model)
            answers = sample(engine.client, *asked)
            assert off(policy, asked, answers) < 1e-4 and off(policy, asked, before) > 0.05
            before = answers
        assert engine.health.restarts == 0


def test_vllm_serves_a_runs_last_adapter_as_it_is(
    policy: MegatronPolicy, chat: ChatFormat, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``vllm serve MODEL --enable-lora --lora-modules trained=runs/NAME/adapter``."""
    move(policy, seed=8)
    folder = export_adapter_to(policy, tmp_path / "adapter", version=5)
    words = ["--enable-lora", "--max-lora-rank=8", "--lora-modules", f"trained={folder}"]
    monkeypatch.setattr(AdapterRoom, "arguments", lambda _: words)
    with RolloutServer(CONFIG, model_dir, log_file=tmp_path / "server.log", adapters=ROOM) as server:
        client = RolloutClient(
            server.endpoint, weight_version=0, request_timeout_s=60, connect_retries=0, admin_timeout_s=60
        )
        asked = [request(chat, seed=seed) for seed in (1, 2)]
        base = sample(client, *asked)
        client.model = "trained"
        difference = off(policy, asked, sample(client, *asked))
        print(f"{difference:.2g} nats from the trainer's")
        assert difference < 2e-3 and off(policy, asked, base) > 0.05


def test_ranks_are_vllms() -> None:
    from vllm.config.lora import MaxLoRARanks

    assert typing.get_args(MaxLoRARanks) == RANKS
