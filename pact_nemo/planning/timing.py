"""Seconds of each phase of a step, from operations, bytes and the machine's rates. First principles with few fitted
fractions (:mod:`pact_nemo.planning.hardware`): good for comparing layouts and finding the bottleneck, not for the last
ten percent.

Matrix products of a decoder cost 2 operations a weight and token forward and 4 backward; attention 4 x heads x head
size an attended pair forward. Full recompute adds a forward pass; the chunked head recomputes its logits, too. Not
overlapped with computation: what tensor parallelism gathers and scatters, what experts exchange, and the pipeline's
bubble (PP - 1) / (VP x rows). Gradient reduction is not overlapped either.
"""

from __future__ import annotations

from dataclasses import dataclass

from pact_nemo.planning.hardware import Hardware
from pact_nemo.planning.shape import Layout, ModelShape, rank_parameters
from pact_nemo.planning.workload import Row, StepWork
from pact_nemo.policy.config import PolicyConfig


@dataclass(frozen=True)
class ServerPlan:
    """The rollout side.

    Attributes:
        servers: how many.
        gpus: that each is split over.
        sequences: that one decodes together at most.
        share: of each GPU's memory that it gets.
        width: bytes of a weight there.
    """

    servers: int
    gpus: int
    sequences: int
    share: float = 0.9
    width: int = 2


def forward_operations(shape: ModelShape, row: Row) -> tuple[float, float]:
    """(decoder, vocabulary head) of one forward pass over ``row``."""
    layers = (
        2.0 * shape.active_layer_parameters * row.tokens + 4.0 * shape.layers * shape.heads * shape.head_dim * row.pairs
    )
    return layers, 2.0 * shape.vocab * shape.hidden * row.scored


def model_operations(shape: ModelShape, row: Row) -> float:
    """Of forward and backward, as model TFLOP/s are counted: nothing that is recomputed."""
    return 3.0 * sum(forward_operations(shape, row))


def compute_rate(shape: ModelShape, hardware: Hardware, *, fp8: bool) -> float:
    """Reached operations per second of one GPU; FP8 is taken to help a mixture of experts as much as a dense model."""
    dense = hardware.fp8 * hardware.reached_fp8 if fp8 and hardware.fp8 else hardware.bf16 * hardware.reached_bf16
    return dense * (hardware.reached_experts if shape.experts else 1.0)


def _exchange(shape: ModelShape, layout: Layout, hardware: Hardware, tokens: float, passes: float) -> float:
    """Seconds of tensor- and expert-parallel exchange for ``tokens`` through all layers of one pipeline stage,
    ``passes`` forward equivalents.
    """
    width, layers = 2.0, shape.layers / layout.pipeline
    within = layout.tensor <= hardware.gpus_per_node
    bandwidth = hardware.node_bandwidth if within else hardware.network_bandwidth
    part = (layout.tensor - 1) / layout.tensor
    seconds = (
        passes * layers * 4.0 * tokens * shape.hidden * width * part / bandwidth
    )  # gather and scatter, twice a layer
    if layout.context > 1:  # keys and values of the whole row on every rank
        pairs = 2.0 * shape.kv_heads * shape.head_dim / layout.tensor * width
        link = (
            hardware.node_bandwidth
            if layout.tensor * layout.context <= hardware.gpus_per_node
            else hardware.network_bandwidth
        )
        seconds += passes * layers * pairs * tokens * (layout.context - 1) / link
    if shape.experts and layout.expert > 1:
        moved = (
            2.0
            * tokens
            / layout.hidden_split
            * shape.experts_per_token
            * shape.hidden
            * width
            * (layout.expert - 1)
            / layout.expert
        )
        link = hardware.node_bandwidth if layout.expert <= hardware.gpus_per_node else hardware.network_bandwidth
        seconds += passes * layers * moved / link
    return seconds


@dataclass(frozen=True)
class Pass:
    """What goes through the model at once.

    Attributes:
        row: all tokens of the pass, over all ranks.
        rows: micro-batches of a data-parallel rank.
        train: forward and backward, else forward alone.
        fp8: the decoder's products are in FP8.
    """

    row: Row
    rows: int
    train: bool
    fp8: bool


def pass_seconds(shape: ModelShape, layout: Layout, policy: PolicyConfig, hardware: Hardware, one: Pass) -> float:
    """Seconds of one pass."""
    layers, head = forward_operations(shape, one.row)
    passes = 1.0 if not one.train else 4.0 if policy.recompute == "full" else 3.0
    operations = passes * layers + (4.0 if one.train else 1.0) * head
    seconds = operations / (layout.world * compute_rate(shape, hardware, fp8=one.fp8))
    seconds += _exchange(shape, layout, hardware, one.row.tokens / (layout.data * layout.context), passes)
    return seconds * (1.0 + (layout.pipeline - 1) / (layout.virtual * max(one.rows, 1)))


def update_seconds(
    shape: ModelShape, layout: Layout, policy: PolicyConfig, hardware: Hardware, work: StepWork
) -> float:
    """All optimizer updates of a step: passes, gradient reduction, Adam, parameter gathering."""
    row = work.mean_tree * (work.prompts / work.updates)
    rows = work.micro_batches(policy.micro_batch_tokens, layout.data)
    training = Pass(row, rows, train=True, fp8=policy.fp8 is not None)
    one = pass_seconds(shape, layout, policy, hardware, training)
    held = max(
        (rank_parameters(shape, layout, stage) for stage in range(layout.pipeline)), key=lambda found: found.total
    )
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
    one += 30.0 * own / (hardware.memory_bandwidth * hardware.memory_reached)
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
    return found


def rollout_seconds(shape: ModelShape, hardware: Hardware, server: ServerPlan, work: StepWork) -> float:
    """Decoding until the longest response is done, prefill included; episodes that don't fit together wait for their
    turn.

    A decoding step reads the weights once and every sequence's cache, and costs a fixed overhead; on a machine without
    much compute per byte the matrix products take longer than the reading, and the larger of the two counts.
    """
    lengths = work.lengths
    episodes = work.episodes / server.servers
    context = lengths.prompt + lengths.response / 2
    cache = shape.kv_bytes(server.width) / server.gpus
    weights = server.width * (shape.active_layer_parameters + shape.vocab * shape.hidden) / server.gpus
    if shape.experts:  # many sequences wake nearly all experts
        weights = server.width * shape.parameters / server.gpus
    free = max(hardware.memory * server.share - server.width * shape.parameters / server.gpus, 0.05 * hardware.memory)
    together = max(1.0, min(float(server.sequences), episodes, free / (cache * (lengths.prompt + lengths.response))))
    bandwidth = hardware.memory_bandwidth * hardware.memory_reached
    rate = hardware.bf16 * hardware.reached_bf16  # decoding is bound by reading, of experts too
    token_operations = 2.0 * (shape.active_layer_parameters + shape.vocab * shape.hidden) / server.gpus

    def step(sequences: float) -> float:
        return (
            max((weights + cache * context * sequences) / bandwidth, token_operations * sequences / rate)
            + hardware.decode_overhead
        )

    # full batches while there is work, then a tail in which fewer and fewer are left until the longest ends
    written = lengths.written
    longest = max(lengths.longest * lengths.policy_share, written)
    full_steps = max(episodes / together, 1.0) * written
    tail = max(longest - written, 0.0)
    decode = full_steps * step(together) + tail * step(max(together * written / (2.0 * longest), 1.0))
    prompts = work.prompts / server.servers * lengths.prompt  # K rollouts share their prompt's cache
    observed = episodes * (lengths.response - written)
    return decode + token_operations * (prompts + observed) / rate


def export_bytes(shape: ModelShape, width: int) -> float:
    return float(width) * shape.parameters


def refit_seconds(shape: ModelShape, layout: Layout, hardware: Hardware, server: ServerPlan) -> dict[str, float]:
    """Refit by export: gathered over TP and PP and written by all nodes, verified by one, read by each server's
    node.
    """
    nodes = max(1, -(-layout.world // hardware.gpus_per_node))
    size = export_bytes(shape, server.width)
    gather = size / hardware.network_bandwidth if layout.tensor * layout.pipeline > 1 else 0.0
    return {
        "gather and write": max(gather, size / (nodes * hardware.disk_bandwidth)),
        "verify": size / hardware.disk_bandwidth,
        "load": size / hardware.disk_bandwidth,
    }


def checkpoint_seconds(shape: ModelShape, layout: Layout, policy: PolicyConfig, hardware: Hardware) -> float:
    """Weights and optimizer state, written by all nodes."""
    nodes = max(1, -(-layout.world // hardware.gpus_per_node))
    each = (2 if policy.precision != "fp32" else 4) + (12 if policy.precision != "fp32" else 8)
    return each * shape.parameters / (nodes * hardware.disk_bandwidth)


def phases(
    shape: ModelShape, layout: Layout, policy: PolicyConfig, hardware: Hardware, work: StepWork, server: ServerPlan
) -> dict[str, float]:
    """Seconds of a step by phase, in order."""
    return {
        "rollout": rollout_seconds(shape, hardware, server, work),
        **scoring_seconds(shape, layout, policy, hardware, work),
        "update": update_seconds(shape, layout, policy, hardware, work),
        "refit": sum(refit_seconds(shape, layout, hardware, server).values()),
    }
