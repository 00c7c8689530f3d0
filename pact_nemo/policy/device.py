"""Which device this rank runs on, what it can do, and how its memory is kept."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
from pathlib import Path

import torch

from pact_nemo.policy.config import transformer_engine_installed

CPU = torch.device("cpu")
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # mallopt(3)


def use_cuda() -> bool:
    """Whether the policy runs on CUDA devices."""
    return torch.cuda.is_available()


def local_device() -> torch.device:
    """This rank's device: ``cuda:LOCAL_RANK`` or ``cpu``."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if use_cuda() else CPU


def compute_capability() -> tuple[int, int] | None:
    """Of this rank's GPU; None without one."""
    return torch.cuda.get_device_capability(local_device()) if use_cuda() else None


def gpu_memory() -> int | None:
    """Bytes of this rank's GPU; None without one."""
    return torch.cuda.get_device_properties(local_device()).total_memory if use_cuda() else None


def has_transformer_engine() -> bool:
    """Whether Transformer Engine can be used: a GPU and the package."""
    return use_cuda() and transformer_engine_installed()


def compute_deterministically() -> None:
    """Kernels that add in a fixed order, for the rest of this process: torch's, cuBLAS's and Transformer Engine's. One
    that has none raises RuntimeError where it is called. Before the first product on a GPU.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
    torch.use_deterministic_algorithms(True)


def near_cpus(address: str, devices: Path = Path("/sys/bus/pci/devices")) -> set[int]:
    """CPUs of the memory that a PCI device is attached to; empty where the kernel doesn't say."""
    try:
        ranges = (devices / address / "local_cpulist").read_text().strip().split(",")
        pairs = [part.partition("-") for part in ranges if part]
        return {cpu for first, _, last in pairs for cpu in range(int(first), int(last or first) + 1)}
    except (OSError, ValueError):
        return set()


def stay_near_gpu() -> None:
    """Keep this rank, and what it starts from now on, on the CPUs beside its GPU, as far as it may use them.

    The first rank of a node is left alone: it may run environments and start the rollout server, which other GPUs and
    all of the node's cores belong to.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        return
    found = torch.cuda.get_device_properties(local_device())
    address = f"{found.pci_domain_id:04x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"
    near = near_cpus(address) & os.sched_getaffinity(0)
    if near:
        os.sched_setaffinity(0, near)


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for the next allocation, instead of giving large blocks back to the kernel each
    time.

    Tensors of a layer are allocated and freed thousands of times a step, and memory that a process touches for the
    first time costs a CPU several times what writing to it costs. The process's resident memory stays at its peak.
    Without glibc nothing happens.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)  # never


def forget_pages(address: int, size: int) -> None:
    """Have the kernel take back the whole pages of a CPU tensor's memory: its values are lost, its address stays.
    Without glibc on Linux nothing happens.
    """
    if platform.libc_ver()[0] == "glibc":
        page = mmap.PAGESIZE
        start, end = -(-address // page) * page, (address + size) // page * page
        if end > start:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def give_back_freed_memory() -> None:
    """Have glibc give all that is free to the kernel now, also after :func:`keep_freed_memory`; without glibc nothing
    happens.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
