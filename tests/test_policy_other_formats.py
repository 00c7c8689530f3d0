"""Checkpoints of other tools as ``model.path``: each is named, with what makes a Hugging Face folder of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from pact_nemo.config.recipes import qwen3_4b_4xh100_bf16
from pact_nemo.errors import ConfigError
from pact_nemo.policy.hf_config import read_config
from pact_nemo.policy.model_source import model_source


def made(root: Path, files: list[str]) -> None:
    for name in files:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


@pytest.mark.parametrize(
    ("model", "files", "said"),
    [
        ("nemo2", ["context/io.json", "weights/common.pt"], r"NeMo 2 checkpoint\. .*llm.export_ckpt\(path=Path\("),
        ("nemo2/weights", ["common.pt", "../context/io.json"], r'NeMo 2 .*output_path=Path\("nemo2-hf"\)'),
        (
            "nemo2",
            ["context/io.json", "weights/adapter_metadata.json"],
            r'NeMo 2 .* of adapters alone\. .*merge_lora\(".*nemo2", "nemo2-merged"\); .*Path\("nemo2-merged"\)',
        ),
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


def test_a_description_beside_such_a_checkpoint_hides_no_converter(tmp_path: Path) -> None:
    made(tmp_path / "nemo2", ["context/io.json", "weights/common.pt"])
    with pytest.raises(ConfigError, match=r"leave it out: it is a NeMo 2 checkpoint.*llm.export_ckpt"):
        model_source(tmp_path / "nemo2", tmp_path / "hf")


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
