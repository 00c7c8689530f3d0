"""The embedded model: the conversion is whole, reused, and the result speaks."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pact_nemo.checkpoints import embedded
from pact_nemo.checkpoints.manifest import verify_manifest
from pact_nemo.errors import CheckpointError, MissingDependency

CACHE = Path(__file__).parents[1] / ".cache" / "pact_nemo"


@pytest.fixture(scope="module")
def folder():
    pytest.importorskip("gguf")
    return embedded.materialise_embedded_model(CACHE)


def test_is_reused_and_verified(folder, monkeypatch):
    monkeypatch.setattr(embedded, "convert_gguf", lambda *args: pytest.fail("converted again"))
    assert embedded.materialise_embedded_model(CACHE) == folder
    manifest = verify_manifest(folder)
    assert {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "chat_template.jinja",
    } <= set(manifest.files)
    assert not list(CACHE.glob(".*tmp"))


def test_a_torn_folder_is_replaced(folder, tmp_path, monkeypatch):
    copy = tmp_path / embedded.FOLDER_NAME
    shutil.copytree(folder, copy, copy_function=os.link)
    (copy / "config.json").unlink()

    def convert(gguf_file, target):
        for name in verify_manifest(folder).files:
            os.link(folder / name, target / name)

    monkeypatch.setattr(embedded, "convert_gguf", convert)
    assert embedded.materialise_embedded_model(tmp_path) == copy
    verify_manifest(copy)


def test_absent_package(monkeypatch, tmp_path):
    monkeypatch.setattr(embedded, "_PACKAGE", "no_such_package_here")
    with pytest.raises(MissingDependency, match="model.path"):
        embedded.materialise_embedded_model(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_another_gguf_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(embedded._HEADER, "llama.block_count", 32)
    with pytest.raises(CheckpointError, match="block_count"):
        embedded.convert_gguf(embedded.find_embedded_gguf(), tmp_path)


def test_config_is_what_transformers_expects(folder):
    assert json.loads((folder / "config.json").read_text()) == embedded.EMBEDDED_CONFIG
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype == torch.float32
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert sum(p.numel() for p in model.parameters()) == 134_515_008


def test_tokenizer_splits_digits_and_round_trips(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    digits = tokenizer("1234")["input_ids"]
    assert [tokenizer.decode([i]) for i in digits] == ["1", "2", "3", "4"]
    text = "def f(x):\n    return x + 42  # naïve café, 'quoted' \u2713\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("<|im_start|>user\n<|im_end|>")["input_ids"][0] == tokenizer.bos_token_id
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.eos_token_id == 2


@torch.no_grad()
def test_it_answers_a_question(folder):
    """Wrong rotary permutation, digits, template or tie all end in babble."""
    torch.set_num_threads(2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"
