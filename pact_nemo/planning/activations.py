"""Bytes that a rank's forward and backward pass keep, tensor by tensor, and the peak over both.

What autograd keeps depends on the kernels, so there are two catalogues:

- ``torch``: layers without Transformer Engine, on the CPU. Norms keep their input and output, SwiGLU its input and
  output, the rotation nothing (``policy/fused.py``; with ``policy.fused_elementwise=false`` they keep more, which isn't
  planned), attention is torch's flash kernel for the CPU (it keeps q, k, v, the output and a log-sum per query, never
  the scores) with stored masks. Read off the tensors that autograd saves, and held against measured allocator peaks to
  5 % (``tests/test_planning_activations.py``).
- ``te``: Transformer Engine on CUDA. The same of norms and SwiGLU; masks are never stored, linear inputs are kept in
  FP8 (1 byte) under ``policy.fp8``. From the kernels' sources, not measured here.

The head never keeps logits; its chunk buffers are named in :func:`head_forward` and :func:`head_backward` as
``policy/heads.py`` allocates them.
"""

from __future__ import annotations

from dataclasses import dataclass

from pact_nemo.planning.shape import Layout, ModelShape, padded_vocab
from pact_nemo.planning.workload import Row
from pact_nemo.policy.config import PolicyConfig

FP32 = 4
INDEX = 8  # int64
KERNELS = ("torch", "te")
#: of the routed tokens, at once as experts' outputs are put back in order, beside those that are kept: outputs, and in
#: their old order; where they travel also those that were sent and received, which megatron's dispatcher holds so long
_ROUTED_COPIES, _TRAVELLING_COPIES = 2, 4


@dataclass(frozen=True)
class Numbers:
    """How numbers are kept.

    Attributes:
        width: bytes of a weight or activation.
        linear_input: bytes of a number that only a matrix product's backward pass needs (1 under FP8).
        kernels: one of ``KERNELS``.
    """

    width: int
    linear_input: int
    kernels: str

    @classmethod
    def of(cls, precision: str, *, fp8: bool = False, kernels: str = "torch") -> Numbers:
        width = 4 if precision == "fp32" else 2
        return cls(width, 1 if fp8 else width, kernels)

    @property
    def fused(self) -> bool:
        return self.kernels == "te"


@dataclass(frozen=True)
class Widths:
    """Numbers per token on one rank."""

    hidden: int  # as cut by sequence parallelism
    queries: int
    keys: int
    feed_forward: int
    heads: int
    kv_heads: int

    @classmethod
    def of(cls, shape: ModelShape, layout: Layout) -> Widths:
        split = layout.tensor
        return cls(
            shape.hidden // layout.hidden_split,
            shape.heads * shape.head_dim // split,
            shape.kv_heads * shape.head_dim // split,
            shape.intermediate // split,
            shape.heads // split,
            shape.kv_heads // split,
        )


def norm_kept(numbers: Numbers, width: int) -> float:
    """Per token: RMSNorm of ``width`` numbers and the linear input that it makes."""
    return width * (numbers.width + numbers.linear_input) + FP32


def norm_working(numbers: Numbers, width: int) -> float:
    """Per token, while RMSNorm of ``width`` numbers is differentiated: its gradient, and on the CPU its float32 parts
    (``policy/fused.py``).
    """
    parts = 0 if numbers.fused else 2 if numbers.width == FP32 else 3
    return width * (numbers.width + parts * FP32)


def core_attention_kept(shape: ModelShape, layout: Layout, numbers: Numbers, row: Row) -> float:
    """Per layer and row: what the attention kernel keeps beyond q, k and v; a selective recompute drops it."""
    own = Widths.of(shape, layout)
    tokens = row.tokens / layout.context
    joined = 2 * own.keys * numbers.width * row.joined_keys / layout.context
    return tokens * (own.queries * numbers.width + FP32 * own.heads) + joined


def attention_kept(shape: ModelShape, layout: Layout, numbers: Numbers, row: Row) -> float:
    """Per layer and row, the input norm included: q, k, v before and after rotation, the output."""
    own, width = Widths.of(shape, layout), numbers.width
    tokens = row.tokens / layout.context
    each = norm_kept(numbers, own.hidden)
    each += (own.queries + 2 * own.keys) * width  # the fused projection stays whole: v is a view of it
    each += (own.queries + own.keys) * width  # q and k after rotation
    each += own.queries * numbers.linear_input  # joined output, input of the output projection
    if shape.qk_norm:
        each += (own.queries + own.keys) * width + FP32 * (own.heads + own.kv_heads)
    gathered = 2 * own.keys * width * row.tokens if layout.context > 1 else 0.0  # the whole row's keys and values
    return tokens * each + gathered


def feed_forward_kept(shape: ModelShape, layout: Layout, numbers: Numbers, row: Row) -> float:
    """Per layer and row, the norm before it included."""
    own, width = Widths.of(shape, layout), numbers.width
    tokens = row.tokens / layout.context
    if not shape.experts:
        return tokens * (norm_kept(numbers, own.hidden) + (2 * width + numbers.linear_input) * own.feed_forward)
    # each rank routes its own tokens and, evenly routed, computes as many
    copies = shape.experts_per_token
    swiglu = (
        2 * width + numbers.linear_input + (0 if numbers.fused else width)
    )  # unfused: the routing weight makes one more
    router = copies * (2 * INDEX + FP32) + shape.experts * (1 + width)
    routed = shape.hidden * numbers.linear_input + swiglu * shape.expert_intermediate + width
    return tokens / layout.hidden_split * (norm_kept(numbers, shape.hidden) + router + copies * routed)


def layer_kept(shape: ModelShape, layout: Layout, numbers: Numbers, row: Row, recompute: str) -> float:
    """Per layer and row, under a recompute policy: everything, everything but the attention kernel's own, or the input
    alone.
    """
    if recompute == "full":
        return row.tokens / layout.context * shape.hidden / layout.hidden_split * numbers.width
    kept = attention_kept(shape, layout, numbers, row) + feed_forward_kept(shape, layout, numbers, row)
    return kept + (core_attention_kept(shape, layout, numbers, row) if recompute == "none" else 0.0)


def routers_kept(shape: ModelShape, layout: Layout, numbers: Numbers, row: Row, recompute: str) -> float:
    """Per layer, once on a rank: what a mixture's dispatcher holds of a layer that was differentiated, until the next
    row comes. Its routing weights lead to the layer's input, with gradient, where the layer was recomputed.
    """
    if not shape.experts or recompute != "full":
        return 0.0
    each = shape.hidden * numbers.width + shape.experts * (1 + numbers.width) + INDEX * shape.experts_per_token
    return row.tokens / layout.context / layout.hidden_split * each


def row_kept(shape: ModelShape, layout: Layout, numbers: Numbers, row: Row) -> float:
    """Once per row: token ids, positions, the rotation's cosines and sines, index and stream vectors of the scored
    tokens, masks on the CPU.
    """
    tokens, scored = row.tokens / layout.context, row.scored / layout.context
    masks = 0.0 if numbers.fused else row.masks / layout.context * numbers.width
    return tokens * (2 * INDEX + numbers.width * shape.head_dim) + scored * 3 * INDEX + masks


def feed_forward_working(shape: ModelShape, layout: Layout, numbers: Numbers, row: Row) -> float:
    """Largest extra in a layer's feed-forward: SwiGLU differentiated (three gradients of its width less the freed
    output, and the residual's), or, of a mixture of experts, all experts' outputs joined going forward, beside what the
    layer still holds of its attention.
    """
    own = Widths.of(shape, layout)
    tokens = row.tokens / layout.context
    if not shape.experts:
        return tokens * numbers.width * (2 * own.feed_forward + own.hidden)
    copies = shape.experts_per_token / layout.hidden_split
    backward = 2 * shape.expert_intermediate * copies + shape.hidden * copies + own.hidden
    routed = _TRAVELLING_COPIES if layout.expert > 1 else _ROUTED_COPIES
    return tokens * numbers.width * max(backward, routed * shape.hidden * copies + 2 * own.hidden)


def head_forward(
    shape: ModelShape, layout: Layout, numbers: Numbers, row: Row, chunk: int, *, entropies: bool = False
) -> float:
    """Extra of the vocabulary head going forward: one chunk of logits, and in float32 once more where that is another
    dtype. Entropies take another quarter of a chunk in float32."""
    rows = padded_vocab(shape, layout) // layout.tensor
    length = min(chunk, row.scored / layout.context)
    return (
        length
        * rows
        * ((numbers.width if numbers.width == FP32 else numbers.width + FP32) + (FP32 / 4 if entropies else 0.0))
    )


def head_backward(
    shape: ModelShape, layout: Layout, numbers: Numbers, row: Row, chunk: int, *, frozen: bool = False
) -> float:
    """Extra of the vocabulary head going backward: a chunk of logits again. The gradient of its input takes the input's
    place, that of its weight is added to megatron's buffer; only a tied head on a later stage keeps one of its own
    (``policy/model.py``). A ``frozen`` head has none.
    """
    logits = head_forward(shape, layout, numbers, row, chunk, entropies=True)  # they may be trained on
    if frozen:
        return logits
    weight = padded_vocab(shape, layout) // layout.tensor * shape.hidden
    own = FP32 * weight if shape.tied and layout.pipeline > 1 else 0.0
    product = (
        0 if numbers.width == FP32 else numbers.width + (0 if numbers.fused else FP32)
    )  # a chunk's; the CPU casts it before it is added
    adding = own + product * weight + logits
    return max(adding, 0.0 if shape.tied else float(numbers.width * weight))  # untied: what megatron's hook waits for


def in_flight(layout: Layout, stage: int, micro_batches: int) -> float:
    """Micro-batches whose activations of all its layers a rank of ``stage`` holds at once: 1F1B, or interleaved (in
    units of all its chunks).
    """
    if layout.pipeline == 1:
        return 1.0
    if layout.virtual == 1:
        return float(min(layout.pipeline - stage, micro_batches))
    warm_up = 2 * (layout.pipeline - stage - 1) + (layout.virtual - 1) * layout.pipeline + 1
    return min(warm_up, micro_batches * layout.virtual) / layout.virtual


def stale_inputs(layout: Layout, stage: int, micro_batches: int) -> int:
    """Model chunks of a rank whose input is not in flight any more while the most are: the last row through the chunk
    was differentiated, and no later one came. The chunk holds that input, and its gradient, until one comes.

    Plays megatron's interleaved schedule: groups of as many micro-batches as stages go through chunk after chunk.
    """
    if layout.virtual == 1:
        return 0
    stages, chunks = layout.pipeline, layout.virtual
    count = min(micro_batches, 4 * stages) // stages * stages  # it repeats
    groups = [range(first, first + stages) for first in range(0, count, stages)]
    forward = [(row, chunk) for group in groups for chunk in range(chunks) for row in group]
    backward = [(row, chunk) for group in groups for chunk in reversed(range(chunks)) for row in group]
    warm_up = min(2 * (stages - stage - 1) + (chunks - 1) * stages, len(forward))
    last = {chunk: row for row, chunk in forward[:warm_up]}
    done: dict[int, int] = {}
    most, found = 0, 0
    for index, (row, chunk) in enumerate(backward):
        sent = min(warm_up + index + 1, len(forward))
        if warm_up + index < len(forward):
            newest, where = forward[warm_up + index]
            last[where] = newest
        stale = sum(done.get(each) == newest for each, newest in last.items())
        if (flying := sent - index) + 2 * stale > most:
            most, found = flying + 2 * stale, stale
        done[chunk] = row
    return found


@dataclass(frozen=True)
class ActivationPeak:
    """The peak of a forward and backward pass on a rank of one pipeline stage, in bytes.

    Attributes:
        kept: of all layers and micro-batches in flight at the peak, what autograd keeps.
        working: of the layer that is being differentiated, beyond that (a recomputed layer's own tensors included).
        head: vocabulary head and final norm at the peak; 0 where the peak is in a layer.
    """

    kept: float
    working: float
    head: float

    @property
    def total(self) -> float:
        return self.kept + self.working + self.head


def training_peak(
    shape: ModelShape,
    layout: Layout,
    policy: PolicyConfig,
    numbers: Numbers,
    row: Row,
    *,
    stage: int,
    micro_batches: int,
) -> ActivationPeak:
    """The larger of two moments: a layer's backward pass, and (last stage) the head's.

    Args:
        shape, layout: the model, and how it is cut.
        policy: its ``recompute``, ``logprob_chunk`` and whether it trains adapters.
        numbers: how numbers are kept.
        row: one micro-batch.
        stage: pipeline stage of the rank.
        micro_batches: of an update, on one data-parallel rank.
    """
    recompute, chunk = policy.recompute, policy.logprob_chunk
    layers = shape.layers // layout.pipeline
    flying = in_flight(layout, stage, micro_batches)
    own = Widths.of(shape, layout)
    tokens = row.tokens / layout.context
    kept = flying * (
        layers * layer_kept(shape, layout, numbers, row, recompute) + row_kept(shape, layout, numbers, row)
    )
    boundary = tokens * own.hidden * numbers.width
    kept += 2 * stale_inputs(layout, stage, micro_batches) * boundary
    in_layer = feed_forward_working(shape, layout, numbers, row)
    if recompute == "full":
        in_layer += layer_kept(
            shape, layout, numbers, row, "none"
        )  # the layer is there whole; its norm's input is the kept one
    # at the first layer of a stage all others are differentiated, and the second one's gradient is the one that it is
    # given; at the head none is
    at_first = kept + max(layers - 2, 0) * routers_kept(shape, layout, numbers, row, recompute)
    if stage < layout.pipeline - 1:
        return ActivationPeak(at_first, in_layer, 0.0)
    final = tokens * norm_kept(numbers, own.hidden)
    scored = row.scored / layout.context * shape.hidden * numbers.width
    head = scored + max(
        head_forward(shape, layout, numbers, row, chunk, entropies=True),
        head_backward(shape, layout, numbers, row, chunk, frozen=policy.lora.rank > 0),
    )
    head = final + max(head, tokens * norm_working(numbers, own.hidden))
    if kept + head > at_first + in_layer:
        return ActivationPeak(kept, 0.0, head)
    return ActivationPeak(at_first, in_layer, 0.0)


def scoring_peak(shape: ModelShape, layout: Layout, numbers: Numbers, row: Row, *, stage: int, chunk: int) -> float:
    """Bytes of a forward pass without gradients: one layer's widest moment, or the head."""
    own = Widths.of(shape, layout)
    tokens = row.tokens / layout.context
    wide = 3 * (
        shape.expert_intermediate * shape.experts_per_token / layout.hidden_split if shape.experts else own.feed_forward
    )
    layer = tokens * numbers.width * (2 * own.hidden + max(wide, 2 * own.queries + 2 * own.keys + own.hidden))
    head = 0.0
    if stage == layout.pipeline - 1:
        scored = row.scored / layout.context * shape.hidden * numbers.width
        head = tokens * own.hidden * numbers.width + scored + head_forward(shape, layout, numbers, row, chunk)
    return row_kept(shape, layout, numbers, row) + max(layer, head)
