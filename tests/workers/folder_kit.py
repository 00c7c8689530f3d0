"""Model folders with other weights, keys and files, and what the policy and transformers compute with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pact_nemo.policy.config import OptimizerConfig, PolicyConfig
from pact_nemo.policy.policy import MegatronPolicy
from pact_nemo.policy.trees import Segment, TokenTree
from pact_nemo.runtime.tensor_files import INDEX_NAME
from tests.workers.policy_kit import VOCAB, make_model

IDS = torch.randint(0, VOCAB, (48,), generator=torch.Generator().manual_seed(3)).tolist()
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = make_model(tmp_path_factory.mktemp(family), family, layers=2)
        return made[family]

    return get


def build(path: Path) -> MegatronPolicy:
    settings = PolicyConfig(precision="fp32", micro_batch_tokens=96, logprob_chunk=16)
    return MegatronPolicy(settings, OptimizerConfig(lr=1e-3), path, seed=1, total_steps=1, trainable=False)


def ours(path: Path) -> torch.Tensor:
    """Log-probs of :data:`IDS`, [47] float32, by the policy."""
    return build(path).logprobs([TokenTree([Segment(IDS, -1, [False] + [True] * (len(IDS) - 1))])])[0]


def theirs(path: Path, **settings: Any) -> torch.Tensor:
    """The same by transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", **settings
    ).eval()
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0, :-1].log_softmax(-1).gather(1, torch.tensor(IDS[1:])[:, None])[:, 0]


def copy(source: Path, target: Path, weights: Weights | None = None, **config: Any) -> Path:
    """A copy of a folder with other weights and keys of ``config.json``."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"), dirs_exist_ok=True)
    if config:
        row = json.loads((target / "config.json").read_text()) | config
        (target / "config.json").write_text(json.dumps({key: value for key, value in row.items() if value is not ...}))
    if weights is not None:
        save_file(
            {name: tensor.contiguous() for name, tensor in weights.items()},
            target / "model.safetensors",
            metadata={"format": "pt"},
        )
    return target


def shard(source: Path, target: Path, *, files: int = 3) -> Path:
    """The same weights dealt out to several files with an index, scales away from their weights."""
    weights = load_file(source / "model.safetensors")
    return write_shards(weights, copy(source, target), files=files)


def write_shards(weights: Weights, target: Path, *, files: int = 3) -> Path:
    index: dict[str, str] = {}
    for number in range(files):
        name = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        part = {key: weights[key].contiguous() for key in list(weights)[number::files]}
        save_file(part, target / name)
        index |= dict.fromkeys(part, name)
    (target / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return target


def drop(weights: Weights, name: str) -> Weights:
    return {key: tensor for key, tensor in weights.items() if key != name}
