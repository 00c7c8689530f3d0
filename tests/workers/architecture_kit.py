"""Tiny models of every supported architecture, with and without their options: as Hugging Face folders, as transformers
computes them and as the policy does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pact_nemo.policy.config import OptimizerConfig, PolicyConfig
from pact_nemo.policy.families import MODEL_TYPES
from pact_nemo.policy.policy import MegatronPolicy
from tests.workers.policy_kit import VOCAB

SIZES: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=512,
)
EXPERTS: dict[str, Any] = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
WINDOW: dict[str, Any] = dict(use_sliding_window=True, sliding_window=8)
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama, biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama, MLP biases, tied": {"model_type": "llama", "mlp_bias": True, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral, window": {"model_type": "mistral", "sliding_window": 8},
    "qwen2": {"model_type": "qwen2"},
    "qwen2, window": {"model_type": "qwen2", "max_window_layers": 1, **WINDOW},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "qwen3, biases, window": {
        "model_type": "qwen3",
        "head_dim": 16,
        "attention_bias": True,
        "max_window_layers": 2,
        **WINDOW,
    },
    "qwen3_moe": {"model_type": "qwen3_moe", "head_dim": 16, "norm_topk_prob": True, **EXPERTS},
    "qwen3_moe, biases, window": {"model_type": "qwen3_moe", "attention_bias": True, **EXPERTS, **WINDOW},
}


@pytest.fixture(autouse=True)
def few_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config_of(name: str) -> dict[str, Any]:
    config = {**SIZES, **MODELS[name]}
    return {"architectures": [MODEL_TYPES[config["model_type"]].architecture], **config}


def write_model(folder: Path, config: dict[str, Any]) -> None:
    """A random model of ``config`` as transformers reads it, beside ``config`` itself."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))


def wanted(folder: Path, ids: list[int]) -> torch.Tensor:
    """[len(ids) - 1] log-probs by transformers."""
    plain: dict[str, Any] = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **plain).eval()
    with torch.no_grad():
        logprobs = model(torch.tensor([ids]), return_dict=True).logits[0].log_softmax(-1)
    return logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def build(folder: Path, **settings: Any) -> MegatronPolicy:
    config = PolicyConfig(**{"precision": "fp32", "micro_batch_tokens": 96, "logprob_chunk": 64, **settings})
    return MegatronPolicy(config, OptimizerConfig(lr=1e-3), folder, seed=1, total_steps=4, trainable=False)
