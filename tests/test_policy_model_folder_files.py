"""The names, files, heads and settings of a model folder: what agrees is computed as transformers does and
exported whole, what contradicts itself is refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pact_nemo.checkpoints.manifest import verify_manifest
from pact_nemo.errors import CheckpointError, ConfigError
from pact_nemo.policy.expected_weights import EMBEDDING, HEAD
from pact_nemo.policy.model_folder import check_model_folder, check_values
from pact_nemo.runtime.tensor_files import INDEX_NAME
from pact_nemo.serving.refit import check_same_tensors
from tests.workers.folder_kit import build, copy, models, ours, theirs, write_shards
from tests.workers.policy_kit import VOCAB

__all__ = ["models"]  # the fixture


# ------------------------------------------------------------------------------------------------ names, files, heads


@pytest.mark.parametrize(
    "prefix",
    ["", "model.model.", "module.model.", "_orig_mod.model.", "base_model.model.model.", "language_model.model."],
)
def test_a_folder_whose_names_are_all_prefixed_otherwise_is_refused_by_name(
    prefix: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    source = load_file(models("qwen3") / "model.safetensors")
    weights = {
        name.replace("model.", prefix, 1) if name.startswith("model.") else name: tensor
        for name, tensor in source.items()
    }
    folder = copy(models("qwen3"), tmp_path, weights)
    with pytest.raises(
        CheckpointError,
        match=rf"model\.safetensors: {prefix}embed_tokens\.weight should be model\.embed_tokens\.weight.*; .*save",
    ):
        check_model_folder(folder)


def test_rotary_buffers_are_passed_over_and_not_exported(models: Callable[[str], Path], tmp_path: Path) -> None:
    weights = load_file(models("llama3") / "model.safetensors")
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.rand(4) for i in range(2)} | {
        "model.rotary_emb.inv_freq": torch.rand(4)
    }
    folder = copy(models("llama3"), tmp_path / "old", weights | buffers)
    policy = build(folder)
    torch.testing.assert_close(ours(folder), theirs(folder), rtol=0, atol=1e-4)
    policy.export_hf(tmp_path / "new", dtype="float32")
    assert load_file(tmp_path / "new" / "model.safetensors").keys() == weights.keys()
    check_same_tensors(tmp_path / "new", folder)  # a server that was started from the old folder takes the export


def test_a_tied_head_of_its_own_is_refused_unless_it_is_the_embedding(
    models: Callable[[str], Path], tmp_path: Path
) -> None:
    weights = load_file(models("llama") / "model.safetensors")
    same = copy(models("llama"), tmp_path / "same", weights | {HEAD: weights[EMBEDDING].clone()})
    torch.testing.assert_close(ours(same), theirs(same), rtol=0, atol=1e-4)
    build(same).export_hf(tmp_path / "out", dtype="float32")
    assert HEAD not in load_file(tmp_path / "out" / "model.safetensors")
    check_same_tensors(tmp_path / "out", same)
    other = weights[EMBEDDING].clone()
    other[-1, -1] += 1e-3
    with pytest.raises(
        CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight, yet .*tie_word_embeddings"
    ):
        check_model_folder(copy(models("llama"), tmp_path / "other", weights | {HEAD: other}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is no weight .*tie_word_embeddings"):
        check_model_folder(copy(models("llama"), tmp_path / "short", weights | {HEAD: other[:-1]}))
    with pytest.raises(CheckpointError, match=r"lacks lm_head\.weight \[131, 64\].*tie_word_embeddings"):
        check_model_folder(copy(models("llama"), tmp_path / "flag", weights, tie_word_embeddings=False))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


FIRST, LAST = "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"
NORM = "model.norm.weight"
#: message -> what is done to a folder of three files, given it and the map of its index
CONTRADICTIONS: dict[str, Callable[[Path, dict[str, str]], Any]] = {
    f"{LAST} is missing": lambda folder, index: (folder / LAST).unlink(),
    "model-00002-of-00003.safetensors is no safetensors file": lambda folder, index: _cut(
        folder / "model-00002-of-00003.safetensors"
    ),
    f"{LAST} is a pointer of Git LFS": (
        lambda folder, index: (folder / LAST).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    ),
    f"says that {FIRST} holds ghost, which it doesn't": lambda folder, index: index.update(ghost=FIRST),
    f"says that {LAST} holds {NORM}, which is in {FIRST}": lambda folder, index: index.update({NORM: LAST}),
    f"doesn't name {NORM}, which {FIRST} holds": lambda folder, index: index.pop(NORM),
    f"{LAST} and {FIRST} both hold {NORM}": lambda folder, index: save_file(
        load_file(folder / LAST) | {NORM: load_file(folder / FIRST)[NORM]}, folder / LAST
    ),
    f"model.safetensors stands beside {INDEX_NAME}": lambda folder, index: save_file(
        {"a": torch.ones(1)}, folder / "model.safetensors"
    ),
    "adapter_model.safetensors stands beside model.safetensors without an index": lambda folder, index: _without_index(
        folder
    ),
    "adapter_config.json: the folder is a PEFT adapter": (
        lambda folder, index: (folder / "adapter_config.json").write_text("{}")
    ),
}


def _without_index(folder: Path) -> None:
    (folder / INDEX_NAME).unlink()
    (folder / FIRST).rename(folder / "model.safetensors")
    (folder / LAST).rename(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("message", CONTRADICTIONS)
def test_files_that_contradict_each_other_are_refused_by_name(
    message: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    source = load_file(models("qwen2") / "model.safetensors")
    ordered = {NORM: source[NORM], **source}  # in the first file
    folder = write_shards(ordered, copy(models("qwen2"), tmp_path))
    index = json.loads((folder / INDEX_NAME).read_text())
    CONTRADICTIONS[message](folder, index["weight_map"])
    if (folder / INDEX_NAME).exists():
        (folder / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        check_model_folder(folder)
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_refused_with_what_to_do(models: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy(models("llama"), tmp_path)
    torch.save(load_file(models("llama") / "model.safetensors"), folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*convert them to safetensors"):
        check_model_folder(folder)


def test_what_only_servers_or_transformers_refuse_is_refused_before_they_start(
    models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    folder = copy(models("qwen3"), tmp_path, load_file(models("qwen3") / "model.safetensors"))
    (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    with pytest.raises(ConfigError, match=r"hf_quant_config\.json: .*ModelOpt"):
        check_model_folder(folder)
    (folder / "hf_quant_config.json").unlink()
    check_model_folder(folder)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AttributeError("no such thing")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
    with pytest.raises(
        ConfigError, match=r"config\.json: transformers can't read it \(AttributeError: no such thing\)"
    ):
        check_model_folder(folder)


@pytest.mark.parametrize(("dtype", "value"), [(torch.float64, 1e300), (torch.float32, 3.4e38)])
def test_values_that_the_policys_precision_cannot_hold_are_refused(
    dtype: torch.dtype, value: float, models: Callable[[str], Path], tmp_path: Path
) -> None:
    weights = load_file(models("llama") / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].to(dtype)
    weights["model.norm.weight"][1] = -value
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight holds a value of .*beyond what bfloat16 can hold"):
        check_values(check_model_folder(copy(models("llama"), tmp_path, weights)))


def test_a_shape_names_the_settings_that_ask_for_it(models: Callable[[str], Path], tmp_path: Path) -> None:
    for number, (family, key, value) in enumerate(
        [
            ("llama", "num_key_value_heads", 2),
            ("llama", "vocab_size", VOCAB + 1),
            ("llama", "intermediate_size", 8),
            ("qwen3_moe", "head_dim", 8),
            ("qwen3_moe", "moe_intermediate_size", 8),
            ("llama", "num_attention_heads", 4),
        ]
    ):
        folder = copy(
            models(family), tmp_path / str(number), load_file(models(family) / "model.safetensors"), **{key: value}
        )
        with pytest.raises(CheckpointError, match=rf"instead of .*{key}"):
            check_model_folder(folder)


# ------------------------------------------------------------------------------------------------------------- exports


def test_exports_carry_templates_licences_and_notices(models: Callable[[str], Path], tmp_path: Path) -> None:
    source = copy(models("llama"), tmp_path / "source", load_file(models("llama") / "model.safetensors"))
    carried = [
        "additional_chat_templates/tool_use.jinja",
        "LICENSE",
        "LICENSE.txt",
        "license.md",
        "NOTICE",
        "Notice.txt",
        "COPYING",
        "USE_POLICY.md",
        "THIRD_PARTY_LICENSES/one.txt",
    ]
    for name in (*carried, "README.md", "notes.txt"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(name)
    from pact_nemo.checkpoints.hf import export_version

    folder = export_version(build(source), tmp_path / "out", 1)
    assert all((folder / name).read_text() == name for name in carried)
    assert not (folder / "README.md").exists() and not (folder / "notes.txt").exists()
    assert set(carried) <= verify_manifest(folder).files.keys()
    (folder / carried[0]).write_text("changed")
    with pytest.raises(CheckpointError, match=r"tool_use\.jinja"):
        verify_manifest(folder)
