"""Which device this rank runs on, what it can do, and how its memory is kept."""

from __future__ import annotations

import ctypes
import os
import platform

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
