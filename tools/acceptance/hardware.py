"""The machine itself: products, copies, its disk, and what a second process on the GPU costs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

import torch

from tools.acceptance.kit import Settings
from tools.acceptance.models import synchronize, versions


def machine(settings: Settings) -> dict[str, Any]:
    """The GPU, its libraries, and what it reaches in one product and one copy."""
    found: dict[str, Any] = {"versions": versions(), "python": sys.version.split()[0]}
    if not torch.cuda.is_available():
        return found
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    block = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    pageable, pinned = (torch.empty(1 << 30, dtype=torch.uint8, pin_memory=pin) for pin in (False, True))
    properties = torch.cuda.get_device_properties(0)
    return found | {
        "gpu": properties.name,
        "memory_gib": properties.total_memory / 2**30,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "bf16_tflops": 2 * size**3 / _best(lambda: a @ b) / 1e12,
        "copy_tb_s": 2 * block.nbytes / _best(lambda: block.clone()) / 1e12,
        "host_to_device_gb_s": {
            name: host.nbytes / _best(lambda host=host: block.copy_(host), rounds=3) / 1e9  # type: ignore[misc]
            for name, host in (("pageable", pageable), ("pinned", pinned))
        },
        "device_to_host_gb_s": {
            name: host.nbytes / _best(lambda host=host: host.copy_(block), rounds=3) / 1e9  # type: ignore[misc]
            for name, host in (("pageable", pageable), ("pinned", pinned))
        },
    }


def _best(run: Any, rounds: int = 10) -> float:
    seconds = []
    for _ in range(rounds):
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def disk(settings: Settings) -> dict[str, Any]:
    """What the scratch folder takes from one writer: 2 GiB, synchronised."""
    path, block = settings.folder / "disk", bytes(1 << 26)
    start = time.perf_counter()
    with path.open("wb") as handle:
        for _ in range(2 if settings.small else 32):
            handle.write(block)
        handle.flush()
        os.fsync(handle.fileno())
    seconds, size = time.perf_counter() - start, path.stat().st_size
    path.unlink()
    return {"gb_s": size / seconds / 1e9}


WAITING = """
import sys, time, torch
torch.cuda.init(); end = time.time() + float(sys.argv[1]); print("up", flush=True)
while time.time() < end:
    if sys.argv[2] == "spin": torch.cuda._sleep(50_000_000); torch.cuda.synchronize()
    else: time.sleep(0.05)
"""


def waiting(settings: Settings) -> dict[str, Any]:
    """What a second process costs that spins on the GPU, as a rank does that waits in a collective."""
    if not torch.cuda.is_available():
        return {"skipped": "no GPU"}
    a, b = (torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    found = {}
    for kind in ("idle", "spin"):
        other = subprocess.Popen([sys.executable, "-c", WAITING, "12", kind], stdout=subprocess.PIPE, text=True)
        assert other.stdout is not None
        other.stdout.readline()
        time.sleep(1)
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < 4:
            a @ b
            synchronize()
            count += 1
        found[f"{kind}_products_per_s"] = count / (time.perf_counter() - start)
        other.kill()
        other.wait()
    found["price"] = found["idle_products_per_s"] / found["spin_products_per_s"]
    return found
