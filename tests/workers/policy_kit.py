"""Tiny models, random token trees and launching, shared by the policy tests and their torchrun worker."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from pact_nemo.checkpoints.embedded import materialise_embedded_model
from pact_nemo.policy.trees import Segment, TokenTree

REPO = Path(__file__).resolve().parents[2]
VOCAB = 131  # odd, so that tensor parallelism has to pad it
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 64,
}


def _config_of(family: str, layers: int, vocabulary: int, heads: int) -> Any:
    """transformers' configuration of a tiny model."""
    from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

    common: dict[str, Any] = dict(
        vocab_size=vocabulary,
        hidden_size=64,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(heads // 2, 2),
        intermediate_size=96,
        max_position_embeddings=8192,
    )
    configs: dict[str, Callable[[], Any]] = {
        "llama": lambda: LlamaConfig(
            **common, tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 777.0}
        ),
        "llama3": lambda: LlamaConfig(**common, tie_word_embeddings=False, rope_parameters=LLAMA3_ROPE),
        "qwen2": lambda: Qwen2Config(**common, tie_word_embeddings=True),
        "qwen3": lambda: Qwen3Config(**common, tie_word_embeddings=False, head_dim=16),
        "qwen3_moe": lambda: Qwen3MoeConfig(
            **common,
            tie_word_embeddings=False,
            head_dim=16,
            moe_intermediate_size=48,
            num_experts=4,
            num_experts_per_tok=2,
            norm_topk_prob=True,
        ),
        "mistral": lambda: MistralConfig(**common, sliding_window=9),
        "llama_biases": lambda: LlamaConfig(**common, tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
        "qwen3_window": lambda: Qwen3Config(
            **common,
            head_dim=16,
            attention_bias=True,
            use_sliding_window=True,
            sliding_window=7,
            max_window_layers=layers // 2,
        ),
        "qwen3_moe_window": lambda: Qwen3MoeConfig(
            **common,
            head_dim=16,
            moe_intermediate_size=48,
            num_experts=4,
            num_experts_per_tok=2,
            norm_topk_prob=False,
            attention_bias=True,
            use_sliding_window=True,
            sliding_window=7,
        ),
    }
    return configs[family]()


def make_model(
    folder: Path, family: str, *, seed: int = 0, layers: int = 4, vocabulary: int = VOCAB, heads: int = 8
) -> Path:
    """Write a tiny random Hugging Face model: ``llama`` (tied), ``llama3`` (untied, scaled RoPE), ``llama_biases`` (of
    attention and MLP), ``mistral`` (windows), ``qwen2`` (biases), ``qwen3`` (q/k norms), ``qwen3_window`` (attention
    biases, windows in the upper half), ``qwen3_moe`` (4 experts, 2 a token), ``qwen3_moe_window`` (attention biases,
    windows, routing weights that don't sum to one).
    """
    from transformers import AutoModelForCausalLM

    config = _config_of(family, layers, vocabulary, heads)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for name, param in model.named_parameters():
            # far from initialisation: biases and norms matter, and the distributions aren't flat
            param.add_(torch.randn_like(param) * (0.1 if "norm" in name or "bias" in name else 0.08))
    model.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}\n')
    (folder / "tokenizer.json").write_text(
        '{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}\n'
    )
    (folder / "chat_template.jinja").write_text("{{ messages }}\n")
    return folder


def make_trees(count: int, *, seed: int = 0, scale: int = 1) -> list[TokenTree]:
    """Random trees of the training step's shape, x -> {tau_k, h -> b -> tau_k}, with branches inside a tau, and plain
    sequences.

    Stream ``weight`` is [S] float32.
    """
    draw = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return [draw.randrange(VOCAB) for _ in range(draw.randint(low, high) * scale)]

    trees = []
    for index in range(count):
        root = tokens(5, 12)
        segments = [Segment(root, -1, [False] + [draw.random() < 0.2 for _ in root[1:]])]
        if index % 4 == 3:
            pass  # a plain sequence
        else:
            taus = [tokens(1, 9) for _ in range(draw.randint(1, 4))]
            for tau in taus:
                segments.append(Segment(tau, 0, [draw.random() < 0.8 for _ in tau]))
            hint = tokens(3, 8)
            segments.append(Segment(hint, 0, [draw.random() < 0.5 for _ in hint]))
            middle = tokens(2, 3)
            segments.append(Segment(middle, len(segments) - 1, [False] * len(middle)))
            parent = len(segments) - 1
            for tau in taus:
                segments.append(Segment(tau, parent, [draw.random() < 0.8 for _ in tau]))
            if (
                index % 4 == 2
            ):  # a response whose later turns no longer see its earlier thoughts: contexts that part inside it
                later = random.Random(f"{seed}:{index}")
                for parent in (1, len(segments) - 1, len(segments)):
                    tail = [later.randrange(VOCAB) for _ in range(later.randint(2, 6) * scale)]
                    segments.append(Segment(tail, parent, [later.random() < 0.5 for _ in tail]))
        tree = TokenTree(segments)
        if tree.num_scored == 0:
            tree = TokenTree([Segment(root, -1, [False] * (len(root) - 1) + [True]), *segments[1:]])
        tree.streams = {"weight": torch.tensor([draw.uniform(-1.0, 1.0) for _ in range(tree.num_scored)])}
        trees.append(tree)
    total = sum(tree.num_scored for tree in trees)
    for tree in trees:
        tree.streams["weight"] /= total
    return trees


def loss_fn(logprob: torch.Tensor, streams: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Additive and non-linear in the log-probs: sum of w (2 l + l^2 / 4)."""
    loss = (streams["weight"] * (2.0 * logprob + 0.25 * logprob**2)).sum()
    return loss, {
        "count": torch.tensor(float(logprob.shape[0])),
        "max/logprob": logprob.max(),
        "squares": (logprob**2).sum(),
    }


def launch(ranks: int, jobs: list[dict[str, Any]], folder: Path, *, timeout: int = 300) -> dict[str, Any]:
    """Run ``policy_worker.py`` under torchrun and return its results by job name."""
    folder.mkdir(parents=True, exist_ok=True)
    spec, out = folder / f"jobs{ranks}.json", folder / f"results{ranks}.json"
    spec.write_text(json.dumps({"jobs": jobs, "out": str(out)}))
    out.unlink(missing_ok=True)
    worker = str(Path(__file__).with_name("policy_worker.py"))
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*run, worker, str(spec)], capture_output=True, text=True, timeout=timeout, env=environment, cwd=REPO
    )
    assert done.returncode == 0 and out.is_file(), (
        f"worker failed ({done.returncode}):\n{done.stdout[-2000:]}\n{_trace(done.stderr)}"
    )
    results: dict[str, Any] = json.loads(out.read_text())
    return results


def _trace(text: str) -> str:
    """The first traceback of a worker, without torchrun's summary."""
    lines = text.splitlines()
    ranks = [line.partition("]:")[0] for line in lines if "]: Traceback" in line]
    return "\n".join(line for line in lines if not ranks or line.startswith(ranks[0] + "]:"))[-6000:]


def make_chat_model(folder: Path) -> Path:
    """A tiny random model with the embedded model's tokenizer and chat template."""
    embedded = materialise_embedded_model(REPO / ".cache" / "pact_nemo")
    model = make_model(folder, "llama", layers=2, vocabulary=49152, heads=2)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (model / name).write_bytes((embedded / name).read_bytes())
    return model


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder's safetensors files."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}
