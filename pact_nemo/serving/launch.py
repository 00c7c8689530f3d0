"""Command line and environment of the vLLM process, for a CPU and for GPUs."""

from __future__ import annotations

import os
import re
from importlib import metadata
from pathlib import Path

from pact_nemo.errors import ConfigError
from pact_nemo.runtime import machine
from pact_nemo.serving.adapters import RUNTIME_ENV, UNNAMED_ENV, AdapterRoom
from pact_nemo.serving.config import RolloutServerConfig, share_beside
from pact_nemo.serving.endpoint import ServerEndpoint
from pact_nemo.serving.placement import EnginePlace
from pact_nemo.serving.serve_process import FORK_ENGINE_ENV, PARENT_ENV

ALONE = EnginePlace()
GUARD = "pact_nemo.serving.api_key.RequireApiKey"
WORKER_EXTENSION = "pact_nemo.serving.worker.RefitExtension"
PORT_ENV = "VLLM_PORT"  #: from where vLLM looks for ports of its own
#: What a trainer's environment may say about its own ranks and threads; none of it is meant for the server.
_TRAINER_ONLY = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "ROLE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    PORT_ENV,  # one number for all engines; each is given its own (serving/ports.py)
    "VLLM_DP_MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_USE_AGENT_STORE",  # vLLM's own ranks would wait for a meeting point that nobody opens
    *machine.ALLOCATOR_ENV,
    machine.CONNECTIONS_ENV,
    "PACT_LAUNCHER",
    "PACT_RANK_LOGS",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "GOMP_CPU_AFFINITY",
    "KMP_AFFINITY",
    "PYTHONDONTWRITEBYTECODE",
)


#: Variables that hold somebody's key: a server that loads a local folder needs none but its own.
SECRET = re.compile(r"(?:.*_)?(?:API_?KEY|TOKEN|SECRET|PASSWORD|ACCESS_KEY)(?:_ID)?", re.IGNORECASE)


def on_cuda(config: RolloutServerConfig) -> bool:
    """Whether the server runs on GPUs. Raises ConfigError when CUDA is asked for and absent."""
    if config.device == "cpu":
        return False
    import torch

    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ConfigError("rollout.server.device is cuda, but torch sees no GPU; use device=cpu or fix the driver")
    return available


def single_process(config: RolloutServerConfig) -> bool:
    """CPU server whose worker lives in the engine process."""
    return config.cpu_single_process and config.tensor_parallel_size == 1 and not on_cuda(config)


def engine_arguments(
    config: RolloutServerConfig,
    model_path: Path,
    endpoint: ServerEndpoint,
    port: int,
    adapters: AdapterRoom | None = None,
) -> list[str]:
    """vLLM's command line. The API key is not on it: any process of the machine can read that."""
    cuda = on_cuda(config)
    arguments = [
        f"--model={model_path}",
        f"--served-model-name={endpoint.model}",
        f"--host={config.host}",
        f"--port={port}",
        f"--middleware={GUARD}",
        f"--worker-extension-cls={WORKER_EXTENSION}",
        f"--dtype={config.dtype}",
        f"--max-model-len={config.max_model_len}",
        f"--max-num-seqs={config.max_num_seqs}",
        f"--seed={config.seed}",
        f"--tensor-parallel-size={config.tensor_parallel_size}",
        "--enable-prefix-caching" if config.prefix_caching else "--no-enable-prefix-caching",
        "--enable-scale-out",  # /inference/v1/generate: token ids in, token ids out, stamped with the weight version
        "--logprobs-mode=processed_logprobs",  # of the distribution that was sampled from: after temperature and top-p
        # a model's generation_config.json must not change the sampling distribution behind our back
        "--generation-config=vllm",
        "--disable-uvicorn-access-log",
        "--load-format=safetensors",  # never a pickled *.bin
    ]
    if not config.log_stats:
        arguments.append("--disable-log-stats")
    if config.enforce_eager or (config.enforce_eager is None and not cuda):
        arguments.append("--enforce-eager")
    batched = config.max_num_batched_tokens
    if cuda:
        arguments.append(f"--gpu-memory-utilization={share_beside(config):g}")
        if config.time_sharing:
            arguments.append("--enable-sleep-mode")
    else:
        # A prompt that is prefilled in chunks rewinds its request's random generator, which a CPU generator can't:
        # vLLM's engine would die.
        arguments += ["--no-enable-chunked-prefill", f"--block-size={config.cpu_block_size}"]
        batched = max(batched if batched is not None else 4096, config.max_model_len)
    if batched is not None:
        arguments.append(f"--max-num-batched-tokens={batched}")
    if adapters is not None:
        arguments += adapters.arguments()
    return arguments + list(config.extra_args)


def intel_openmp() -> Path | None:
    """Intel's OpenMP library, wherever its package is installed: in an environment, for one user, or in a folder of
    ``PYTHONPATH``.
    """
    try:
        files = metadata.files("intel-openmp") or []
    except metadata.PackageNotFoundError:
        return None
    found = (Path(str(file.locate())).resolve() for file in files if file.name == "libiomp5.so")
    return next((path for path in found if path.is_file()), None)


def engine_environment(
    config: RolloutServerConfig,
    endpoint: ServerEndpoint,
    place: EnginePlace = ALONE,
    adapters: AdapterRoom | None = None,
) -> dict[str, str]:
    """Environment of the server process: ours, without the trainer's rank and thread settings, plus vLLM's.

    Raises:
        ConfigError: no folder can be written for its caches.
    """
    machine.prepare()
    environment = {
        name: value for name, value in os.environ.items() if name not in _TRAINER_ONLY and not SECRET.fullmatch(name)
    }
    environment |= {
        PARENT_ENV: str(os.getpid()),
        "VLLM_API_KEY": endpoint.api_key,
        "VLLM_SERVER_DEV_MODE": "1",  # weight swap endpoints; the guard asks for the key on each of them
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_PLUGINS": "",
        UNNAMED_ENV: "0",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if adapters is not None:
        environment[RUNTIME_ENV] = "1"
    if on_cuda(config):
        # a sampler of its own random numbers, without log-probs after top-p: requests carry seeds and ask for them
        environment.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
        if place.devices:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(place.devices)
        return environment
    return environment | _on_cpu(config, place.cores(sorted(os.sched_getaffinity(0)))[: config.cpu_threads])


def _on_cpu(config: RolloutServerConfig, cores: list[int]) -> dict[str, str]:
    """What an engine's environment has on a CPU alone."""
    environment = {
        "CUDA_VISIBLE_DEVICES": "",
        "VLLM_CPU_KVCACHE_SPACE": str(config.cpu_kv_cache_gib),
        # Threads sleep soon after a parallel region: the trainer needs the cores whenever no rollout runs.
        "OMP_WAIT_POLICY": "PASSIVE",
        # A reload allocates and frees each layer's weights: glibc keeps that memory instead of returning it to the
        # kernel, which would hand out zeroed pages anew. 32 MiB is the largest threshold that glibc accepts.
        "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
        "MALLOC_TOP_PAD_": str(64 << 20),
        "KMP_BLOCKTIME": "1",
    }
    if single_process(config):
        environment |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(len(cores)),
        }
        if (
            library := intel_openmp()
        ) is not None:  # it survives a fork and obeys KMP_BLOCKTIME; GNU's hangs in the forked engine
            others = os.environ.get("LD_PRELOAD", "").split()
            environment["LD_PRELOAD"] = " ".join(
                [str(library), *(other for other in others if Path(other).name != library.name)]
            )
            environment[FORK_ENGINE_ENV] = "1"
    else:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
    return environment
