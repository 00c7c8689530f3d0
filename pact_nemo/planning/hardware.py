"""What machines can do: data-sheet numbers, and the fractions of them that software reaches, each with its source.

Units: bytes, bytes per second, floating-point operations per second (dense), seconds; per GPU unless said otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from pact_nemo.errors import ConfigError

GB = 10**9


@dataclass(frozen=True)
class Hardware:
    """A kind of GPU in its usual node of eight, or this machine's CPU.

    Attributes:
        memory: of one GPU (or of the machine).
        bf16, fp8: peak dense rates; fp8 is 0 where there is no such unit.
        memory_bandwidth: of HBM (or of RAM).
        node_bandwidth: of one GPU to the others of its node, one direction.
        network_bandwidth: of one GPU to other nodes, one direction.
        disk_bandwidth: of one node to the file system that exports and checkpoints go to, shared by its GPUs.
        reached: fraction of the peak that matrix products of a decoder reach, by format.
        reached_experts: of that, what a mixture of experts reaches: small products, routing, uneven loads, exchange in
            bursts.
        memory_reached: fraction of the memory bandwidth that decoding reaches.
        decode_overhead: seconds of a decoding step beyond reading weights and cache: kernel launches, scheduling,
            sampling.
    """

    name: str
    memory: float
    bf16: float
    fp8: float
    memory_bandwidth: float
    node_bandwidth: float
    network_bandwidth: float
    disk_bandwidth: float
    gpus_per_node: int = 8
    reached_bf16: float = 0.41
    reached_fp8: float = 0.445
    reached_experts: float = 0.14
    memory_reached: float = 0.70
    decode_overhead: float = 0.006
    cuda: bool = True


# Peaks: NVIDIA's data sheets of A100 80GB SXM, H100 SXM, H200 SXM and HGX B200 (dense rates: half of the sparse ones).
# Node bandwidth: NVLink 3, 4, 4 and 5, half of the bidirectional figure. Network: a NIC a GPU, 200 Gb/s (DGX A100) or
# 400 Gb/s (the others). Disk: 10 GB/s a node to a parallel file system, assumed; `--disk` says otherwise.
# Fractions: ``reached_bf16`` is fitted to NeMo-RL v0.3's Llama-3.1-8B on 8 H100 (28 s of policy training),
# ``reached_experts`` to its Qwen3-30B-A3B on 64 H100 (50 s), ``reached_fp8`` to Megatron-Bridge's
# Llama-3-70B pre-training on 64 H100 (719 TFLOP/s), ``decode_overhead`` to the 58 s of generation of the same 8B run;
# ``memory_reached`` is assumed. `tests/test_planning_timing.py` says what other public figures come out as.
GPUS: dict[str, Hardware] = {
    gpu.name: gpu
    for gpu in (
        Hardware("A100", 80 * GB, 312e12, 0.0, 2.039e12, 300e9, 25e9, 10e9),
        Hardware("H100", 80 * GB, 989.4e12, 1978.9e12, 3.35e12, 450e9, 50e9, 10e9),
        Hardware("H200", 141 * GB, 989.4e12, 1978.9e12, 4.8e12, 450e9, 50e9, 10e9),
        Hardware("B200", 180 * GB, 2.25e15, 4.5e15, 7.7e12, 900e9, 50e9, 10e9),
    )
}


def gpu(name: str) -> Hardware:
    """Raises ConfigError for one that isn't known."""
    if name.upper() not in GPUS:
        raise ConfigError(f"no GPU {name!r} in the planner; known: {', '.join(GPUS)}")
    return GPUS[name.upper()]


def this_cpu(seconds: float = 0.15) -> Hardware:
    """This machine, its matrix-product rate and memory bandwidth measured for about ``seconds`` each. The fractions
    stand for smaller matrices than the measured one, and for the elementary operations between them (an assumption)."""
    import psutil
    import torch

    a, b = torch.randn(768, 768), torch.randn(768, 768)

    def rate(work: float, run: Callable[[], object]) -> float:
        """Of the best of many short runs: other processes only ever slow it down."""
        best, end = float("inf"), time.perf_counter() + seconds
        while time.perf_counter() < end or best == float("inf"):
            start = time.perf_counter()
            run()
            best = min(best, time.perf_counter() - start)
        return work / best

    flops = rate(2 * 768**3, lambda: torch.mm(a, b))
    source, target = torch.empty(1 << 24), torch.empty(1 << 24)
    bandwidth = rate(2 * source.nbytes, lambda: target.copy_(source))
    return Hardware(
        "this CPU",
        float(psutil.virtual_memory().total),
        flops,
        0.0,
        bandwidth,
        bandwidth,
        bandwidth,
        0.5e9,
        gpus_per_node=1,
        reached_bf16=0.5,
        memory_reached=0.5,
        decode_overhead=0.02,
        cuda=False,
    )
