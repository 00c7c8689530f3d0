"""GPUs that generate and train in turn: what leaves a GPU for the other side's turn, and the seconds of it."""

from __future__ import annotations

from pact_nemo.planning.generation import OUTSIDE_SHARE, ServerPlan
from pact_nemo.planning.hardware import Hardware
from pact_nemo.planning.memory import CUDA_CONTEXT, NCCL_COMMUNICATOR, USABLE, StateBytes, communicators
from pact_nemo.planning.shape import Layout

#: an engine's own part of falling asleep and of waking, beside moved bytes: mapping memory, resetting its cache
#: (assumed)
SLEEP_SECONDS, WAKE_SECONDS = 1.0, 1.0


def trainer_asleep(layout: Layout) -> float:
    """Bytes of a GPU that the trainer keeps while the engines generate: what CUDA and NCCL hold."""
    return CUDA_CONTEXT + NCCL_COMMUNICATOR * communicators(layout)


def awake_share(layout: Layout, hardware: Hardware) -> float:
    """Share of a GPU's memory that an engine may be given while the trainer is off it."""
    return USABLE - (trainer_asleep(layout) + OUTSIDE_SHARE) / hardware.memory


def moved_bytes(state: StateBytes) -> float:
    """Of one rank, to the host before a generation and back after it: weights and optimizer state. Gradients are
    dropped: an update starts from zero."""
    return float(state.weights + state.optimizer)


def turn_seconds(state: StateBytes, hardware: Hardware, server: ServerPlan) -> dict[str, float]:
    """Of one step: the trainer leaves, engines wake, engines sleep, the trainer returns. Weights reach an engine by the
    refit, so it drops its own as it falls asleep."""
    if not server.time_sharing:
        return {}
    copy = moved_bytes(state) / hardware.host_bandwidth
    return {"offload": copy, "wake": WAKE_SECONDS, "sleep": SLEEP_SECONDS, "return": copy}
