"""GPUs that generate and train in turn: what leaves a GPU for the other side's turn, and the seconds of it."""

from __future__ import annotations

from pact_nemo.planning.generation import OUTSIDE_SHARE, ServerPlan, weights_of_one
from pact_nemo.planning.hardware import Hardware
from pact_nemo.planning.memory import (
    CUDA_CONTEXT,
    NCCL_COMMUNICATOR,
    USABLE,
    StateBytes,
    communicators,
    state_bytes,
)
from pact_nemo.planning.shape import Layout, ModelShape, rank_parameters
from pact_nemo.policy.config import PolicyConfig

#: an engine's own part of falling asleep and of waking, beside moved bytes: mapping memory, resetting its cache
#: (0.07 to 0.3 and 0.1 measured on an H200 with a small model and a large cache; more is assumed)
SLEEP_SECONDS, WAKE_SECONDS = 0.5, 0.5


def trainer_asleep(layout: Layout, *, fp8_copies: float = 0.0) -> float:
    """Bytes of a GPU that the trainer keeps while the engines generate: what CUDA and NCCL hold, and Transformer
    Engine's FP8 copies of the weights.
    """
    return CUDA_CONTEXT + NCCL_COMMUNICATOR * communicators(layout) + fp8_copies


def largest_state(shape: ModelShape, layout: Layout, policy: PolicyConfig) -> StateBytes:
    """Of the pipeline stage that moves most; ``policy.precision`` is fp32 or bf16, not auto."""
    stages = (rank_parameters(shape, layout, stage, policy.lora) for stage in range(layout.pipeline))
    return max((state_bytes(parameters, layout, policy) for parameters in stages), key=moved_bytes)


def awake_share(layout: Layout, hardware: Hardware, *, fp8_copies: float = 0.0) -> float:
    """Share of a GPU's memory that an engine may be given while the trainer is off it."""
    return USABLE - (trainer_asleep(layout, fp8_copies=fp8_copies) + OUTSIDE_SHARE) / hardware.memory


def moved_bytes(state: StateBytes) -> float:
    """Of one rank, to the host before a generation and back after it: weights and optimizer state. Gradients are
    dropped: an update starts from zero."""
    return float(state.weights + state.optimizer)


def kept_asleep(shape: ModelShape, server: ServerPlan) -> float:
    """Bytes of one of an engine's GPUs that wait on the host while it sleeps: nothing where a refit brings the whole
    model, and the base where it brings adapters."""
    return weights_of_one(shape, server, shape.parameters) if server.adapters else 0.0


def turn_seconds(state: StateBytes, hardware: Hardware, server: ServerPlan, kept: float = 0.0) -> dict[str, float]:
    """Of one step: the trainer leaves, engines wake, engines sleep, the trainer returns.

    Args:
        kept: :func:`kept_asleep`.
    """
    if not server.time_sharing:
        return {}
    copy = moved_bytes(state) / hardware.host_bandwidth
    base = kept / hardware.host_bandwidth
    return {"offload": copy, "wake": WAKE_SECONDS + base, "sleep": SLEEP_SECONDS + base, "return": copy}
