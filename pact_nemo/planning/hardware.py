"""What machines can do: data-sheet numbers, and the fractions of them that software reaches, each with its source.

Units: bytes, bytes per second, floating-point operations per second (dense), seconds; per GPU unless said otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
        reached_bf16: fraction of the peak that a decoder's products reach, elementwise work around them included.
        reached_fp8: fraction of the peak that its products alone reach in FP8.
        reached_experts: of that, what a mixture of experts reaches: small products, routing, uneven loads, exchange in
            bursts.
        reached_attention: fraction of the bf16 peak that attention reaches by torch's flash kernels over token trees.
        reached_te_attention: by Transformer Engine's attention over plain sequences.
        reached_serving: fraction of the bf16 peak that a rollout server's products reach.
        fp8_bytes: moved around a product in FP8 for each number that enters or leaves it.
        memory_reached: fraction of the memory bandwidth that decoding, elementwise work and the optimizer reach.
        launch: seconds of the host for one kernel.
        update_overhead: seconds of one update, whatever its size: sums over the ranks, the schedule, new shapes.
        host_bandwidth: between one GPU and page-locked memory, one direction.
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
    reached_bf16: float = 0.5
    reached_fp8: float = 0.5
    reached_experts: float = 1.0
    reached_attention: float = 0.5
    reached_te_attention: float = 0.5
    reached_serving: float = 0.5
    fp8_bytes: float = 0.0
    memory_reached: float = 0.5
    decode_overhead: float = 0.02
    launch: float = 0.0
    update_overhead: float = 0.0
    host_bandwidth: float = 50e9
    cuda: bool = True


# Peaks: NVIDIA's data sheets of A100 80GB SXM, H100 SXM, H200 SXM and HGX B200 (dense rates: half of the sparse ones).
# Node bandwidth: NVLink 3, 4, 4 and 5, half of the bidirectional figure. Network: a NIC a GPU, 200 Gb/s (DGX A100) or
# 400 Gb/s (the others). Disk: 10 GB/s a node to a parallel file system, assumed; `--disk` says otherwise.
# Host: PCIe 4 and 5; 54 GB/s were measured on an H200.
#
# Fitted by least squares of the errors' logarithms (``tests/workers/figures_kit.py`` names the figures of each, and a
# test shows that no constant can be moved for a smaller sum): ``reached_bf16`` to NeMo-RL's dense models on 8 and 64
# H100 and to two updates that were measured on an H200, ``reached_experts`` to NeMo-RL's 30B-A3B, ``fp8_bytes`` to what
# FP8 saved of an H200's updates of a 1.7B model (``docs/evidence/gpu/fp8.json``: 6 and 8 % of their time),
# ``decode_overhead`` to NeMo-RL's 8B generation, ``launch`` to update and scoring of a 135M model on the H200.
# Measured on an H200: ``reached_attention`` (flash kernels forward 236 and backward 267 TFLOP/s of a PACT tree).
# Assumed: ``update_overhead``, ``reached_te_attention``, ``reached_fp8`` (bf16 products alone reached 0.79 of their
# peak on the H200), ``memory_reached``, ``reached_serving`` (what training reached overall).
_REACHED: dict[str, Any] = dict(
    reached_bf16=0.41,
    reached_fp8=0.75,
    reached_experts=0.135,
    reached_attention=0.25,
    reached_te_attention=0.5,
    reached_serving=0.41,
    fp8_bytes=14.6,
    memory_reached=0.70,
    decode_overhead=0.006,
    launch=16.6e-6,
    update_overhead=0.2,
)
GPUS: dict[str, Hardware] = {
    gpu.name: gpu
    for gpu in (
        Hardware("A100", 80 * GB, 312e12, 0.0, 2.039e12, 300e9, 25e9, 10e9, host_bandwidth=25e9, **_REACHED),
        Hardware("H100", 80 * GB, 989.4e12, 1978.9e12, 3.35e12, 450e9, 50e9, 10e9, **_REACHED),
        Hardware("H200", 141 * GB, 989.4e12, 1978.9e12, 4.8e12, 450e9, 50e9, 10e9, **_REACHED),
        Hardware("B200", 180 * GB, 2.25e15, 4.5e15, 7.7e12, 900e9, 50e9, 10e9, **_REACHED),
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
        """Of the best of many short runs: other processes only ever slow it down. The first one is not timed: threads
        and kernels are made in it, which may take longer than all others.
        """
        run()
        best, runs, end = float("inf"), 0, time.perf_counter() + seconds
        while time.perf_counter() < end or runs < 5:
            start = time.perf_counter()
            run()
            best, runs = min(best, time.perf_counter() - start), runs + 1
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
        cuda=False,
    )
