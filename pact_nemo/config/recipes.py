"""Recipes at scale: model, hardware, layout and precision, one small function each; the benchmark's own settings come
from ``conf/pact_*.yaml``.

A recipe's name says model, GPUs, hardware and precision. ``--recipe NAME`` lays it between the benchmark's file and the
command line. What is not said here is the paper's setting (table 5), the default of ``config/schema.py``. Every
layout fits its hardware by the plan (``--dry-run``); the tests hold it to that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pact_nemo.errors import ConfigError
from pact_nemo.policy.config import LoraConfig, PolicyConfig
from pact_nemo.serving.config import ALL_ENGINES

QWEN3 = {"model_type": "qwen3", "vocab_size": 151936, "max_position_embeddings": 40960}
QWEN2P5_72B = {"model_type": "qwen2", "vocab_size": 152064, "max_position_embeddings": 32768}
LLAMA3 = {"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 131072}
PAPER_LENGTH = 30000  # prompt 7,000 + response 23,000 tokens
# ten times those of all weights: a rule of thumb, not the paper's
ADAPTER_LR, ADAPTER_WARMUP_LR = 1e-5, 2e-4
LONGEST_REQUEST_S = 3600.0  # one turn may think for all of the response: 23,000 tokens, seven a second at the least


@dataclass(frozen=True)
class ServerShare:
    """The rollout engines of a recipe: on all GPUs of every node, in turn with trainer ranks.

    Attributes:
        tensor_parallel_size: GPUs that each is split over.
        max_model_len: prompt + response, tokens.
        max_num_seqs: sequences decoded together.
    """

    tensor_parallel_size: int
    max_model_len: int
    max_num_seqs: int


@dataclass(frozen=True)
class Recipe:
    """A run at scale.

    Attributes:
        name: model, GPUs, hardware, precision.
        model: Hugging Face name; the weights are a local folder, ``model.path``.
        shape: what its ``config.json`` says of its size (public facts), so that a plan needs no download.
        tool_format: the model's own way to write calls.
        nodes, gpus_per_node, gpu_gib: the hardware.
    """

    name: str
    model: str
    shape: dict[str, Any]
    tool_format: str
    nodes: int
    gpus_per_node: int
    gpu_gib: int
    policy: PolicyConfig
    server: ServerShare

    @property
    def world_size(self) -> int:
        """Trainer ranks, one per GPU."""
        return self.nodes * self.gpus_per_node

    def settings(self) -> dict[str, Any]:
        """As a settings file would say it."""
        rates = {"optimizer": {"lr": ADAPTER_LR}, "warmup": {"lr": ADAPTER_WARMUP_LR}}
        return (rates if self.policy.lora.rank else {}) | {
            "model": {"tool_format": self.tool_format},
            "rollout": {
                "server": {
                    **dataclasses.asdict(self.server),
                    "engines": ALL_ENGINES,
                    "dtype": "bfloat16",
                    "request_timeout_s": LONGEST_REQUEST_S,
                }
            },
            "policy": dataclasses.asdict(self.policy),
            "objective": {
                "entropy_coef": 0.001,
                "dual_clip": 3.0,
            },  # of the public scripts that the paper's runs build on
        }


def _shape(family: Mapping[str, Any], layers: int, hidden: int, heads: int, ffn: int, **more: Any) -> dict[str, Any]:
    """The fields of a ``config.json`` that the plan reads."""
    return {
        **family,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": ffn,
        "tie_word_embeddings": False,
        **more,
    }


def _bf16(**layout: Any) -> PolicyConfig:
    """bf16 with fp32 gradients and main weights, every layer recomputed, optimizer state sharded over the data-parallel
    ranks.
    """
    return PolicyConfig(
        precision="bf16",
        recompute="full",
        distributed_optimizer=True,
        overlap_grad_reduce=True,
        logprob_chunk=1024,
        **layout,
    )


def qwen3_0p6b_1xh100_bf16() -> Recipe:
    return Recipe(
        name="qwen3_0p6b_1xh100_bf16",
        model="Qwen/Qwen3-0.6B",
        shape=_shape(QWEN3, 28, 1024, 16, 3072, tie_word_embeddings=True),
        tool_format="hermes",
        nodes=1,
        gpus_per_node=1,
        gpu_gib=80,
        policy=_bf16(micro_batch_tokens=32768),
        server=ServerShare(tensor_parallel_size=1, max_model_len=PAPER_LENGTH, max_num_seqs=128),
    )


def qwen3_1p7b_4xh100_bf16() -> Recipe:
    """The paper's first run (table 5)."""
    return Recipe(
        name="qwen3_1p7b_4xh100_bf16",
        model="Qwen/Qwen3-1.7B",
        shape=_shape(QWEN3, 28, 2048, 16, 6144, tie_word_embeddings=True),
        tool_format="hermes",
        nodes=1,
        gpus_per_node=4,
        gpu_gib=80,
        policy=_bf16(micro_batch_tokens=32768),
        server=ServerShare(tensor_parallel_size=1, max_model_len=PAPER_LENGTH, max_num_seqs=128),
    )


def qwen3_4b_4xh100_bf16() -> Recipe:
    """The paper's second run (table 5)."""
    return Recipe(
        name="qwen3_4b_4xh100_bf16",
        model="Qwen/Qwen3-4B",
        shape=_shape(QWEN3, 36, 2560, 32, 9728, tie_word_embeddings=True),
        tool_format="hermes",
        nodes=1,
        gpus_per_node=4,
        gpu_gib=80,
        policy=_bf16(tensor_parallel=2, sequence_parallel=True, micro_batch_tokens=32768),
        server=ServerShare(tensor_parallel_size=1, max_model_len=PAPER_LENGTH, max_num_seqs=64),
    )


def qwen3_8b_8xh100_bf16() -> Recipe:
    return Recipe(
        name="qwen3_8b_8xh100_bf16",
        model="Qwen/Qwen3-8B",
        shape=_shape(QWEN3, 36, 4096, 32, 12288),
        tool_format="hermes",
        nodes=1,
        gpus_per_node=8,
        gpu_gib=80,
        policy=_bf16(tensor_parallel=4, sequence_parallel=True, micro_batch_tokens=32768),
        server=ServerShare(tensor_parallel_size=2, max_model_len=PAPER_LENGTH, max_num_seqs=256),
    )


def qwen3_14b_8xh100_bf16() -> Recipe:
    return Recipe(
        name="qwen3_14b_8xh100_bf16",
        model="Qwen/Qwen3-14B",
        shape=_shape(QWEN3, 40, 5120, 40, 17408),
        tool_format="hermes",
        nodes=1,
        gpus_per_node=8,
        gpu_gib=80,
        policy=_bf16(tensor_parallel=8, sequence_parallel=True, micro_batch_tokens=32768),
        server=ServerShare(tensor_parallel_size=4, max_model_len=PAPER_LENGTH, max_num_seqs=256),
    )


def qwen3_32b_16xh100_bf16() -> Recipe:
    return Recipe(
        name="qwen3_32b_16xh100_bf16",
        model="Qwen/Qwen3-32B",
        shape=_shape(QWEN3, 64, 5120, 64, 25600),
        tool_format="hermes",
        nodes=2,
        gpus_per_node=8,
        gpu_gib=80,
        policy=_bf16(tensor_parallel=8, pipeline_parallel=2, sequence_parallel=True, micro_batch_tokens=32768),
        server=ServerShare(tensor_parallel_size=8, max_model_len=PAPER_LENGTH, max_num_seqs=256),
    )


def qwen2p5_72b_64xh100_bf16() -> Recipe:
    return Recipe(
        name="qwen2p5_72b_64xh100_bf16",
        model="Qwen/Qwen2.5-72B-Instruct",
        shape=_shape(QWEN2P5_72B, 80, 8192, 64, 29568),
        tool_format="hermes",
        nodes=8,
        gpus_per_node=8,
        gpu_gib=80,
        policy=_bf16(
            tensor_parallel=4, pipeline_parallel=4, virtual_pipeline=4, sequence_parallel=True, micro_batch_tokens=32768
        ),
        server=ServerShare(tensor_parallel_size=8, max_model_len=PAPER_LENGTH, max_num_seqs=256),
    )


def llama3p1_70b_64xh100_bf16() -> Recipe:
    return Recipe(
        name="llama3p1_70b_64xh100_bf16",
        model="meta-llama/Llama-3.1-70B-Instruct",
        shape=_shape(LLAMA3, 80, 8192, 64, 28672),
        tool_format="llama3_json",
        nodes=8,
        gpus_per_node=8,
        gpu_gib=80,
        policy=_bf16(
            tensor_parallel=4, pipeline_parallel=4, virtual_pipeline=4, sequence_parallel=True, micro_batch_tokens=32768
        ),
        server=ServerShare(tensor_parallel_size=8, max_model_len=PAPER_LENGTH, max_num_seqs=256),
    )


def llama3p1_70b_64xh100_fp8() -> Recipe:
    """FP8 in the update and in the scoring that its ratios are taken against, first and last layer in bf16. Hopper has
    block scales.
    """
    return dataclasses.replace(
        llama3p1_70b_64xh100_bf16(),
        name="llama3p1_70b_64xh100_fp8",
        policy=dataclasses.replace(llama3p1_70b_64xh100_bf16().policy, fp8="blockwise", fp8_bf16_layers=1),
    )


def qwen3_30b_a3b_16xh100_bf16() -> Recipe:
    """A mixture of experts: 128, 8 a token. A pipeline stage a node, so that tokens travel to their experts within
    it.
    """
    return Recipe(
        name="qwen3_30b_a3b_16xh100_bf16",
        model="Qwen/Qwen3-30B-A3B",
        shape=_shape(
            QWEN3 | {"model_type": "qwen3_moe"},
            48,
            2048,
            32,
            6144,
            num_key_value_heads=4,
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
        ),
        tool_format="hermes",
        nodes=2,
        gpus_per_node=8,
        gpu_gib=80,
        policy=_bf16(
            tensor_parallel=4, pipeline_parallel=2, expert_parallel=8, sequence_parallel=True, micro_batch_tokens=32768
        ),
        server=ServerShare(tensor_parallel_size=4, max_model_len=PAPER_LENGTH, max_num_seqs=256),
    )


def _adapters(recipe: Recipe, name: str, *, gpus: int, **layout: Any) -> Recipe:
    """The same model on one node of ``gpus``, with adapters on every matrix instead of all weights."""
    policy = dataclasses.replace(_bf16(micro_batch_tokens=32768, **layout), lora=LoraConfig(rank=32, alpha=64.0))
    return dataclasses.replace(recipe, name=name, nodes=1, gpus_per_node=gpus, policy=policy)


def qwen3_4b_1xh100_lora() -> Recipe:
    return _adapters(qwen3_4b_4xh100_bf16(), "qwen3_4b_1xh100_lora", gpus=1)


def qwen3_32b_8xh100_lora() -> Recipe:
    base = qwen3_32b_16xh100_bf16()
    name = "qwen3_32b_8xh100_lora"
    return _adapters(base, name, gpus=8, tensor_parallel=8, sequence_parallel=True)


def llama3p1_70b_8xh100_lora_bf16() -> Recipe:
    base = llama3p1_70b_64xh100_bf16()
    name = "llama3p1_70b_8xh100_lora_bf16"
    return _adapters(base, name, gpus=8, tensor_parallel=8, sequence_parallel=True)


RECIPES: dict[str, Callable[[], Recipe]] = {
    function.__name__: function
    for function in (
        qwen3_0p6b_1xh100_bf16,
        qwen3_1p7b_4xh100_bf16,
        qwen3_4b_4xh100_bf16,
        qwen3_8b_8xh100_bf16,
        qwen3_14b_8xh100_bf16,
        qwen3_32b_16xh100_bf16,
        qwen3_30b_a3b_16xh100_bf16,
        qwen2p5_72b_64xh100_bf16,
        llama3p1_70b_64xh100_bf16,
        llama3p1_70b_64xh100_fp8,
        qwen3_4b_1xh100_lora,
        qwen3_32b_8xh100_lora,
        llama3p1_70b_8xh100_lora_bf16,
    )
}


def recipe(name: str) -> Recipe:
    """Raises ConfigError for a name that isn't one."""
    if name not in RECIPES:
        raise ConfigError(f"no recipe {name!r}; known: {', '.join(RECIPES)}")
    return RECIPES[name]()
