"""Parameters per rank, exactly: against Megatron models of every recipe, built rank by rank on the meta device up to
72B.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pact_nemo.config.recipes import RECIPES, recipe
from pact_nemo.errors import ConfigError
from pact_nemo.planning.shape import Layout, ModelShape, padded_vocab, rank_parameters
from pact_nemo.policy.families import MODEL_TYPES

REPO = Path(__file__).resolve().parents[1]
TINY = {
    "model_type": "qwen3",
    "num_hidden_layers": 8,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": 131,
    "tie_word_embeddings": True,
    "max_position_embeddings": 512,
}
# layouts that no recipe has: tied embeddings on two stages, interleaved stages, a padded vocabulary, biases, experts of
# every cut
MORE: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "tied, PP 4": (TINY, {"pipeline_parallel": 4}, 8),
    "tied, TP 4 x PP 2 x VP 2, odd vocabulary": (
        TINY,
        {"tensor_parallel": 4, "pipeline_parallel": 2, "virtual_pipeline": 2},
        8,
    ),
    "biases, TP 2 x CP 2": (
        TINY | {"model_type": "qwen2", "tie_word_embeddings": False},
        {"tensor_parallel": 2, "context_parallel": 2},
        4,
    ),
    "all biases, TP 4 x PP 2": (
        TINY | {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
        {"tensor_parallel": 4, "pipeline_parallel": 2},
        8,
    ),
    "attention biases, TP 2": (TINY | {"attention_bias": True}, {"tensor_parallel": 2}, 2),
    "windows": (TINY | {"model_type": "mistral", "sliding_window": 64}, {}, 1),
    "experts, TP 2 x PP 2 x EP 4": (
        TINY
        | {
            "model_type": "qwen3_moe",
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "norm_topk_prob": True,
        },
        {"tensor_parallel": 2, "sequence_parallel": True, "pipeline_parallel": 2, "expert_parallel": 4},
        8,
    ),
}


def cases() -> dict[str, tuple[dict[str, Any], dict[str, Any], int]]:
    found = {
        name: (recipe(name).shape, dataclasses.asdict(recipe(name).policy), recipe(name).world_size) for name in RECIPES
    }
    return found | MORE


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, int]]]:
    """What megatron builds, one rank per pipeline stage."""
    jobs = []
    for shape, settings, world in cases().values():
        folder = tmp_path_factory.mktemp("model")
        names = [MODEL_TYPES[shape["model_type"]].architecture]
        (folder / "config.json").write_text(json.dumps({"architectures": names, **shape}))
        stages = settings.get("pipeline_parallel", 1)
        jobs.append(
            {
                "folder": str(folder),
                "settings": settings,
                "world": world,
                "ranks": [s * world // stages for s in range(stages)],
            }
        )
    command = [sys.executable, str(REPO / "tests" / "workers" / "meta_worker.py"), json.dumps(jobs)]
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(cases(), json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("name", cases())
def test_every_stage_holds_exactly_the_planned_parameters(name: str, built: dict[str, list[dict[str, int]]]) -> None:
    from pact_nemo.policy.config import PolicyConfig

    raw, settings, world = cases()[name]
    shape, layout = ModelShape.from_hf(raw), Layout.of(PolicyConfig(**settings), world)
    assert [found["stage"] for found in built[name]] == list(range(layout.pipeline))
    for found in built[name]:
        planned = rank_parameters(shape, layout, found["stage"])
        assert (planned.total, planned.expert, planned.largest) == (
            found["total"],
            found["expert"],
            found["largest"],
        ), found["stage"]


def test_one_rank_holds_the_whole_model() -> None:
    for name in RECIPES:
        shape = ModelShape.from_hf(recipe(name).shape)
        assert rank_parameters(shape, Layout(1), 0).total == shape.parameters


def test_a_cut_that_can_not_be_made_says_why() -> None:
    shape = ModelShape.from_hf(TINY)
    assert padded_vocab(shape, Layout(4, tensor=4)) == 132
    with pytest.raises(ConfigError, match="4 key/value heads can't be split over TP = 8"):
        rank_parameters(shape, Layout(8, tensor=8), 0)
    assert Layout(6, tensor=4).problems(shape) == ["6 ranks are not a multiple of TP x PP x CP = 4"]
    (layers,) = Layout(3, pipeline=3).problems(shape)
    assert "8 layers can't be cut into PP x VP = 3 equal parts" in layers and "policy.pipeline_parallel" in layers
    (experts,) = Layout(2, expert=2).problems(shape)
    assert "1 expert(s) can't be split over EP = 2" in experts and "policy.expert_parallel" in experts
