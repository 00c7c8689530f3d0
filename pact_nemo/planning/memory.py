"""Memory of one GPU (or process) by part, for the pipeline stage that needs most. All numbers are bytes."""

from __future__ import annotations

from dataclasses import dataclass, field

from pact_nemo.planning.activations import FP32, ActivationPeak, Numbers, in_flight, scoring_peak, training_peak
from pact_nemo.planning.shape import Layout, ModelShape, RankParameters, rank_parameters, share
from pact_nemo.planning.workload import Row, StepWork
from pact_nemo.policy.config import PolicyConfig

GIB = 1024**3
MOMENTS = 2  # Adam
# Of a CUDA process before any tensor: context, kernels of torch and of cuBLAS, cuBLAS workspace. The usual size on
# H100, assumed.
CUDA_CONTEXT = 1.0 * GIB
# Of one NCCL communicator: rings, trees and channels with their default buffer of 4 MiB. An assumption, not measured.
NCCL_COMMUNICATOR = 0.25 * GIB
LIBRARIES = (
    0.5 * GIB
)  # resident after all imports, before the model is built (measured on Linux with the CPU build of torch)
USABLE = 0.95  # of a GPU: what the caching allocator may lose to fragmentation is left free


@dataclass(frozen=True)
class StateBytes:
    """What lasts from step to step on one rank; exact but for the padding of megatron's buffers (under 64 elements a
    parameter).
    """

    weights: int
    fp8_copies: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.fp8_copies + self.gradients + self.optimizer


def state_bytes(parameters: RankParameters, layout: Layout, policy: PolicyConfig) -> StateBytes:
    """Weights in the compute dtype, float32 gradients, Adam's two float32 moments and, under bf16, float32 main
    weights.

    The distributed optimizer cuts moments and main weights over DP x CP, those of experts over the ranks with the same
    experts. Under ``policy.fp8`` Transformer Engine caches each weight in FP8 twice, as it is and transposed. Where
    only adapters are trained, gradients and optimizer are theirs alone.
    """
    fp32 = policy.precision == "fp32"
    each = FP32 * (MOMENTS if fp32 else MOMENTS + 1)
    sharded = policy.distributed_optimizer
    dense = share(parameters.dense, layout.data * layout.context if sharded else 1)
    expert = share(parameters.expert, layout.expert_data if sharded else 1)
    fp8_copies = 2 * parameters.total if policy.fp8 else 0
    if parameters.adapters is not None:
        return StateBytes(
            weights=(4 if fp32 else 2) * (parameters.total + parameters.adapters),
            fp8_copies=fp8_copies,
            gradients=FP32 * parameters.adapters,
            optimizer=each * share(parameters.adapters, layout.data * layout.context if sharded else 1),
        )
    return StateBytes(
        weights=(4 if fp32 else 2) * parameters.total,
        fp8_copies=fp8_copies,
        gradients=FP32 * parameters.total,
        optimizer=each * (dense + expert),
    )


def numbers_of(policy: PolicyConfig, *, kernels: str) -> Numbers:
    """How a policy's numbers are kept; ``policy.precision`` is fp32 or bf16. Adapters keep what they read themselves,
    which is not in FP8.
    """
    return Numbers.of(policy.precision, fp8=policy.fp8 is not None and not policy.lora.rank, kernels=kernels)


def communicators(layout: Layout) -> int:
    """NCCL communicators of a rank with others."""
    return sum(size > 1 for size in (layout.tensor, layout.pipeline, layout.context, layout.data, layout.expert))


def communication_bytes(
    shape: ModelShape, layout: Layout, numbers: Numbers, row: Row, *, cuda: bool, flying: float
) -> float:
    """Gathered rows of sequence parallelism, rows and gradients between pipeline stages, and NCCL's own buffers.

    A stage holds a row and a gradient that are under way, and on the CPU the outputs of the ``flying`` micro-batches
    too (on CUDA megatron frees them once they are sent).
    """
    tokens = row.tokens / layout.context
    gathered = tokens * shape.hidden * numbers.width if layout.sequence_parallel else 0.0
    boundary = tokens * shape.hidden / layout.hidden_split * numbers.width
    sent = (2 + (0 if cuda else flying)) * boundary if layout.pipeline > 1 else 0.0
    return gathered + sent + (NCCL_COMMUNICATOR * communicators(layout) if cuda else 0.0)


def adapter_working(shape: ModelShape, layout: Layout, numbers: Numbers, row: Row) -> float:
    """What an adapter takes beside the layer at work: its output before it is added, and over tensor-parallel ranks
    the whole row of its input or output (measured by rehearsals, ``docs/reference/lora.md``).
    """
    widest = shape.hidden if layout.tensor > 1 else shape.intermediate
    return 2.0 * row.tokens / layout.context * widest * numbers.width


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of the stage that needs most.

    Attributes:
        stage: which pipeline stage that is.
        parts: on the device, by name; their sum is the trainer's peak.
        host: in host memory, by name; on a CPU machine it is the same memory.
        server: the rollout server's share of a GPU that carries both.
        row_tokens: tokens of the micro-batch that it is for.
    """

    stage: int
    parts: dict[str, float]
    host: dict[str, float] = field(default_factory=dict)
    server: float = 0.0
    row_tokens: float = 0.0

    @property
    def trainer(self) -> float:
        return sum(self.parts.values())

    @property
    def total(self) -> float:
        return self.trainer + self.server


def stage_memory(
    shape: ModelShape,
    layout: Layout,
    policy: PolicyConfig,
    work: StepWork,
    *,
    stage: int,
    cuda: bool,
    row: Row | None = None,
) -> MemoryPlan:
    """Of a rank of one pipeline stage; ``policy.precision`` is fp32 or bf16, not auto."""
    numbers = numbers_of(policy, kernels="te" if cuda else "torch")
    parameters = rank_parameters(shape, layout, stage, policy.lora)
    copied = work.reference and parameters.adapters is None  # adapters are switched off for it instead
    saved = parameters.total if parameters.adapters is None else parameters.adapters
    state = state_bytes(parameters, layout, policy)
    row = row if row is not None else work.micro_batch(policy.micro_batch_tokens, layout.data)
    rows = work.micro_batches(policy.micro_batch_tokens, layout.data)
    between = communication_bytes(shape, layout, numbers, row, cuda=cuda, flying=in_flight(layout, stage, rows))
    peak: ActivationPeak = training_peak(shape, layout, policy, numbers, row, stage=stage, micro_batches=rows)
    in_layer = parameters.adapters is not None and peak.working
    adapting = adapter_working(shape, layout, numbers, row) if in_layer else 0.0
    # the reference pass puts the reference weights beside the current ones, without gradients
    reference = (state.weights if copied and cuda else 0) + scoring_peak(
        shape, layout, numbers, row, stage=stage, chunk=policy.logprob_chunk
    )
    parts = {
        "weights": float(state.weights),
        "gradients (fp32)": float(state.gradients),
        "optimizer": float(state.optimizer),
        "activations": peak.kept,
        "layer at work": peak.working,
        "log-prob head and chunk": peak.head,
        "communication buffers": between,
    }
    if adapting:
        parts["adapter at work"] = adapting
    if state.fp8_copies:
        parts["FP8 copies of weights"] = float(state.fp8_copies)
    if cuda:
        parts["CUDA context"] = CUDA_CONTEXT
    if reference > peak.total:
        parts["scoring, beyond the update"] = reference - peak.total
    if cuda:  # planning/host.py has the host's
        return MemoryPlan(stage, parts, row_tokens=row.tokens)
    host = {
        "reference weights": float(state.weights) if copied else 0.0,
        "checkpoint copies (at a save)": float((FP32 if numbers.width == FP32 else 2) * saved + FP32 * saved),
        "Python and libraries": LIBRARIES,
    }
    return MemoryPlan(stage, parts, host, row_tokens=row.tokens)


def memory_plan(
    shape: ModelShape,
    layout: Layout,
    policy: PolicyConfig,
    work: StepWork,
    *,
    cuda: bool,
    server: float = 0.0,
    row: Row | None = None,
) -> MemoryPlan:
    """Of the stage that needs most; ``server`` is the rollout server's share of the GPU in bytes."""
    stages = [
        stage_memory(shape, layout, policy, work, stage=stage, cuda=cuda, row=row) for stage in range(layout.pipeline)
    ]
    worst = max(stages, key=lambda plan: plan.trainer)
    return MemoryPlan(worst.stage, worst.parts, worst.host, server, worst.row_tokens)
