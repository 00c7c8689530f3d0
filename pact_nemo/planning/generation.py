"""Seconds of a step's rollouts, and what a rollout server takes of a GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pact_nemo.errors import ConfigError
from pact_nemo.planning.hardware import Hardware
from pact_nemo.planning.shape import ModelShape
from pact_nemo.planning.workload import StepWork

GIB = 1024**3
BATCHED_TOKENS = 8192  # of one engine step, vLLM's default on a large GPU
#: of a vLLM worker beside the share that it is given: CUDA context and captured graphs, which it leaves out (assumed)
OUTSIDE_SHARE = 2.0 * GIB


@dataclass(frozen=True)
class ServerPlan:
    """The rollout side.

    Attributes:
        servers: how many engines.
        gpus: that each is split over.
        sequences: that one decodes together at most.
        share: of each GPU's memory that it gets.
        width: bytes of a weight there.
        concurrency: episodes that are open at once over all engines; None = as many as they take.
        time_sharing: the engines are on trainer GPUs and sleep while the policy is scored and updated; the trainer's
            state leaves the GPU while they generate.
        whole: in their turn they get all that the trainer leaves, whatever ``share`` says.
        adapters: parameters that a refit brings, and the engines hold beside the model; 0: it brings the whole model.
    """

    servers: int
    gpus: int
    sequences: int
    share: float = 0.9
    width: int = 2
    concurrency: int | None = None
    time_sharing: bool = False
    whole: bool = False
    adapters: int = 0


def server_problems(shape: ModelShape, ranks: int) -> list[str]:
    """Why vLLM can't split this model over ``ranks`` GPUs. It repeats key and value heads where there are fewer than
    ranks.
    """
    key = f"rollout.server.tensor_parallel_size={ranks}"
    found = (
        []
        if shape.heads % ranks == 0
        else [f"{shape.heads} attention heads can't be split over {key} (it has to divide num_attention_heads)"]
    )
    if shape.kv_heads % ranks and ranks % shape.kv_heads:
        found.append(f"{shape.kv_heads} key/value heads can't be split over {key} (one has to divide the other)")
    return found


def kv_split(shape: ModelShape, server: ServerPlan) -> int:
    """Parts that an engine cuts keys and values into, in cache and weights: vLLM gives each GPU a whole head, and where
    there are fewer heads than GPUs several have the same one.
    """
    return min(server.gpus, shape.kv_heads)


def weights_of_one(shape: ModelShape, server: ServerPlan, parameters: float) -> float:
    """Bytes on one of an engine's GPUs of so many ``parameters`` of the model, its key and value projections among
    them.
    """
    repeated = shape.layers * shape.layer_kv_parameters * (1.0 / kv_split(shape, server) - 1.0 / server.gpus)
    return server.width * (parameters / server.gpus + repeated)


def working_bytes(shape: ModelShape, server: ServerPlan) -> float:
    """Of one of an engine's GPUs beside weights and cache: the largest engine step and the sampler's float32 logits."""
    width = max(shape.intermediate, shape.experts_per_token * shape.expert_intermediate) / server.gpus
    step = BATCHED_TOKENS * server.width * (3.0 * shape.hidden + 3.0 * width)
    return step + 3.0 * 4.0 * server.sequences * shape.vocab


def cache_room(shape: ModelShape, hardware: Hardware, server: ServerPlan) -> float:
    """Bytes of one of an engine's GPUs that are left for keys and values.

    Raises:
        ConfigError: the weights alone leave none.
    """
    taken = weights_of_one(shape, server, shape.parameters + server.adapters)
    if hardware.cuda:
        taken += working_bytes(shape, server)
    room = hardware.memory * server.share - taken
    if hardware.cuda and room <= 0:
        given = f"rollout.server.gpu_memory_utilization={server.share:.2f} of a {hardware.name}"
        if server.whole:
            given = f"what the trainer leaves an engine of a {hardware.name} (it keeps CUDA's, NCCL's and FP8's memory)"
        raise ConfigError(
            f"{given} is {max(hardware.memory * server.share, 0.0) / GIB:.1f} GiB; weights and one engine step over"
            f" {server.gpus} GPU(s) take {taken / GIB:.1f} GiB and leave no cache"
        )
    return max(room, 0.05 * hardware.memory)


def prompts_of_one(server: ServerPlan, work: StepWork) -> int:
    """Prompts of the engine that has most: all rollouts of a prompt go to one, and the step waits for the last."""
    return math.ceil(work.prompts / server.servers)


def sequences_together(shape: ModelShape, hardware: Hardware, server: ServerPlan, work: StepWork) -> float:
    """Mean number of episodes that the busiest engine decodes at once, while there are enough of them."""
    episodes = float(prompts_of_one(server, work) * work.group)
    held = shape.cached_bytes(work.lengths.prompt + work.lengths.response, server.width)
    cache = held / kv_split(shape, server)
    open_ = episodes if server.concurrency is None else min(episodes, server.concurrency / server.servers)
    return max(1.0, min(float(server.sequences), open_, cache_room(shape, hardware, server) / cache))


def rollout_seconds(shape: ModelShape, hardware: Hardware, server: ServerPlan, work: StepWork) -> float:
    """Decoding until the longest response is done, prefill included; episodes that don't fit together wait for their
    turn.

    A decoding step reads the weights once and every sequence's cache, and costs a fixed overhead; on a machine without
    much compute per byte the matrix products take longer than the reading, and the larger of the two counts.

    Raises:
        ConfigError: the server's share of a GPU holds no cache.
    """
    lengths, prompts = work.lengths, prompts_of_one(server, work)
    episodes = float(prompts * work.group)
    cache = shape.cached_bytes(lengths.prompt + lengths.response / 2, server.width) / kv_split(shape, server)
    active = weights_of_one(shape, server, shape.active_layer_parameters + shape.vocab * shape.hidden)
    # many sequences wake nearly all experts
    weights = weights_of_one(shape, server, shape.parameters) if shape.experts else active
    together = sequences_together(shape, hardware, server, work)
    bandwidth = hardware.memory_bandwidth * hardware.memory_reached
    rate = hardware.bf16 * hardware.reached_serving
    token_operations = 2.0 * active / server.width

    def step(sequences: float) -> float:
        reading, computing = (weights + cache * sequences) / bandwidth, token_operations * sequences / rate
        return max(reading, computing) + hardware.decode_overhead

    # full batches while there is work, then a tail in which fewer and fewer are left until the longest ends
    written = lengths.written
    longest = max(lengths.longest * lengths.policy_share, written)
    full_steps = max(episodes / together, 1.0) * written
    tail = max(longest - written, 0.0)
    decode = full_steps * step(together) + tail * step(max(together * written / (2.0 * longest), 1.0))
    observed = episodes * (lengths.response - written)  # K rollouts share their prompt's cache
    return decode + token_operations * (prompts * lengths.prompt + observed) / rate
