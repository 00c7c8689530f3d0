"""The GPUs that this process may use, without opening one of them: a context on each costs memory that the ranks need,
so a child process looks.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass

from pact_nemo.errors import ConfigError

_LOOK = """
import json, torch
rows = []
for index in range(torch.cuda.device_count()):
    found = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    rows.append([found.name, total, free])
print(json.dumps(rows))
"""
_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        memory: bytes of it.
        free: bytes that nobody uses.
    """

    name: str
    memory: int
    free: int


def visible_gpus() -> list[Gpu]:
    """In the order of ``cuda:N``; empty where torch sees none.

    Raises:
        ConfigError: torch sees GPUs that it can't open.
    """
    import torch

    if not torch.cuda.is_available():
        return []
    try:
        done = subprocess.run([sys.executable, "-c", _LOOK], capture_output=True, text=True, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"the GPUs don't answer within {_TIMEOUT_S:.0f} s; look at nvidia-smi") from error
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigError(f"torch sees GPUs and can't open them ({last}); look at nvidia-smi, or choose others with"
                          " CUDA_VISIBLE_DEVICES")  # fmt: skip
    return [Gpu(*row) for row in json.loads(done.stdout.splitlines()[-1])]


def named(gpus: list[Gpu]) -> str:
    """Kinds and memory of GPUs, in words."""
    if not gpus:
        return "no GPU"
    kinds = [(kind, [gpu for gpu in gpus if gpu.name == kind]) for kind in dict.fromkeys(gpu.name for gpu in gpus)]
    gib = 2**30
    return ", ".join(
        f"{len(same)} x {kind} ({min(gpu.memory for gpu in same) / gib:.0f} GiB,"
        f" {min(gpu.free for gpu in same) / gib:.0f} free)"
        for kind, same in kinds
    )
