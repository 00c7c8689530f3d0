"""Checkpoints of other tools as ``model.path``: each is named, with what makes a Hugging Face folder of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from pact_nemo.config.recipes import qwen3_4b_4xh100_bf16
from pact_nemo.errors import ConfigError
from pact_nemo.policy.hf_config import read_config


def made(root: Path, files: list[str]) -> None:
    for name in files:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


@pytest.mark.parametrize(
    ("model", "files", "said"),
    [
        ("nemo2", ["context/io.json", "weights/common.pt"], "NeMo 2 checkpoint.*llm.export_ckpt"),
        ("old.nemo", [""], "NeMo 1 archive"),
        ("run", ["iter_0000002/run_config.yaml", "iter_0000010/run_config.yaml"], "Megatron-Bridge.*iter_0000010"),
        ("run/iter_0000002", ["run_config.yaml"], "Megatron-Bridge checkpoint.*export_ckpt"),
        ("lm", ["latest_checkpointed_iteration.txt", "iter_0000002/common.pt"], "Megatron-LM checkpoint"),
        ("meta", ["params.json", "consolidated.00.pth"], "as Meta or Mistral publish them"),
        ("small.gguf", [""], "GGUF"),
        ("folder", ["model-Q4.gguf"], "GGUF"),
        ("other", ["pytorch_model.bin"], "must be a local Hugging Face folder"),
        ("absent", [], "must be a local Hugging Face folder"),
    ],
)
def test_another_checkpoint_is_named_with_its_converter(
    model: str, files: list[str], said: str, tmp_path: Path
) -> None:
    made(tmp_path / model, files)
    with pytest.raises(ConfigError, match=f"(?s){said}"):
        read_config(tmp_path / model)


def test_the_bridge_has_the_call_that_is_named() -> None:
    from pact_nemo.policy.megatron_import import prepare_megatron

    prepare_megatron()
    from megatron.bridge import AutoBridge

    assert callable(AutoBridge.from_hf_pretrained) and callable(AutoBridge.export_ckpt)


def test_the_page_s_recipe_in_python_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).resolve().parents[1]
    page = (root / "docs" / "cluster" / "coming-from-nemo.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(root)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["config"].policy.tensor_parallel == qwen3_4b_4xh100_bf16().policy.tensor_parallel
    assert (names["config"].policy.micro_batch_tokens, names["config"].trainer.steps) == (16384, 10)
