"""What a Hugging Face folder holds beside what its configuration asks for, known from the headers of its files.

Every weight of the model has a tensor of the right shape and type, and every tensor of the folder is such a weight or a
buffer that is computed anew. Anything else is refused by name before a weight is read. Imports no megatron.
"""

from __future__ import annotations

import math
import re
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from pact_nemo.errors import CheckpointError, ConfigError
from pact_nemo.policy.architectures import Architecture, check_architecture
from pact_nemo.policy.expected_weights import EMBEDDING, HEAD, Shapes, expected_weights
from pact_nemo.policy.export import fp8_block
from pact_nemo.policy.hf_config import silent
from pact_nemo.policy.weight_names import check_names, check_prefixes
from pact_nemo.runtime import strict_json
from pact_nemo.runtime.tensor_files import TensorEntry, is_derived, read_tensors

_FLOATS = ("F64", "F32", "BF16", "F16")
_SCALES = ("F32", "BF16", "F16", "F8_E8M0")
_FP8 = "F8_E4M3"
_LARGEST = torch.finfo(torch.bfloat16).max
_ROWS = 4096  # of two matrices that are compared, at a time
#: settings that give a weight its shape, by its name
_SIZES: tuple[tuple[str, str], ...] = (
    (r"embed_tokens|lm_head", "vocab_size and hidden_size"),
    (r"[qk]_norm", "head_dim"),
    (r"[kv]_proj", "num_key_value_heads, head_dim and hidden_size"),
    (r"[qo]_proj", "num_attention_heads, head_dim and hidden_size"),
    (r"\.experts\.", "moe_intermediate_size and hidden_size"),
    (r"mlp\.gate\.", "num_experts and hidden_size"),
    (r"\.mlp\.", "intermediate_size and hidden_size"),
)


@dataclass(frozen=True)
class ModelFolder:
    """A folder whose tensors are known to be those of its model.

    Attributes:
        path: of the folder.
        architecture: what its ``config.json`` asks for.
        entries: weight -> where it is stored, in the files' order; only what the model has.
        scales: FP8 weight -> where its scales are.
        block: rows and columns that share a scale.
    """

    path: Path
    architecture: Architecture
    entries: dict[str, TensorEntry]
    scales: dict[str, TensorEntry]
    block: tuple[int, int] = (fp8_block.BLOCK, fp8_block.BLOCK)

    @property
    def shapes(self) -> Shapes:
        """Weight -> shape."""
        return {name: entry.shape for name, entry in self.entries.items()}

    @property
    def quantised(self) -> bool:
        """Whether some weights are stored in FP8."""
        return bool(self.scales)

    @property
    def stored_bytes(self) -> int:
        """Size of all weights and scales in the files."""
        return sum(entry.end - entry.start for entry in (*self.entries.values(), *self.scales.values()))


class WeightReader:
    """Reads weights of a folder; a context that keeps its files open."""

    def __init__(self, folder: ModelFolder):
        self.folder = folder
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}

    def __enter__(self) -> WeightReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._files.clear()
        self._stack.close()

    def read(self, name: str) -> torch.Tensor:
        """A weight in the type that it is stored in; float32 where that is FP8.

        Raises:
            CheckpointError: it can't be read, or holds NaN or Inf; the message names file and weight.
        """
        entry, scale = self.folder.entries[name], self.folder.scales.get(name)
        where = f"{self.folder.path / entry.file}: {name}"
        try:
            weight = self._tensor(name, entry)
            if scale is not None:
                weight = fp8_block.dequantise(
                    weight, self._tensor(name + fp8_block.SCALE_SUFFIX, scale), self.folder.block
                )
        except Exception as error:  # the file changed since its header was read, or its disk failed
            raise CheckpointError(f"{where} can't be read ({error}); copy that folder again") from error
        low, high = (float(value) for value in torch.aminmax(weight))  # NaN is passed on by both
        if not (math.isfinite(low) and math.isfinite(high)):
            raise CheckpointError(f"{where} holds NaN or Inf: training on it is useless; take an intact folder")
        if max(-low, high) > _LARGEST:  # float64, or the last values of float32: infinite in the policy's precision
            raise CheckpointError(
                f"{where} holds a value of {max(-low, high):.3g}, beyond what bfloat16 can hold; take an intact folder"
            )
        return weight

    def _tensor(self, name: str, entry: TensorEntry) -> torch.Tensor:
        if entry.file not in self._files:
            self._files[entry.file] = self._stack.enter_context(
                safe_open(self.folder.path / entry.file, framework="pt")
            )
        return self._files[entry.file].get_tensor(name)  # type: ignore[no-any-return]


def check_model_folder(path: str | Path) -> ModelFolder:
    """Compare the tensors of a folder with what its ``config.json`` asks for. Reads headers only, and two heads that
    have to be equal.

    Raises:
        ConfigError: the configuration can't be read, or names an architecture, a setting or a quantisation that is not
            supported.
        CheckpointError: a weight is missing, has another shape or type, or a tensor is none of the model's; the message
            names tensor and file.
    """
    base = Path(path)
    architecture = check_architecture(base)
    block = _block_of(base)
    _check_transformers_reads(base)
    if (base / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{base / 'adapter_config.json'}: the folder is a PEFT adapter; merge it into its model and save that"
        )
    tensors = read_tensors(base)
    expected = expected_weights(architecture)
    held = {name: entry for name, entry in tensors.items() if not is_derived(name)}
    check_prefixes(base, expected, held)
    scales = (
        {name: held[name + fp8_block.SCALE_SUFFIX] for name in expected if name + fp8_block.SCALE_SUFFIX in held}
        if block is not None
        else {}
    )
    known = expected.keys() | {name + fp8_block.SCALE_SUFFIX for name in scales}
    tied = HEAD in held and HEAD not in expected and expected.get(EMBEDDING) == held[HEAD].shape
    check_names(base, architecture, expected, held, known | ({HEAD} if tied else set()))
    folder = ModelFolder(
        base, architecture, {name: held[name] for name in held if name in expected}, scales, block or ModelFolder.block
    )
    for name, shape in expected.items():
        _check_stored(folder, name, shape, block)
    if block is not None and not scales:
        raise CheckpointError(
            f"{base / 'config.json'}: quantization_config says FP8, yet no weight of the folder is; take that key out"
        )
    if tied:
        _check_equal_heads(base, held[HEAD], held[EMBEDDING])
    return folder


def described_folder(path: str | Path) -> ModelFolder:
    """A folder whose own weights, if it has any, are not looked at: the weights are elsewhere, in no file of it.

    Raises:
        ConfigError: the configuration can't be read, or names an architecture or a setting that is not supported.
    """
    base = Path(path)
    architecture = check_architecture(base)
    _check_transformers_reads(base)
    entries = {name: TensorEntry("F32", shape, "", 0, 0) for name, shape in expected_weights(architecture).items()}
    return ModelFolder(base, architecture, entries, {})


def check_values(folder: ModelFolder) -> None:
    """Read every weight once. Raises CheckpointError for the first that is not finite."""
    with WeightReader(folder) as reader:
        for name in folder.entries:
            reader.read(name)


def _block_of(base: Path) -> tuple[int, int] | None:
    """Block size of FP8 weights; None for a folder without quantisation."""
    where = base / "config.json"
    config = strict_json.loads(where.read_text(encoding="utf-8"))
    settings = config.get("quantization_config", config.get("compression_config"))
    if (apart := base / "hf_quant_config.json").is_file():  # ModelOpt's, which servers take for quantization_config
        raise ConfigError(
            f"{apart}: weights quantised by ModelOpt are not read; give a folder of unquantised weights, without that"
            " file"
        )
    if settings is None:
        return None
    if not isinstance(settings, dict) or not settings:
        raise ConfigError(
            f"{where}: quantization_config={settings!r} says no quantisation; take it out, or give a folder of"
            " unquantised weights"
        )
    method, block = settings.get("quant_method"), settings.get("weight_block_size")
    remedy = (
        "only block FP8 (quant_method fp8 with a weight_block_size) is read; give a folder of the unquantised weights"
    )
    if method != "fp8" or settings.get("fmt", "e4m3") not in ("e4m3", None):
        raise ConfigError(
            f"{where}: quantization_config with quant_method {method!r}, fmt {settings.get('fmt')!r} is not supported;"
            f" {remedy}"
        )
    if settings.get("activation_scheme", "dynamic") != "dynamic":
        raise ConfigError(
            f"{where}: quantization_config.activation_scheme {settings['activation_scheme']!r} is not supported;"
            f" {remedy}"
        )
    if not (
        isinstance(block, list | tuple) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)
    ):
        raise ConfigError(f"{where}: quantization_config.weight_block_size {block!r} is no pair of sizes; {remedy}")
    return int(block[0]), int(block[1])


def _check_transformers_reads(base: Path) -> None:
    """Refuse here what transformers, and with it bridge and server, would refuse later for a reason that nothing above
    knows.
    """
    from transformers import AutoConfig

    try:
        with silent():
            AutoConfig.from_pretrained(str(base), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # its validation raises types of several packages
        text = " ".join(str(error).split())
        raise ConfigError(
            f"{base / 'config.json'}: transformers can't read it ({type(error).__name__}: {text}); repair that file"
        ) from error


def _check_stored(folder: ModelFolder, name: str, shape: tuple[int, ...], block: tuple[int, int] | None) -> None:
    """Shape and type of one weight, and of its scales."""
    entry, scale = folder.entries[name], folder.scales.get(name)
    where = f"{folder.path / entry.file}: {name}"
    if entry.shape != shape:
        reason = f"{_sizes_of(name)} of config.json say otherwise"
        if 0 in entry.shape:
            reason = "it is empty (a rank's part under ZeRO-3? Gather the weights before saving)"
        raise CheckpointError(
            f"{where} has shape {list(entry.shape)} instead of {list(shape)}: {reason}; set them right, or export the"
            " folder again"
        )
    if entry.dtype == _FP8 and scale is None:
        remedy = (
            "config.json has no quantization_config" if block is None else f"its {fp8_block.SCALE_SUFFIX} is missing"
        )
        raise CheckpointError(
            f"{where} is {entry.dtype} without scales ({remedy}); give a folder that has both, or the unquantised"
            " weights"
        )
    if entry.dtype not in (*_FLOATS, _FP8):
        raise CheckpointError(
            f"{where} is {entry.dtype}, no floating-point weight; give a folder of float32, bfloat16 or float16 weights"
        )
    if scale is None:
        return
    scaled = f"{folder.path / scale.file}: {name}{fp8_block.SCALE_SUFFIX}"
    if entry.dtype != _FP8 or len(shape) != 2:
        raise CheckpointError(
            f"{scaled} stands beside {name}, which is {entry.dtype} {list(shape)} and needs no scales; export the"
            " folder again"
        )
    if scale.shape != fp8_block.scale_shape(shape, folder.block):
        wanted = list(fp8_block.scale_shape(shape, folder.block))
        raise CheckpointError(
            f"{scaled} has shape {list(scale.shape)}, blocks of {list(folder.block)} need {wanted}; export the folder"
            " again"
        )
    if scale.dtype not in _SCALES:
        raise CheckpointError(f"{scaled} is {scale.dtype}, no type that scales have; export the folder again")


def _sizes_of(name: str) -> str:
    """The settings that a weight's shape comes from."""
    return next((sizes for pattern, sizes in _SIZES if re.search(pattern, name)), "hidden_size")


def _check_equal_heads(base: Path, head: TensorEntry, embedding: TensorEntry) -> None:
    with safe_open(base / head.file, framework="pt") as one, safe_open(base / embedding.file, framework="pt") as other:
        left, right = one.get_slice(HEAD), other.get_slice(EMBEDDING)
        for start in range(0, head.shape[0], _ROWS):
            rows = slice(start, start + _ROWS)
            if (
                head.dtype not in _FLOATS
                or embedding.dtype not in _FLOATS
                or not torch.equal(left[rows].double(), right[rows].double())
            ):
                raise CheckpointError(
                    f"{base / head.file}: {HEAD} differs from {EMBEDDING}, yet config.json says"
                    " tie_word_embeddings=true: transformers uses the one, servers the other; set the flag to false,"
                    " or take the head out"
                )
