"""Exact sizes: a decoder's shape as Hugging Face configs name it, a parallel layout, and the parameters that each rank
of it holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pact_nemo.errors import ConfigError
from pact_nemo.policy.architectures import Architecture, resolve_sizes
from pact_nemo.policy.config import LoraConfig, PolicyConfig
from pact_nemo.policy.lora_sizes import lora_problems


@dataclass(frozen=True)
class ModelShape:
    """Sizes that memory and time depend on, named as in Hugging Face configs."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    positions: int
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    experts: int = 0
    experts_per_token: int = 0
    expert_intermediate: int = 0
    window: int = 0  #: positions that a token sees in the layers with a sliding window
    window_layers: int = 0

    @classmethod
    def of(cls, architecture: Architecture) -> ModelShape:
        return cls(
            layers=architecture.layers,
            hidden=architecture.hidden,
            heads=architecture.heads,
            kv_heads=architecture.kv_heads,
            head_dim=architecture.head_dim,
            intermediate=architecture.intermediate,
            vocab=architecture.vocab,
            tied=architecture.tied,
            positions=architecture.positions,
            qkv_bias=architecture.qkv_bias,
            output_bias=architecture.output_bias,
            mlp_bias=architecture.mlp_bias,
            qk_norm=architecture.qk_norm,
            experts=architecture.experts,
            experts_per_token=architecture.experts_per_token,
            expert_intermediate=architecture.expert_intermediate,
            window=architecture.window or 0,
            window_layers=sum(window is not None for window in architecture.windows),
        )

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> ModelShape:
        """Of a ``config.json``, which may lack ``architectures``.

        Raises:
            ConfigError: the policy does not compute this model.
        """
        return cls.of(resolve_sizes(config))

    @property
    def expert_parameters(self) -> int:
        """Of all experts of all layers (the router is not among them); 0 of a dense model."""
        return self.layers * self.experts * 3 * self.hidden * self.expert_intermediate

    @property
    def layer_kv_parameters(self) -> int:
        """Of one layer's projections to keys and values."""
        return 2 * self.kv_heads * self.head_dim * (self.hidden + self.qkv_bias)

    @property
    def layer_parameters(self) -> int:
        """Of one layer without its experts."""
        queries_and_output = self.heads * self.head_dim * (2 * self.hidden + self.qkv_bias)
        attention = queries_and_output + self.layer_kv_parameters + 2 * self.head_dim * self.qk_norm
        feed_forward = self.hidden * self.experts if self.experts else 3 * self.hidden * self.intermediate
        biases = self.hidden * self.output_bias + (2 * self.intermediate + self.hidden) * self.mlp_bias
        return attention + feed_forward + biases + 2 * self.hidden

    @property
    def parameters(self) -> int:
        """Exactly what a decoder of a supported architecture has, experts included."""
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        return self.layers * self.layer_parameters + self.expert_parameters + self.hidden + embeddings

    @property
    def active_layer_parameters(self) -> int:
        """Weights that one token goes through, over all layers, without embedding and head: what its matrix products
        cost.
        """
        return self.layers * (
            self.layer_parameters + 3 * self.hidden * self.expert_intermediate * self.experts_per_token
        )

    def cached_bytes(self, tokens: float, width: int) -> float:
        """Keys and values of one sequence of ``tokens`` in all layers, at ``width`` bytes a number. Layers with a
        sliding window keep no more than that.
        """
        kept = (self.layers - self.window_layers) * tokens + self.window_layers * min(tokens, float(self.window))
        return 2.0 * kept * self.kv_heads * self.head_dim * width


@dataclass(frozen=True)
class Layout:
    """Ranks and how the model is cut over them. Experts are cut over EP x PP only, never over TP."""

    world: int
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    virtual: int = 1
    sequence_parallel: bool = False

    @classmethod
    def of(cls, policy: PolicyConfig, world: int) -> Layout:
        return cls(
            world=world,
            tensor=policy.tensor_parallel,
            pipeline=policy.pipeline_parallel,
            context=policy.context_parallel,
            expert=policy.expert_parallel,
            virtual=policy.virtual_pipeline or 1,
            sequence_parallel=policy.sequence_parallel,
        )

    @property
    def data(self) -> int:
        """Data-parallel ranks (at least 1, also where the ranks don't divide: :meth:`problems` says so)."""
        return max(1, self.world // (self.tensor * self.pipeline * self.context))

    @property
    def expert_data(self) -> int:
        """Ranks that hold the same experts."""
        return max(1, self.world // (self.pipeline * self.expert))

    @property
    def hidden_split(self) -> int:
        """Over how many ranks norms and residuals are cut."""
        return self.tensor if self.sequence_parallel else 1

    def problems(self, shape: ModelShape) -> list[str]:
        """Why this model can't be laid out this way; empty if it can."""
        found = []
        ranks = self.tensor * self.pipeline * self.context
        if self.world % ranks:
            found.append(f"{self.world} ranks are not a multiple of TP x PP x CP = {ranks}")
        if self.world % (self.pipeline * self.expert):
            found.append(f"{self.world} ranks are not a multiple of PP x EP = {self.pipeline * self.expert}")
        if shape.layers % (self.pipeline * self.virtual):
            keys = "pipeline_parallel" if self.virtual == 1 else "pipeline_parallel x policy.virtual_pipeline"
            found.append(
                f"{shape.layers} layers can't be cut into PP x VP = {self.pipeline * self.virtual} equal parts "
                f"(policy.{keys} has to divide num_hidden_layers)"
            )
        for what, count, key in (
            ("attention heads", shape.heads, "num_attention_heads"),
            ("key/value heads", shape.kv_heads, "num_key_value_heads"),
            ("feed-forward columns", self.tensor if shape.experts else shape.intermediate, "intermediate_size"),
        ):
            if count % self.tensor:
                found.append(
                    f"{count} {what} can't be split over TP = {self.tensor} (policy.tensor_parallel has to divide"
                    f" {key})"
                )
        if (shape.experts or 1) % self.expert:
            has_to = "divide num_experts" if shape.experts else "be 1 for a dense model"
            found.append(
                f"{shape.experts or 1} expert(s) can't be split over EP = {self.expert} (policy.expert_parallel has to"
                f" {has_to})"
            )
        if self.virtual > 1 and self.pipeline == 1:
            found.append("virtual pipeline stages (policy.virtual_pipeline) need PP > 1 (policy.pipeline_parallel)")
        if self.sequence_parallel and self.tensor == 1:
            found.append("sequence parallelism (policy.sequence_parallel) needs TP > 1 (policy.tensor_parallel)")
        if shape.experts and self.tensor > 1 and not self.sequence_parallel:
            found.append("a mixture of experts under TP > 1 needs sequence parallelism (policy.sequence_parallel=true)")
        return found

    def describe(self) -> str:
        words = f"TP {self.tensor} x PP {self.pipeline} x CP {self.context} x DP {self.data}"
        return (
            words
            + (f", EP {self.expert}" if self.expert > 1 else "")
            + (f", VP {self.virtual}" if self.virtual > 1 else "")
        )


@dataclass(frozen=True)
class RankParameters:
    """Parameters that one rank of a pipeline stage holds.

    Attributes:
        dense: all but the experts; their gradients and optimizer state go over DP x CP.
        expert: of its experts; theirs go over ``Layout.expert_data`` ranks.
        largest: of its largest single weight.
        adapters: of its adapters, where only they are trained; else None.
    """

    dense: int
    expert: int
    largest: int
    adapters: int | None = None

    @property
    def total(self) -> int:
        return self.dense + self.expert


def padded_vocab(shape: ModelShape, layout: Layout) -> int:
    """Vocabulary rows after padding to a multiple of TP."""
    return shape.vocab + -shape.vocab % layout.tensor


def adapter_parameters(shape: ModelShape, lora: LoraConfig) -> int:
    """Of the adapters of all layers: what a checkpoint of them holds."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sides = {
        "linear_qkv": shape.hidden + queries + 2 * keys,
        "linear_proj": queries + shape.hidden,
        "linear_fc1": shape.hidden + 2 * shape.intermediate,
        "linear_fc2": shape.intermediate + shape.hidden,
    }
    return shape.layers * lora.rank * sum(sides[name] for name in lora.targets)


def rank_parameters(shape: ModelShape, layout: Layout, stage: int, lora: LoraConfig | None = None) -> RankParameters:
    """Exactly what a rank of pipeline stage ``stage`` holds, as megatron builds it.

    Matrices and the biases of their columns are cut over TP. Norms, q/k norms, other biases and the router are on every
    rank of it. The embedding is on the first stage, the final norm and the head on the last. A tied head is the
    embedding on a pipeline of one, and a copy of it on the last stage of a longer one. Both factors of an adapter are
    cut over TP, those of all stages are alike.

    Raises:
        ConfigError: the model can't be cut this way, or has no place for the adapters.
    """
    if found := layout.problems(shape) + (lora_problems(lora, shape) if lora is not None else []):
        raise ConfigError("; ".join(found))
    tensor, hidden = layout.tensor, shape.hidden
    queries, groups = shape.heads * shape.head_dim // tensor, shape.kv_heads * shape.head_dim // tensor
    attention = (
        hidden * (2 * queries + 2 * groups)
        + (queries + 2 * groups) * shape.qkv_bias
        + 2 * shape.head_dim * shape.qk_norm
    )
    feed_forward = hidden * shape.experts if shape.experts else 3 * hidden * shape.intermediate // tensor
    layers = shape.layers // layout.pipeline
    biases = hidden * shape.output_bias + (2 * shape.intermediate // tensor + hidden) * shape.mlp_bias
    dense = layers * (attention + feed_forward + biases + 2 * hidden)
    expert = layers * (shape.experts // layout.expert) * 3 * hidden * shape.expert_intermediate
    rows = padded_vocab(shape, layout) // tensor * hidden
    first, last = stage == 0, stage == layout.pipeline - 1
    if first:
        dense += rows
    if last:
        dense += hidden + (0 if shape.tied and first else rows)
    first_linear = 2 * (shape.expert_intermediate if shape.experts else shape.intermediate // tensor)
    largest = max(
        hidden * first_linear, hidden * (queries + 2 * groups), hidden * shape.experts, rows if first or last else 0
    )
    adapters = adapter_parameters(shape, lora) // (layout.pipeline * tensor) if lora is not None and lora.rank else None
    return RankParameters(dense, expert, largest, adapters)


def rank_matrices(shape: ModelShape, layout: Layout, stage: int) -> list[int]:
    """Elements of each matrix that a rank of pipeline stage ``stage`` holds, as :func:`rank_parameters` counts them;
    norms and biases are left out.
    """
    tensor, hidden = layout.tensor, shape.hidden
    queries, groups = shape.heads * shape.head_dim // tensor, shape.kv_heads * shape.head_dim // tensor
    layer = [hidden * (queries + 2 * groups), queries * hidden]
    if shape.experts:
        own = [2 * hidden * shape.expert_intermediate, hidden * shape.expert_intermediate]
        layer += [hidden * shape.experts, *own * (shape.experts // layout.expert)]
    else:
        layer += [2 * hidden * (shape.intermediate // tensor), hidden * (shape.intermediate // tensor)]
    first, last = stage == 0, stage == layout.pipeline - 1
    ends = first + (last and not (shape.tied and first))
    return layer * (shape.layers // layout.pipeline) + [padded_vocab(shape, layout) // tensor * hidden] * ends


def share(count: int, ranks: int) -> int:
    """What the most loaded of ``ranks`` ranks holds of ``count`` elements, padding left out."""
    return -(-count // ranks)
