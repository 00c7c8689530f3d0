"""The real server with the real small model: exact log-probs, its key, refit and stale weights. (How it starts and
ends: test_rollouts_server_life.py.)
"""

import contextlib
import os
import shutil
import signal
import time
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from pact_nemo.checkpoints.manifest import MANIFEST_NAME, new_export
from pact_nemo.errors import CheckpointError, ConfigError, ServerError
from pact_nemo.serving.api_key import OPEN_PATHS
from pact_nemo.serving.client import GenerationRequest, StaleWeights
from pact_nemo.serving.config import RolloutServerConfig
from pact_nemo.serving.endpoint import ServerEndpoint
from pact_nemo.serving.refit import refit
from pact_nemo.serving.server import RolloutServer, group_members
from tests.faults.sockets import foreign, listening
from tests.workers.server_kit import client_of, play, reference_logprobs, request, sample

pytest.importorskip("vllm")
# float32 so that log-probs can be compared exactly, not to bfloat16's two digits
CONFIG = RolloutServerConfig(
    device="cpu", dtype="float32", max_model_len=1024, max_num_seqs=16, max_num_batched_tokens=1024
)


@pytest.fixture(scope="module")
def server(model_dir, tmp_path_factory):
    with RolloutServer(CONFIG, model_dir, log_file=tmp_path_factory.mktemp("server") / "server.log") as running:
        group = running.pid
        assert len(group_members(group)) >= 2
        yield running
    assert group_members(group) == []  # a normal end leaves no process of the group


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.9)])
def test_logprobs_are_those_of_the_sampling_distribution(server, chat, model_dir, temperature, top_p):
    wanted = request(chat, temperature=temperature, top_p=top_p)
    [completion] = sample(client_of(server), wanted)
    expected = reference_logprobs(model_dir, wanted.prompt_ids, completion.token_ids, temperature, top_p)
    torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=2e-3, rtol=0)
    assert expected.exp().max() < 1 or top_p < 1


def test_greedy_ids_are_transformers_ids_and_end_with_the_stop_token(server, chat, model_dir):
    wanted = request(chat, "What is the capital of France?", temperature=0.0)
    [completion] = sample(client_of(server), wanted)
    assert completion.finish_reason == "stop" and completion.token_ids[-1] == chat.eos_ids[0]
    assert chat.decode(completion.token_ids) == "The capital of France is Paris."
    expected = reference_logprobs(model_dir, wanted.prompt_ids, completion.token_ids)
    torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=2e-3, rtol=0)


def test_a_seed_decides_what_is_drawn(server, chat):
    first, again, other = (sample(client_of(server), request(chat, seed=seed))[0] for seed in (1, 1, 2))
    assert first.token_ids == again.token_ids != other.token_ids


def test_many_long_seeded_prompts_at_once(server, chat):
    """More prompt tokens than one engine step takes: a prompt prefilled in chunks with a seeded generator kills vLLM's
    CPU engine.
    """
    requests = [request(chat, f"{i}: " + "Tell me about rivers. " * 110, max_tokens=2, seed=i) for i in range(4)]
    assert (
        sum(len(r.prompt_ids) for r in requests) > 2 * CONFIG.max_num_batched_tokens > len(requests[0].prompt_ids) * 2
    )
    assert [len(completion.token_ids) for completion in sample(client_of(server), *requests)] == [2] * 4


def test_every_path_but_health_asks_for_the_key(server):
    url, http = server.endpoint.url, httpx.Client(timeout=60)
    for path in (
        "/v1/models",
        "/inference/v1/generate",
        "/collective_rpc",
        "/pause",
        "/weight_info",
        "/metrics",
        "//collective_rpc",
    ):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": server.endpoint.api_key}):
            assert http.get(url + path, headers=headers).status_code == 401
            assert http.post(url + path, headers=headers, json={}).status_code == 401
    assert http.get(url + "/health").status_code == 200
    assert http.get(url + "/v1/models", headers=server.endpoint.headers).json()["data"][0]["id"] == "policy"
    with pytest.raises(ServerError, match="401"):
        sample(client_of(server, endpoint=ServerEndpoint(url, "wrong")), REQUEST)
    described = http.get(url + "/openapi.json", headers=server.endpoint.headers).json()["paths"]
    routes = [
        (method, path.replace("{", "").replace("}", "")) for path, methods in described.items() for method in methods
    ]
    assert (
        len(routes) > 20
        and {"/collective_rpc", "/pause", "/reset_prefix_cache", "/inference/v1/generate"} <= described.keys()
    )
    asked = [(method, path) for method, path in routes if path not in OPEN_PATHS]
    asked += [
        (method, path)
        for path in ("/docs", "/openapi.json", "/metrics", "/server_info", "/sleep", "/health/")
        for method in ("GET", "POST")
    ]
    asked += [
        (method, path)
        for _, path in routes[:5]
        for method in ("HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE")
        if path not in OPEN_PATHS
    ]
    answers = {(method, path): http.request(method, url + path).status_code for method, path in asked}
    assert {key: status for key, status in answers.items() if status != 401} == {}
    print(f"{len(answers)} requests without the key on {len(routes)} routes: all 401")
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            assert server.endpoint.api_key.encode() not in (process / "cmdline").read_bytes()
    assert server.endpoint.api_key not in server.log_file.read_text()
    members = group_members(server.pid)
    assert (
        listening(members) and foreign(members) == {}
    )  # everything of it, the engine's own sockets included, is on the loopback


REQUEST = GenerationRequest((1, 2, 3), 2, 1.0, 1.0, (2,), 1)


def test_episodes_are_token_in_token_out_and_repeatable(server, chat, model_dir):
    sent = []
    rollouts = play(server, chat, client_of(server, on_request=sent.append))
    assert {r.status for r in rollouts} <= {"ok", "truncated"} and any(len(r.turns) == 2 for r in rollouts)
    assert len({tuple(r.token_ids) for r in rollouts}) == 4
    expected = sorted(r.prompt_ids + r.token_ids[: turn.start] for r in rollouts for turn in r.turns)
    assert (
        sorted(body["token_ids"] for body in sent) == expected
    )  # the server saw the prompt and what it sampled itself, nothing else
    longest = max(rollouts, key=lambda r: len(r.turns))
    reference = reference_logprobs(model_dir, longest.prompt_ids, longest.token_ids)
    mask = torch.tensor(longest.loss_mask, dtype=torch.bool)
    torch.testing.assert_close(torch.tensor(longest.sampler_logprobs)[mask], reference[mask], atol=2e-3, rtol=0)
    again = play(server, chat, client_of(server), concurrency=1)
    assert [r.token_ids for r in again] == [r.token_ids for r in rollouts]


@pytest.fixture(scope="module")
def exports(model_dir, tmp_path_factory):
    """v1: the model with every matrix disturbed. Small ones that are no model: v2 has a flipped bit, v3 lost its
    weights, v4 is whole.
    """
    root = tmp_path_factory.mktemp("exports")
    state = load_file(model_dir / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    moved = {
        name: t + 0.02 * t.std() * torch.randn(t.shape, generator=generator) if t.dim() == 2 else t
        for name, t in state.items()
    }
    for version in range(1, 5):
        with new_export(root, version) as folder:
            for path in model_dir.iterdir():
                if path.name not in (MANIFEST_NAME, "model.safetensors"):
                    shutil.copy(path, folder / path.name)
            tensors = moved if version == 1 else {"model.norm.weight": moved["model.norm.weight"]}
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    weights = root / "v000002" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    (root / "v000003" / "model.safetensors").unlink()
    yield root
    shutil.rmtree(root)


def test_torn_exports_are_refused_before_the_server_hears_of_them(server, chat, exports, model_dir):
    client = client_of(server)
    before = sample(client, request(chat, temperature=0.0))
    log_size = server.log_file.stat().st_size
    for version, reason in ((2, "corrupt"), (3, "missing"), (4, "lacks 271 tensors"), (9, "not a folder")):
        with pytest.raises(CheckpointError, match=reason):
            refit(client, exports / f"v{version:06d}", version, like=model_dir)
    with pytest.raises(CheckpointError, match="says version 1, expected 5"):
        refit(client, exports / "v000001", 5)
    assert client.weight_version == 0 and server.admin().weight_version() == "0"
    assert "Reloading" not in server.log_file.read_text()[log_size:]
    assert sample(client, request(chat, temperature=0.0)) == before


def test_refit_equals_a_fresh_server_and_old_weights_are_noticed(server, chat, exports, model_dir, tmp_path):
    """Then the fresh server's front end is killed: requests fail, rollouts are marked, and the rest of its group goes
    by itself.
    """
    client, late = client_of(server), client_of(server)
    wanted = [
        request(chat, temperature=0.0),
        request(chat, "Count to five."),
        request(chat, "Tell me about rivers. " * 40),
    ]
    old = sample(client, *wanted)  # also fills the prefix cache with the old weights' keys and values
    report = refit(client, exports / "v000001", 1, like=model_dir)
    assert client.weight_version == 1 and server.admin().weight_version() == "1"
    seconds = report.verify_s + report.pause_s + report.reload_s + report.finish_s
    assert seconds < 30 and report.bytes > 500_000_000
    new = sample(client, *wanted)
    assert all(a.logprobs != b.logprobs for a, b in zip(old, new, strict=True))

    with pytest.raises(StaleWeights, match="version 1, expected 0"):
        sample(late, wanted[0])
    stale = play(server, chat, late)
    assert all(r.status == "failed" and r.error.startswith("StaleWeights") and r.outcome is None for r in stale)

    with RolloutServer(CONFIG, exports / "v000001", log_file=tmp_path / "fresh.log", version=1) as fresh:
        other = client_of(fresh, weight_version=1)
        for ours, theirs in zip(new, sample(other, *wanted), strict=True):
            assert ours.token_ids == theirs.token_ids
            torch.testing.assert_close(torch.tensor(ours.logprobs), torch.tensor(theirs.logprobs), atol=1e-4, rtol=0)

        group = fresh.pid
        killed = []

        def kill_at_second_request(body):
            killed.append(body)
            if len(killed) == 2:
                os.kill(group, signal.SIGKILL)

        rollouts = play(fresh, chat, client_of(fresh, weight_version=1, on_request=kill_at_second_request))
        assert len(rollouts) == 4 and all(r.status == "failed" and "ServerError" in r.error for r in rollouts)
        deadline = time.monotonic() + 60
        while group_members(group) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert group_members(group) == []  # the engine noticed by itself
        with pytest.raises(ServerError, match="died"):
            fresh.check_alive()
        with pytest.raises(ServerError, match="can't be reached"):
            fresh.admin().weight_version()


def test_a_failed_reload_leaves_no_valid_version(server, chat, exports, model_dir, monkeypatch):
    client = client_of(server, weight_version=1)

    def broken(*args, **kwargs):
        raise ServerError("reload failed half way")

    monkeypatch.setattr(client.admin, "load_weights", broken)
    with pytest.raises(ServerError, match="half way"):
        refit(client, exports / "v000001", 1)
    assert server.admin().weight_version() == "loading-1"
    server.admin().resume()
    with pytest.raises(StaleWeights, match="loading-1"):
        sample(client, request(chat))
    monkeypatch.undo()
    refit(client, exports / "v000001", 1)
    sample(client, request(chat))


def test_attaching_uses_the_key_of_the_environment_and_leaves_the_server_running(
    server, model_dir, tmp_path, monkeypatch
):
    config = RolloutServerConfig(url=server.endpoint.url + "/", request_timeout_s=60)
    monkeypatch.delenv(config.api_key_env, raising=False)
    with pytest.raises(ConfigError, match=config.api_key_env):
        RolloutServer(config, model_dir, log_file=tmp_path / "log").launch()
    monkeypatch.setenv(config.api_key_env, server.endpoint.api_key)
    with RolloutServer(config, model_dir, log_file=tmp_path / "log", version=4) as attached:
        assert attached.pid is None and attached.admin().weight_version() == "4"
    assert server.admin().healthy()
    server.check_alive()
