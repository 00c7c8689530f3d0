"""Seconds of one pass through the model, from operations, bytes and the machine's rates.

A pass has three kinds of work, each with a rate of its own (:mod:`pact_nemo.planning.hardware`):

- **products** of the decoder's linear layers, 2 operations a weight and token forward and 4 backward, with the
  elementwise work around them. The vocabulary head's are the same, and computed once more going backward.
- **attention**, 4 x heads x head size an attended pair forward and 2.5 times that backward (flash kernels compute the
  scores again). It is never in FP8. Keys outside a sliding window are counted as well.
- **around FP8**: the decoder's products are so fast in FP8 that casts, scales and the elementwise work between them
  cost as much. They are bound by memory: so many bytes for each number that enters or leaves a product. Narrow
  models gain less from FP8 for that.

A GPU that is asked for many small kernels waits for the host instead; the longer of the two counts. Not overlapped with
computation: what tensor parallelism gathers and scatters, what experts exchange, the pipeline's bubble
(PP - 1) / (VP x rows), gradient reduction, and packing on the host.
"""

from __future__ import annotations

from dataclasses import dataclass

from pact_nemo.planning.hardware import Hardware
from pact_nemo.planning.shape import Layout, ModelShape
from pact_nemo.planning.workload import Row
from pact_nemo.policy.config import PolicyConfig

ATTENTION_BACKWARD = 2.5  # of its forward operations
LAYER_KERNELS = 40.0  # launched for a layer's forward pass, its attention calls left out
CALL_KERNELS = 8.0  # for one attention call: joining keys, values and outputs, mask, kernel
BACKWARD_KERNELS = 2.0  # times as many as forward
#: one core's time to grow and pack a token for a pass, and every rank looks at all of them (``tools/bench.py packing``
#: measures the packing; trees are grown once a step, or twice with a reference, and so are on the safe side here)
PACK_SECONDS_PER_TOKEN = 0.25e-6


@dataclass(frozen=True)
class Operations:
    """Of one forward pass.

    Attributes:
        products: of the decoder's linear layers.
        attention: of its attention.
        head: of the vocabulary head.
        numbers: that enter or leave the products of the decoder.
    """

    products: float
    attention: float
    head: float
    numbers: float

    @property
    def total(self) -> float:
        return self.products + self.attention + self.head


@dataclass(frozen=True)
class Pass:
    """What goes through the model at once.

    Attributes:
        row: all tokens of the pass, over all ranks.
        rows: micro-batches of a data-parallel rank.
        train: forward and backward, else forward alone.
        fp8: the decoder's products are in FP8.
        frozen: the weights have no gradient, only the hidden states have (adapters; their own products are left out).
    """

    row: Row
    rows: int
    train: bool
    fp8: bool
    frozen: bool = False


def forward_operations(shape: ModelShape, row: Row) -> Operations:
    """Of one forward pass over ``row``."""
    return Operations(
        products=2.0 * shape.active_layer_parameters * row.tokens,
        attention=4.0 * shape.layers * shape.heads * shape.head_dim * row.pairs,
        head=2.0 * shape.vocab * shape.hidden * row.scored,
        numbers=_product_numbers(shape) * row.tokens,
    )


def _product_numbers(shape: ModelShape) -> float:
    """Numbers per token that enter or leave the products of all layers."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = 2 * shape.hidden + 2 * queries + 2 * keys
    copies = shape.experts_per_token if shape.experts else 1
    width = shape.expert_intermediate if shape.experts else shape.intermediate
    return float(shape.layers * (attention + copies * (2 * shape.hidden + 3 * width)))


def model_operations(shape: ModelShape, row: Row, *, frozen: bool = False) -> float:
    """Of forward and backward, as model TFLOP/s are counted: nothing that is recomputed. ``frozen`` weights have no
    gradient of their own."""
    work = forward_operations(shape, row)
    return 3.0 * work.total - ((work.products + work.head) if frozen else 0.0)


def compute_seconds(
    shape: ModelShape, layout: Layout, policy: PolicyConfig, hardware: Hardware, one: Pass
) -> dict[str, float]:
    """Seconds of a GPU's own work by kind: ``products``, ``attention``, ``around FP8``."""
    work = forward_operations(shape, one.row)
    again = policy.recompute if one.train else "none"
    passes = (4.0 if again == "full" else 3.0) if one.train else 1.0
    head = 4.0 if one.train else 1.0
    if one.train and one.frozen:
        passes, head = passes - 1.0, head - 1.0
    attention = (ATTENTION_BACKWARD + (2.0 if again != "none" else 1.0)) if one.train else 1.0
    in_fp8 = max(0.0, 1.0 - 2.0 * policy.fp8_bf16_layers / shape.layers) if one.fp8 and hardware.fp8 else 0.0
    dense = hardware.bf16 * hardware.reached_bf16
    mixed = hardware.reached_experts if shape.experts else 1.0
    each = (1.0 - in_fp8) / dense + (in_fp8 / (hardware.fp8 * hardware.reached_fp8) if in_fp8 else 0.0)
    bandwidth = hardware.memory_bandwidth * hardware.memory_reached
    kernels = hardware.reached_te_attention if policy.attention == "te" else hardware.reached_attention
    return {
        "products": (passes * work.products * each / mixed + head * work.head / dense) / layout.world,
        "attention": attention * work.attention / (hardware.bf16 * kernels) / layout.world,
        "around FP8": passes * work.numbers * in_fp8 * hardware.fp8_bytes / bandwidth / layout.world,
    }


def launch_seconds(shape: ModelShape, layout: Layout, policy: PolicyConfig, hardware: Hardware, one: Pass) -> float:
    """Seconds that the host takes to ask for a rank's kernels."""
    calls = one.row.calls / (layout.data * max(one.rows, 1))
    passes = 1.0
    if one.train:
        passes += BACKWARD_KERNELS + (1.0 if policy.recompute == "full" else 0.0)
    kernels = LAYER_KERNELS + (6.0 * shape.experts / layout.expert if shape.experts else 0.0) + CALL_KERNELS * calls
    return one.rows * shape.layers / layout.pipeline * passes * kernels * hardware.launch


def pass_seconds(shape: ModelShape, layout: Layout, policy: PolicyConfig, hardware: Hardware, one: Pass) -> float:
    """Seconds of one pass, packing included."""
    own = sum(compute_seconds(shape, layout, policy, hardware, one).values())
    passes = 1.0 if not one.train else 4.0 if policy.recompute == "full" else 3.0
    own += exchange_seconds(shape, layout, hardware, one.row.tokens / (layout.data * layout.context), passes)
    busy = max(own, launch_seconds(shape, layout, policy, hardware, one))
    packing = one.row.tokens * PACK_SECONDS_PER_TOKEN
    return busy * (1.0 + (layout.pipeline - 1) / (layout.virtual * max(one.rows, 1))) + packing


def exchange_seconds(shape: ModelShape, layout: Layout, hardware: Hardware, tokens: float, passes: float) -> float:
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
