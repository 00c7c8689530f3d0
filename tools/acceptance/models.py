"""Random models and PACT steps of a recipe's size, made on the device itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch

from pact_nemo.batches.prompt_groups import PromptGroup
from pact_nemo.checkout import ROOT
from pact_nemo.config.load import load_config
from pact_nemo.config.recipes import recipe
from pact_nemo.config.schema import Config
from pact_nemo.planning.findings import version_of
from pact_nemo.planning.workload import Lengths
from tools.acceptance.kit import Settings
from tools.benches.kit import synthetic_groups

RECIPE = "qwen3_1p7b_4xh100_bf16"  #: the model of the paper's first run; one GPU holds it
SMALL_SHAPE = {
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 256,
    "vocab_size": 1000,
}
LENGTHS = Lengths(prompt=4200, response=1600, trace=2800, policy_share=0.6)  #: a tree of 32,600 tokens at K = 8
SMALL_LENGTHS = Lengths(prompt=42, response=16, trace=28, policy_share=0.6)
PROMPTS = 4


def random_model(settings: Settings, *, layers: int | None = None) -> Path:
    """A random model of :data:`RECIPE`'s shape, or of fewer layers, as a Hugging Face folder, made once."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = settings.folder / ("model" if layers is None else f"model_{layers}")
    if (folder / "config.json").is_file():
        return folder
    shape = {**recipe(RECIPE).shape, **(SMALL_SHAPE if settings.small else {})}
    shape["num_hidden_layers"] = layers or shape["num_hidden_layers"]
    config = AutoConfig.for_model(**shape)
    config.dtype = torch.bfloat16
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                # away from initialisation: distributions that aren't flat
                weight.add_(torch.randn_like(weight) * (0.1 if "norm" in name else 0.02))
    model.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}\n')
    (folder / "tokenizer.json").write_text(
        '{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}\n'
    )
    return folder


def step_config(settings: Settings, *words: str) -> Config:
    """PACT as :data:`RECIPE` runs it, in one update of :data:`PROMPTS` prompts and the reference's KL term."""
    chosen = recipe(RECIPE)
    config = load_config(
        [ROOT / "conf" / "pact_bfcl.yaml", chosen],
        [f"model.path={random_model(settings)}", "objective.kl_coef=0.01", "rollout.importance=off", *words],
    )
    config = replace(config, trainer=replace(config.trainer, batch_size=PROMPTS, mini_batch_size=PROMPTS))
    if settings.small:
        precision = "bf16" if torch.cuda.is_available() else "fp32"
        config = replace(config, policy=replace(config.policy, micro_batch_tokens=512, precision=precision))
    return config


def lengths(settings: Settings) -> Lengths:
    return SMALL_LENGTHS if settings.small else LENGTHS


def step_groups(config: Config, settings: Settings, prompts: int = PROMPTS) -> list[PromptGroup]:
    """The prompt groups of one step: real structure, random tokens and rewards."""
    vocabulary = int(json.loads((Path(str(config.model.path)) / "config.json").read_text())["vocab_size"])
    return synthetic_groups(config, lengths(settings), prompts, vocabulary=vocabulary)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def memory_gib() -> dict[str, float]:
    """What torch's allocator holds and held at most, GiB; empty without a GPU."""
    if not torch.cuda.is_available():
        return {}
    names = {"now": torch.cuda.memory_allocated, "peak": torch.cuda.max_memory_allocated}
    names["reserved"] = torch.cuda.max_memory_reserved
    return {name: read() / 2**30 for name, read in names.items()}


def free_gib() -> float | None:
    """What the GPU has free, GiB; None without one."""
    return torch.cuda.mem_get_info()[0] / 2**30 if torch.cuda.is_available() else None


def forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def difference(found: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    """Mean and largest absolute difference, and the share of equal bits."""
    gap = (found.double() - expected.double()).abs()
    return {"mean": gap.mean().item(), "max": gap.max().item(), "equal": (found == expected).double().mean().item()}


def rows(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([part.detach().float().cpu() for part in parts])


def versions() -> dict[str, str | None]:
    names = ("torch", "megatron-core", "megatron-bridge", "transformers", "transformer-engine", "vllm", "triton")
    return {name: version_of(name) for name in names}
