"""``--dry-run``: what a run would do and roughly need, from the config and the model's ``config.json`` alone. Starts nothing, loads no weights."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pact_nemo.checkpoints.embedded import EMBEDDED_CONFIG
from pact_nemo.errors import ConfigError
from pact_nemo.training.config import Config
from pact_nemo.training.recipes import recipe

GIB = 1024**3
LIBRARIES_GIB = 0.5  # resident after all imports, before the model is built (measured on Linux with the CPU build of torch)


@dataclass(frozen=True)
class ModelShape:
    """Sizes that memory depends on, named as in Hugging Face configs."""

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
    qk_norm: bool = False
    experts: int = 0
    expert_intermediate: int = 0

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> ModelShape:
        heads = int(config["num_attention_heads"])
        hidden = int(config["hidden_size"])
        return cls(
            layers=int(config["num_hidden_layers"]),
            hidden=hidden,
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            intermediate=int(config["intermediate_size"]),
            vocab=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", False)),
            positions=int(config["max_position_embeddings"]),
            qkv_bias=config.get("model_type") == "qwen2",
            qk_norm=str(config.get("model_type")).startswith("qwen3"),
            experts=int(config.get("num_experts") or 0),
            expert_intermediate=int(config.get("moe_intermediate_size") or 0),
        )

    @property
    def expert_parameters(self) -> int:
        """Of all experts of all layers (the router is not among them); 0 of a dense model."""
        return self.layers * self.experts * 3 * self.hidden * self.expert_intermediate

    @property
    def parameters(self) -> int:
        """Exactly what a Llama, Qwen2, Qwen3 or Qwen3-MoE decoder has, experts included."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        attention += self.head_dim * (self.heads + 2 * self.kv_heads) * self.qkv_bias + 2 * self.head_dim * self.qk_norm
        feed_forward = self.hidden * self.experts if self.experts else 3 * self.hidden * self.intermediate
        layer = attention + feed_forward + 2 * self.hidden
        return self.layers * layer + self.expert_parameters + self.hidden + self.vocab * self.hidden * (1 if self.tied else 2)


def model_shape(config: Config) -> ModelShape:
    """Of the weights in ``model.path``; without one, of the recipe's model, or of the embedded one.

    Raises ConfigError when ``model.path`` holds no readable ``config.json``."""
    if config.model.path is None and config.model.recipe is not None:
        return ModelShape.from_hf(recipe(config.model.recipe).shape)
    if config.model.path is None:
        return ModelShape.from_hf(EMBEDDED_CONFIG)
    path = Path(config.model.path) / "config.json"
    try:
        return ModelShape.from_hf(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{path}: not a readable Hugging Face decoder config ({type(error).__name__}: {error})") from error


def memory_by_part(config: Config, shape: ModelShape, world_size: int) -> dict[str, float]:
    """GiB per trainer process, by part.

    Weights, gradients and optimizer are exact counts; activations are the usual estimate of bytes per token and layer (all kept: about
    34 hidden + attention score rows are never stored by SDPA; full recompute: the layer inputs plus one layer) and within tens of percent.
    """
    policy = config.policy
    split = policy.tensor_parallel * policy.pipeline_parallel
    data = max(1, world_size // (split * policy.context_parallel))
    # experts are split over PP x EP, the rest over TP x PP; each part's optimizer over its own data-parallel ranks
    expert = shape.expert_parameters / (policy.pipeline_parallel * policy.expert_parallel)
    dense = (shape.parameters - shape.expert_parameters) / split
    shard = dense + expert
    expert_data = max(1, world_size // (policy.pipeline_parallel * policy.expert_parallel))
    fp32 = policy.precision == "fp32"
    width = 4 if fp32 else 2
    sharded = policy.distributed_optimizer
    optimizer = (8 if fp32 else 12) * (dense / (data * policy.context_parallel if sharded else 1) + expert / (expert_data if sharded else 1))
    layers = shape.layers / policy.pipeline_parallel
    tokens = policy.micro_batch_tokens / policy.context_parallel
    per_token = width * (10 * shape.hidden + 3 * shape.intermediate + (shape.heads + 2 * shape.kv_heads) * shape.head_dim) / policy.tensor_parallel
    layer_input = width * shape.hidden / (policy.tensor_parallel if policy.sequence_parallel else 1)
    kept = tokens * (per_token * layers if policy.recompute != "full" else per_token + layer_input * layers)
    in_flight = min(policy.pipeline_parallel, 4)
    return {
        "weights": width * shard / GIB,
        "gradients (fp32)": 4 * shard / GIB,
        "optimizer": optimizer / GIB,
        "reference weights (host)": (width * shard / GIB) if config.objective.kl_coef > 0 else 0.0,
        "activations (estimate)": kept * in_flight / GIB,
        "checkpoint copies (at a save)": (width + 4) * shard / GIB,
        "Python and libraries": LIBRARIES_GIB,
        "log-prob chunk": 3 * 4 * policy.logprob_chunk * shape.vocab / policy.tensor_parallel / GIB,
    }


def _tasks(config: Config) -> str:
    tasks = config.tasks
    if tasks.benchmark == "bfcl":
        return f"BFCL {', '.join(tasks.categories)}; window {tasks.window}; {tasks.held_out} scenario groups held out"
    scenario = f", scenario {tasks.scenario}" if tasks.benchmark == "toolhop" else ""
    return f"{tasks.benchmark} of {tasks.path}{scenario}; held out: {tasks.eval_path or f'{tasks.held_out} tasks'}"


def describe_plan(config: Config) -> str:
    """The plan as text."""
    shape = model_shape(config)
    policy, trainer = config.policy, config.trainer
    scale = recipe(config.model.recipe) if config.model.recipe is not None else None
    world = int(os.environ.get("WORLD_SIZE", scale.world_size if scale is not None else 1))
    parts = memory_by_part(config, shape, world)
    split = policy.tensor_parallel * policy.pipeline_parallel * policy.context_parallel
    episodes = trainer.batch_size * config.objective.group_size
    name = config.model.path or (scale.model if scale is not None else "embedded SmolLM2-135M-Instruct")
    lines = [
        "plan",
        f"  model      {name}: {shape.parameters / 1e6:,.0f} M parameters, "
        f"vocabulary {shape.vocab:,}",
        f"  layout     {world} process(es): TP {policy.tensor_parallel} x PP {policy.pipeline_parallel} x CP {policy.context_parallel} "
        f"x DP {world // split if world % split == 0 else '?'}, precision {policy.precision}",
        f"  tasks      {_tasks(config)}",
    ]
    if config.warmup.steps:
        lines.append(f"  warm-up    {config.warmup.steps} SFT steps of {config.warmup.batch_size} traces")
    lines += [
        f"  training   method {config.objective.method}: {trainer.steps} steps x {trainer.batch_size} prompts x {config.objective.group_size} "
        "rollouts "
        f"= {trainer.steps * episodes:,} episodes, {trainer.steps * (trainer.batch_size // trainer.mini_batch_size)} optimizer updates",
        "  evaluation " + ", ".join(name for name, on in (("before", config.evaluation.before), ("after", config.evaluation.after)) if on),
        "memory per trainer process",
    ]
    lines += [f"  {name:<30}{value:8.2f} GiB" for name, value in parts.items()]
    lines.append(f"  {'sum':<30}{sum(parts.values()):8.2f} GiB")
    if scale is not None:
        lines.append(f"  {'hardware':<30}{scale.nodes} node(s) x {scale.gpus_per_node} GPU(s) of {scale.gpu_gib} GB")
    server = 2 if config.rollout.server.dtype in ("bfloat16", "float16", "auto") else 4
    processes = config.rollout.server.tensor_parallel_size
    lines.append(f"memory of the rollout server  {server * shape.parameters / GIB:.2f} GiB weights over {processes} process(es) + its KV cache")
    if world % split:
        lines.append(f"note: {world} process(es) can't hold TP x PP x CP = {split}; start with torchrun --nproc-per-node={split} (or a multiple)")
    return "\n".join(lines)
