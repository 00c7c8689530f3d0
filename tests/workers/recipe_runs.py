"""Whole runs of the real recipe on a tiny model, as a user starts them, and what they leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from pact_nemo.config.load import load_config
from tests.workers.policy_kit import make_chat_model
from tests.workers.scripted import write_replay

REPO = Path(__file__).resolve().parents[2]
STEPS = 2


def make_stage(folder: Path) -> dict[str, Any]:
    """A tiny random model with the embedded model's tokenizer, the shipped CPU preset made small, and dumped rollouts
    of it.
    """
    model = make_chat_model(folder / "model")
    words = [
        f"model.path={model}",
        f"run.root={folder / 'runs'}",
        f"trainer.replay={folder / 'replay'}",
        f"trainer.steps={STEPS}",
        f"objective.schedule.horizon={STEPS}",
        "trainer.batch_size=4",
        "trainer.mini_batch_size=2",
        "trainer.checkpoint_every=1",
        "objective.kl_coef=0.01",
        "rollout.importance=tis",
        "warmup.steps=1",
        "warmup.batch_size=2",
        "optimizer.lr=1e-3",
        "tasks.max_eval=2",
        "tasks.max_train=12",
    ]
    preset = REPO / "conf" / "pact_bfcl-smollm2_135m-cpu.yaml"
    write_replay(load_config(preset, words), model, folder / "replay", STEPS)
    return {"folder": folder, "words": words, "preset": str(preset)}


def recipe(stage: dict[str, Any], name: str, *words: str, ranks: int = 1, resume: Path | None = None) -> Path:
    """Run the recipe as a user does, with ``ranks`` processes; returns its run folder."""
    source = (
        ["--config", stage["preset"], *stage["words"], f"run.name={name}"]
        if resume is None
        else ["--resume", str(resume)]
    )
    several = [f"run.ranks={ranks}"] if ranks > 1 else []
    command = [sys.executable, str(REPO / "recipes" / "pact_bfcl.py"), *source, *several, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=REPO, env=environment)
    assert done.returncode == 0, f"{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    return resume or stage["folder"] / "runs" / f"{name}-pact-seed1234-1"


def records(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in r.items() if not k.startswith("time/") and k != "rollout/tokens_per_second"} for r in lines
    ]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "hf" / "model.safetensors")
