"""Bytes that a run writes to disk: weights of every kind and checkpoints. Rollouts and logs are small beside them."""

from __future__ import annotations

WIDTH = {
    "float32": 4.0,
    "bfloat16": 2.0,
    "float16": 2.0,
    "fp8_block": 1.01,
}  #: of a weight in an export, scales of FP8 blocks included


def export_bytes(parameters: int, dtype: str, keep: int) -> float:
    """Refit exports: the newest ``keep`` of them, and the one that is being written."""
    return (keep + 1) * parameters * WIDTH[dtype]


def checkpoint_bytes(parameters: int, precision: str, keep: int) -> float:
    """The newest ``keep`` checkpoints and the one that is being written: weights, their float32 copy and Adam's two
    float32 moments.
    """
    return (keep + 1) * parameters * (WIDTH["float32" if precision == "fp32" else "bfloat16"] + 3 * WIDTH["float32"])


def final_bytes(parameters: int, precision: str, *, formats: int = 1, reference: bool) -> float:
    """The trained policy in each of ``export.formats`` and, where RL starts from a warm-up, the frozen reference."""
    return (formats + reference) * parameters * WIDTH["float32" if precision == "fp32" else "bfloat16"]
