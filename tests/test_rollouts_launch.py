"""Command line and environment of the server process on the CPU and on GPUs, and the settings they come from."""

import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from pact_nemo.errors import ConfigError
from pact_nemo.runtime import machine
from pact_nemo.runtime.ranks import LAUNCHER_ENV, LOGS_ENV
from pact_nemo.serving import launch
from pact_nemo.serving.adapters import RUNTIME_ENV, UNNAMED_ENV, AdapterRoom
from pact_nemo.serving.config import RolloutServerConfig
from pact_nemo.serving.endpoint import ServerEndpoint

ENDPOINT = ServerEndpoint("http://127.0.0.1:5000", "the-key")
CPU = RolloutServerConfig(device="cpu")
GPU = RolloutServerConfig(device="cuda", tensor_parallel_size=4, gpu_memory_utilization=0.7)


@pytest.fixture
def with_cuda(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def arguments(config):
    return launch.engine_arguments(config, Path("/models/m"), ENDPOINT, 5000)


def test_room_for_adapters_is_asked_for_where_refits_bring_them(monkeypatch):
    monkeypatch.setenv(UNNAMED_ENV, "1")
    room = AdapterRoom(12, ("q_proj", "k_proj"))
    words = launch.engine_arguments(replace(CPU, extra_args=["--x"]), Path("/models/m"), ENDPOINT, 5000, room)
    end = ["--enable-lora", "--max-loras=1", "--max-lora-rank=16", "--lora-target-modules", "q_proj", "k_proj", "--x"]
    assert words[-len(end) :] == end and not any("lora" in word for word in arguments(CPU))
    environment = launch.engine_environment(CPU, ENDPOINT, launch.ALONE, room)
    # a request for an adapter that isn't there is refused, whatever the user's environment says
    assert (environment[RUNTIME_ENV], environment[UNNAMED_ENV]) == ("1", "0")
    assert RUNTIME_ENV not in launch.engine_environment(CPU, ENDPOINT)


def test_a_server_that_lacks_room_for_adapters_is_told_what_to_start_it_with():
    room = AdapterRoom(12, ("q_proj",))
    assert room.lacks(16, None, True) == room.lacks(64, ["o_proj", "q_proj"], True) == []
    assert room.lacks(0, None, False) == ["--enable-lora", "--max-lora-rank=16", f"{RUNTIME_ENV}=1"]
    assert room.lacks(8, ["o_proj"], True) == ["--max-lora-rank=16", "--lora-target-modules q_proj"]
    with pytest.raises(ConfigError, match=r"policy\.lora\.rank=513: .* up to rank 512.*rollout\.lora_refit=merged"):
        AdapterRoom(513, ())


def test_cpu(monkeypatch):
    words = arguments(CPU)
    # prompts prefilled in chunks kill vLLM's CPU engine when requests are seeded
    assert {
        "--enforce-eager",
        "--no-enable-chunked-prefill",
        "--enable-prefix-caching",
        "--logprobs-mode=processed_logprobs",
    } <= set(words)
    assert "--max-num-batched-tokens=4096" in words and "--max-num-batched-tokens=9000" in arguments(
        replace(CPU, max_model_len=9000)
    )
    assert not any("gpu-memory" in word for word in words)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("RANK", "1")
    environment = launch.engine_environment(replace(CPU, cpu_threads=1, cpu_kv_cache_gib=3), ENDPOINT)
    assert (
        environment["VLLM_CPU_KVCACHE_SPACE"] == "3"
        and environment["OMP_NUM_THREADS"] == "1"
        and "RANK" not in environment
    )
    assert environment["VLLM_API_KEY"] == "the-key" and environment["HF_HUB_OFFLINE"] == "1"
    assert environment[launch.PARENT_ENV] == str(os.getpid())


def test_the_engine_is_forked_with_intels_openmp_only(monkeypatch, tmp_path):
    found = launch.intel_openmp()
    assert found is not None and found.name == "libiomp5.so"  # requirements.txt pins its package
    monkeypatch.setenv("LD_PRELOAD", f"/somewhere/other.so /old/{found.name}")
    environment = launch.engine_environment(CPU, ENDPOINT)
    assert environment["LD_PRELOAD"] == f"{found} /somewhere/other.so" and environment[launch.FORK_ENGINE_ENV] == "1"
    # an environment without the package: GNU's OpenMP hangs after a fork
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    environment = launch.engine_environment(CPU, ENDPOINT)
    assert environment["LD_PRELOAD"].startswith("/somewhere") and launch.FORK_ENGINE_ENV not in environment


def test_gpu(with_cuda):
    words = arguments(GPU)
    assert {"--tensor-parallel-size=4", "--gpu-memory-utilization=0.7"} <= set(words)
    assert not {"--enforce-eager", "--no-enable-chunked-prefill"} & set(words) and not any(
        "batched-tokens" in word for word in words
    )
    assert "--enforce-eager" in arguments(replace(GPU, enforce_eager=True))
    names = launch.engine_environment(GPU, ENDPOINT)
    assert not any(name.startswith(("VLLM_CPU", "OMP_", "KMP_", launch.FORK_ENGINE_ENV)) for name in names)


def test_on_a_gpu_the_sampler_is_the_one_that_knows_seeds_and_logprobs(with_cuda, monkeypatch):
    assert launch.engine_environment(GPU, ENDPOINT)["VLLM_USE_FLASHINFER_SAMPLER"] == "0"
    monkeypatch.setenv("VLLM_USE_FLASHINFER_SAMPLER", "1")
    assert launch.engine_environment(GPU, ENDPOINT)["VLLM_USE_FLASHINFER_SAMPLER"] == "1"


def test_the_key_is_never_an_argument():
    assert not any("the-key" in word for word in arguments(CPU))


def test_extra_arguments_come_last_and_win():
    assert arguments(replace(CPU, extra_args=["--max-num-seqs=2"]))[-1] == "--max-num-seqs=2"


def test_statistics_are_off_unless_asked_for():
    assert "--disable-log-stats" in arguments(CPU)
    assert "--disable-log-stats" not in arguments(replace(CPU, log_stats=True))


def test_cuda_without_a_gpu_is_refused(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no GPU"):
        arguments(GPU)


@pytest.mark.parametrize(
    "change",
    [
        {"device": "tpu"},
        {"max_model_len": 0},
        {"cpu_block_size": 40},
        {"gpu_memory_utilization": 1.5},
        {"request_timeout_s": 0.0},
        {"cpu_threads": 0},
        {"connect_retries": -1},
        {"dtype": "fp8"},
    ],
)
def test_settings_that_cannot_be_meant(change):
    [name] = change
    with pytest.raises(ConfigError, match=name):
        replace(CPU, **change).validate()
    CPU.validate()


def test_settings_are_an_omegaconf_schema():
    @dataclass
    class Outer:
        server: RolloutServerConfig = field(default_factory=RolloutServerConfig)

    merged = OmegaConf.merge(
        OmegaConf.structured(Outer), OmegaConf.from_dotlist(["server.max_num_seqs=4", "server.extra_args=[--x]"])
    )
    server = OmegaConf.to_object(merged).server
    assert (server.max_num_seqs, server.extra_args, server.url) == (4, ["--x"], None)


def test_the_package_imports_neither_vllm_nor_torch_nor_traces():
    """What the trainer pays for, and the wall: generation can't reach a trace."""
    names = [*(f"rollouts.{name}" for name in ("batch", "chat_episode", "episode", "overlap", "store", "types"))]
    names += [f"serving.{name}" for name in ("client", "config", "launch", "refit", "server", "supervisor")]
    code = "import sys\n" + "".join(f"import pact_nemo.{name}\n" for name in names)
    code += "wall = ('vllm', 'torch', 'pact_nemo.traces', 'pact_nemo.training')\n"
    code += "bad = [m for m in sys.modules if m.startswith(wall)]\n"
    code += "sys.exit(repr(bad) if bad else 0)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert result.returncode == 0, result.stderr


def test_a_server_inherits_nothing_of_the_ranks_around_it(monkeypatch, with_cuda):
    """The trainer's allocator and queues are its own; vLLM's ranks must not look for the trainer's meeting point."""
    for name in (*machine.ALLOCATOR_ENV, machine.CONNECTIONS_ENV):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    machine.prepare_cuda(one_connection=True)
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    for name in ("TORCHELASTIC_USE_AGENT_STORE", LAUNCHER_ENV, LOGS_ENV):
        monkeypatch.setenv(name, "True")
    environment = launch.engine_environment(GPU, ENDPOINT)
    assert not {
        "PYTORCH_CUDA_ALLOC_CONF",
        "CUDA_DEVICE_MAX_CONNECTIONS",
        "TORCHELASTIC_USE_AGENT_STORE",
        LAUNCHER_ENV,
        LOGS_ENV,
    } & set(environment)


def test_what_a_user_says_of_cuda_stands(monkeypatch):
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "")
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:512")
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")
    machine.prepare_cuda(one_connection=True)
    assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ and os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "8"
