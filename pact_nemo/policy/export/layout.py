"""Which tensor of an export goes where: file, place in it, writing rank. Known before the first tensor, and the same on
every rank.

Names and shapes are those of the source folder, so nothing has to be gathered to agree on it. Every weight goes to the
writer that has least so far, largest weights first: writers are balanced by bytes, and weights of one kind (which
arrive layer by layer) are dealt out in turn, so that all writers are busy throughout. Weights that the server fuses
into one matrix (q, k, v; gate, up) stay together, because it holds the parts of a matrix back until it has all of them.
A writer's weights keep the source's order and are cut into files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from pact_nemo.errors import ConfigError
from pact_nemo.policy.export import fp8_block
from pact_nemo.runtime.tensor_files import make_header

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EXPORT_DTYPES = (*DTYPES, fp8_block.FP8_BLOCK)
_FUSED = re.compile(
    r"(\.self_attn\.)[qkv]_proj(?=\.)|(?<=\.)(?:gate|up)_proj(?=\.)"
)  # both become one name for the parts of one matrix
_FORMAT_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float8_e4m3fn: "F8_E4M3"}


@dataclass(frozen=True)
class LayoutSettings:
    """Sizes of an export.

    Attributes:
        writers: ranks that write, at most; None = all that see the folder.
        file_bytes: a file is closed when the next weight would make it larger.
        min_writer_bytes: writers are added only while each of them gets this much.
    """

    writers: int | None = None
    file_bytes: int = 4 << 30
    min_writer_bytes: int = 32 << 20


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file: where its bytes start there, and what they are."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class FilePlan:
    """A safetensors file of the export.

    Attributes:
        name: final name in the folder.
        writer: index of the writer.
        header: its first bytes.
        starts: tensor -> first byte.
        weights: weight of the source -> the tensors that stand for it (one; two for FP8).
    """

    name: str
    writer: int
    header: bytes
    starts: dict[str, int]
    weights: dict[str, list[StoredTensor]]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(tensor.size for stored in self.weights.values() for tensor in stored)


@dataclass(frozen=True)
class Layout:
    """All files, by name, and the sum of the tensors' bytes."""

    files: list[FilePlan]
    tensor_bytes: int
    weights: dict[str, FilePlan] = field(repr=False)  #: weight of the source -> its file

    @property
    def index(self) -> dict[str, object]:
        """Content of ``model.safetensors.index.json``."""
        mapped = {tensor: plan.name for plan in self.files for tensor in plan.starts}
        return {"metadata": {"total_size": self.tensor_bytes}, "weight_map": dict(sorted(mapped.items()))}


def check_dtype(dtype: str) -> None:
    """Raises ConfigError for an unknown export dtype."""
    if dtype not in EXPORT_DTYPES:
        raise ConfigError(f"export dtype {dtype!r}; choose one of {', '.join(EXPORT_DTYPES)}")


def stored_as(name: str, shape: tuple[int, ...], dtype: str) -> list[StoredTensor]:
    """The tensors that hold a weight in an export of this dtype."""
    if dtype != fp8_block.FP8_BLOCK:
        return [StoredTensor(name, DTYPES[dtype], shape)]
    if not fp8_block.is_converted(name, shape):
        return [StoredTensor(name, torch.bfloat16, shape)]
    return [
        StoredTensor(name, torch.float8_e4m3fn, shape),
        StoredTensor(name + fp8_block.SCALE_SUFFIX, torch.float32, fp8_block.scale_shape(shape)),
    ]


def plan_layout(shapes: dict[str, tuple[int, ...]], dtype: str, ranks: int, settings: LayoutSettings) -> Layout:
    """Lay out an export.

    Args:
        shapes: weight -> shape, in the source's order.
        dtype: one of ``EXPORT_DTYPES``.
        ranks: that can write.
        settings: sizes.

    Raises:
        ConfigError: unknown dtype.
    """
    check_dtype(dtype)
    stored = {name: stored_as(name, shape, dtype) for name, shape in shapes.items()}
    sizes = {name: sum(tensor.size for tensor in tensors) for name, tensors in stored.items()}
    total = sum(sizes.values())
    writers = max(1, min(ranks, settings.writers or ranks, total // settings.min_writer_bytes))
    groups = [
        group
        for writer, names in enumerate(_deal(sizes, writers))
        for group in _cut(writer, names, sizes, settings.file_bytes)
    ]
    single = len(groups) == 1
    files = [
        _plan_file(
            "model.safetensors" if single else f"model-{number:05d}-of-{len(groups):05d}.safetensors",
            writer,
            names,
            stored,
        )
        for number, (writer, names) in enumerate(groups, 1)
    ]
    return Layout(files, total, {weight: plan for plan in files for weight in plan.weights})


def _deal(sizes: dict[str, int], writers: int) -> list[list[str]]:
    """Names by writer, in the source's order: largest first to the writer with the fewest bytes so far."""
    order = {name: index for index, name in enumerate(sizes)}
    fused: dict[str, list[str]] = {}
    for name in sizes:
        fused.setdefault(_FUSED.sub(r"\1*", name), []).append(name)
    weight = {key: sum(sizes[name] for name in names) for key, names in fused.items()}
    loads, hands = [0] * writers, [[] for _ in range(writers)]  # type: tuple[list[int], list[list[str]]]
    for key in sorted(fused, key=lambda key: (-weight[key], order[fused[key][0]])):
        writer = loads.index(min(loads))
        loads[writer] += weight[key]
        hands[writer] += fused[key]
    return [sorted(hand, key=order.__getitem__) for hand in hands]


def _cut(writer: int, names: list[str], sizes: dict[str, int], file_bytes: int) -> list[tuple[int, list[str]]]:
    """(writer, names) of each of a writer's files."""
    cuts: list[tuple[int, list[str]]] = []
    room = 0
    for name in names:
        if not cuts or sizes[name] > room:
            cuts.append((writer, []))
            room = file_bytes
        cuts[-1][1].append(name)
        room -= sizes[name]
    return cuts


def _plan_file(file: str, writer: int, names: list[str], stored: dict[str, list[StoredTensor]]) -> FilePlan:
    tensors = [tensor for name in names for tensor in stored[name]]
    tensors.sort(key=lambda tensor: -tensor.dtype.itemsize)  # every tensor starts at a multiple of its item size
    header = make_header([(tensor.name, _FORMAT_NAMES[tensor.dtype], tensor.shape, tensor.size) for tensor in tensors])
    starts, offset = {}, len(header)
    for tensor in tensors:
        starts[tensor.name] = offset
        offset += tensor.size
    return FilePlan(file, writer, header, starts, {name: stored[name] for name in names})


def converter(dtype: str) -> Callable[[str, torch.Tensor], list[torch.Tensor]]:
    """(weight, rows of it) -> the same rows of each tensor that is stored for it. FP8 takes rows in multiples of
    128.
    """

    def convert(name: str, rows: torch.Tensor) -> list[torch.Tensor]:
        if dtype != fp8_block.FP8_BLOCK:
            return [rows.to(DTYPES[dtype])]
        if not fp8_block.is_converted(name, tuple(rows.shape)):
            return [rows.to(torch.bfloat16)]
        return list(fp8_block.quantise(rows))

    return convert
