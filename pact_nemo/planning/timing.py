"""Seconds of each phase of a step. First principles with few fitted fractions (:mod:`pact_nemo.planning.hardware`):
good for comparing layouts and finding the bottleneck, not for the last ten percent.
"""

from __future__ import annotations

from pact_nemo.planning.compute import Pass, pass_seconds
from pact_nemo.planning.generation import ServerPlan, rollout_seconds
from pact_nemo.planning.hardware import Hardware
from pact_nemo.planning.shape import Layout, ModelShape, RankParameters, adapter_parameters, rank_parameters
from pact_nemo.planning.sharing import kept_asleep, largest_state, turn_seconds
from pact_nemo.planning.workload import StepWork
from pact_nemo.policy.config import PolicyConfig


def update_seconds(
    shape: ModelShape, layout: Layout, policy: PolicyConfig, hardware: Hardware, work: StepWork
) -> float:
    """All optimizer updates of a step: passes, gradient reduction, Adam, parameter gathering."""
    row = work.mean_tree * (work.prompts / work.updates)
    rows = work.micro_batches(policy.micro_batch_tokens, layout.data)
    training = Pass(row, rows, train=True, fp8=policy.fp8 is not None, frozen=policy.lora.rank > 0)
    one = pass_seconds(shape, layout, policy, hardware, training)
    held = max(
        (rank_parameters(shape, layout, stage, policy.lora) for stage in range(layout.pipeline)),
        key=lambda found: found.total,
    )
    if held.adapters is not None:  # all else is neither reduced nor updated
        held = RankParameters(held.adapters, 0, held.largest)
    replicas = layout.data * layout.context
    if replicas > 1:  # reduce-scatter in fp32, all-gather in the weights' dtype
        link = hardware.node_bandwidth if layout.world <= hardware.gpus_per_node else hardware.network_bandwidth
        one += (
            6.0
            * (held.dense * (replicas - 1) / replicas + held.expert * (layout.expert_data - 1) / layout.expert_data)
            / link
        )
    own = (
        held.dense / replicas + held.expert / layout.expert_data if policy.distributed_optimizer else float(held.total)
    )
    one += 30.0 * own / (hardware.memory_bandwidth * hardware.memory_reached) + hardware.update_overhead
    return one * work.updates


def scoring_seconds(
    shape: ModelShape, layout: Layout, policy: PolicyConfig, hardware: Hardware, work: StepWork
) -> dict[str, float]:
    """Forward passes without gradients: the old policy, in the update's precision and packing, and the reference in
    bf16.
    """
    found: dict[str, float] = {}
    rows = work.micro_batches(policy.micro_batch_tokens, layout.data)
    fp8 = policy.fp8 is not None
    alone = work.anchored_tree * float(work.prompts)
    for row, share in ((work.mean_tree * float(work.prompts), work.score_old), (alone, work.score_prompt_only)):
        if share:
            passes = max(1, round(rows * work.updates * share))
            scoring = Pass(row * share, passes, train=False, fp8=fp8)
            seconds = pass_seconds(shape, layout, policy, hardware, scoring)
            found["old-policy scoring"] = found.get("old-policy scoring", 0.0) + seconds
    if work.reference:
        scoring = Pass(alone, rows * work.updates, train=False, fp8=False)
        found["reference scoring"] = pass_seconds(shape, layout, policy, hardware, scoring)
        if hardware.cuda and not policy.lora.rank:  # its weights come from the host
            held = max(rank_parameters(shape, layout, stage).total for stage in range(layout.pipeline))
            found["reference scoring"] += 2.0 * held / hardware.host_bandwidth
    return found


def export_bytes(shape: ModelShape, server: ServerPlan) -> float:
    """Of one refit."""
    return float(server.width) * (server.adapters or shape.parameters)


def refit_seconds(shape: ModelShape, layout: Layout, hardware: Hardware, server: ServerPlan) -> dict[str, float]:
    """Refit by export: gathered over TP and PP and written by all nodes; verified once on each node that has engines,
    and read there once, however many engines it has (the rest comes from the page cache).
    """
    nodes = max(1, -(-layout.world // hardware.gpus_per_node))
    size = export_bytes(shape, server)
    gather = size / hardware.network_bandwidth if layout.tensor * layout.pipeline > 1 else 0.0
    return {
        "gather and write": max(gather, size / (nodes * hardware.disk_bandwidth)),
        "verify": size / hardware.disk_bandwidth,
        "load": size / hardware.disk_bandwidth,
    }


def checkpoint_seconds(shape: ModelShape, layout: Layout, policy: PolicyConfig, hardware: Hardware) -> float:
    """What is trained and its optimizer state, written by all nodes."""
    nodes = max(1, -(-layout.world // hardware.gpus_per_node))
    each = (2 if policy.precision != "fp32" else 4) + (12 if policy.precision != "fp32" else 8)
    trained = adapter_parameters(shape, policy.lora) if policy.lora.rank else shape.parameters
    return each * trained / (nodes * hardware.disk_bandwidth)


def phases(
    shape: ModelShape, layout: Layout, policy: PolicyConfig, hardware: Hardware, work: StepWork, server: ServerPlan
) -> dict[str, float]:
    """Seconds of a step by phase, in order."""
    found = {
        "rollout": rollout_seconds(shape, hardware, server, work),
        **scoring_seconds(shape, layout, policy, hardware, work),
        "update": update_seconds(shape, layout, policy, hardware, work),
        "refit": sum(refit_seconds(shape, layout, hardware, server).values()),
    }
    if server.time_sharing:
        state = largest_state(shape, layout, policy)
        found["taking turns"] = sum(turn_seconds(state, hardware, server, kept_asleep(shape, server)).values())
    return found
