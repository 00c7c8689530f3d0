"""Writing a Hugging Face model folder from a stream of weights that every rank sees; several ranks write."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pact_nemo.errors import CheckpointError
from pact_nemo.policy.export import fp8_block
from pact_nemo.policy.export.layout import Layout, LayoutSettings, check_dtype, plan_layout
from pact_nemo.policy.export.writer import FolderWriter
from pact_nemo.runtime import collective
from pact_nemo.runtime.digests import FileEntry
from pact_nemo.runtime.files import write_json_atomic
from pact_nemo.runtime.tensor_files import INDEX_NAME

_ARTIFACTS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "*.py",
    "additional_chat_templates",
)
#: what a licence may ask to be passed on, in any spelling; a model card is left out, for it describes the source's
#: weights
_NOTICES = re.compile(
    r"licen[cs]e|notice|copying|copyright|use[-_ ]?policy|acceptable[-_ ]?use|terms[-_ ]of|patents", re.IGNORECASE
)


def copy_artifacts(source: str | Path, folder: str | Path, dtype: str, shapes: dict[str, tuple[int, ...]]) -> None:
    """Copy configuration, tokenizer, chat templates, generation settings, custom code, licences and notices; folders
    with all they hold.

    Args:
        source: Hugging Face folder.
        folder: existing folder to copy into.
        dtype: of the export, written into ``config.json``; FP8 brings its ``quantization_config``.
        shapes: of the weights.

    Raises:
        CheckpointError: ``source`` has no ``config.json``.
    """
    config_path = Path(source) / "config.json"
    if not config_path.is_file():
        raise CheckpointError(f"{config_path} is missing: not a Hugging Face model folder")
    artifacts = {path for pattern in _ARTIFACTS for path in Path(source).glob(pattern)}
    artifacts |= {path for path in Path(source).iterdir() if _NOTICES.search(path.name)}
    for path in sorted(artifacts):
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.is_file() and file.suffix != ".safetensors":  # a loader would take it for weights
                target = Path(folder) / file.relative_to(source)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
    config: dict[str, Any] = json.loads(config_path.read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config.pop("quantization_config", None)
    config["dtype"] = "bfloat16" if dtype == fp8_block.FP8_BLOCK else dtype
    if dtype == fp8_block.FP8_BLOCK:
        config["quantization_config"] = fp8_block.quantization_config(shapes)
    write_json_atomic(Path(folder) / "config.json", config)


def write_folder(
    weights: Iterable[tuple[str, torch.Tensor]],
    source: str | Path,
    folder: str | Path,
    dtype: str,
    *,
    shapes: dict[str, tuple[int, ...]],
    settings: LayoutSettings | None = None,
    previous: tuple[Path, dict[str, FileEntry]] | None = None,
) -> dict[str, FileEntry]:
    """Write a model folder: ``model.safetensors``, or numbered files with an index, and everything else from
    ``source``. Collective.

    Args:
        weights: names and whole tensors, the same on every rank, consumed to the end on every rank (producing them is
            collective). They must not change until this returns.
        source: Hugging Face folder with configuration, tokenizer and so on.
        folder: made if absent, by rank 0. Ranks that don't see it (it is on rank 0's own disk) don't write.
        dtype: one of ``export_layout.EXPORT_DTYPES``.
        shapes: what ``weights`` will be, in ``source``'s order.
        settings: sizes; None = the defaults.
        previous: (folder, manifest entries) of an earlier export; files that come out equal become hard links to its
            files.

    Returns:
        digests of the weight files, known from memory, on every rank.

    Raises:
        ConfigError: unknown dtype.
        CheckpointError: on all ranks together: ``weights`` differ from ``shapes``, or a rank could not write.
    """
    check_dtype(dtype)
    settings = settings if settings is not None else LayoutSettings()
    target = Path(folder)

    def prepare() -> None:
        target.mkdir(parents=True, exist_ok=True)
        copy_artifacts(source, target, dtype, shapes)

    collective.on_rank_zero(prepare)
    ranks = _writing_ranks(target)
    layout = plan_layout(shapes, dtype, len(ranks), settings)
    mine = [plan for plan in layout.files if ranks[plan.writer] == collective.rank()]
    entries: dict[str, FileEntry] = {}
    error: Exception | None = None
    with _single_threaded_operations():
        writer = FolderWriter(target, mine, dtype, previous=previous)
        try:
            error = _hand_over(weights, writer, shapes, source)
        finally:  # its threads end, whatever happens
            try:
                entries = writer.close()
                if collective.rank() == 0 and len(layout.files) > 1:
                    _write_index(target, layout)
            except (CheckpointError, OSError) as caught:
                error = error or caught
    collective.raise_together(error)
    return {name: entry for part in collective.gather(entries) for name, entry in part.items()}


def write_folder_alone(
    weights: Iterable[tuple[str, torch.Tensor]],
    source: str | Path,
    folder: Path,
    dtype: str,
    shapes: dict[str, tuple[int, ...]],
) -> dict[str, FileEntry]:
    """:func:`write_folder` in this process only, into an existing folder."""
    copy_artifacts(source, folder, dtype, shapes)
    layout = plan_layout(shapes, dtype, 1, LayoutSettings())
    with _single_threaded_operations():
        writer = FolderWriter(folder, layout.files, dtype)
        error: Exception | None = None
        entries: dict[str, FileEntry] = {}
        try:
            error = _hand_over(weights, writer, shapes, source)
        except CheckpointError as caught:  # of the stream: it says more than that weights never came
            error = caught
        finally:
            try:
                entries = writer.close()
            except CheckpointError as caught:
                error = error or caught
    if error is not None:
        raise error
    if len(layout.files) > 1:
        _write_index(folder, layout)
    return entries


@contextmanager
def _single_threaded_operations() -> Iterator[None]:
    """One thread for each torch operation of this thread and of those it starts. The parallelism of an export is in its
    stages; the small copies of gathering and converting would only wait for the threads of the others (measured: a
    third of the processor time, docs/cluster/refit.md).
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _writing_ranks(folder: Path) -> list[int]:
    """Ranks that see the folder, so ordered that the first few are spread over the nodes. Collective."""
    with os.scandir(folder.parent if folder.parent.is_dir() else "/"):
        pass  # opening a directory makes a network file system ask its server again
    seen = collective.gather((folder.is_dir(), collective.host()))
    turn: dict[str, int] = {}
    order = []
    for rank, (sees, host) in enumerate(seen):
        if sees:
            order.append((turn.get(host, 0), rank))
            turn[host] = turn.get(host, 0) + 1
    return [rank for _, rank in sorted(order)]


def _hand_over(
    weights: Iterable[tuple[str, torch.Tensor]],
    writer: FolderWriter,
    shapes: dict[str, tuple[int, ...]],
    source: str | Path,
) -> Exception | None:
    """Give the writer what it wants of a stream, to the stream's end; what is wrong with the stream, the same on every
    rank.
    """
    came: set[str] = set()
    error: Exception | None = None
    for name, tensor in weights:
        if name in came:
            error = error or CheckpointError(f"weight {name} was produced twice")
        elif name in shapes and tuple(tensor.shape) != shapes[name]:
            error = error or CheckpointError(
                f"exported weight {name} has shape {tuple(tensor.shape)}, {source} has {shapes[name]}"
            )
        elif writer.wants(name) and error is None:
            writer.put(name, tensor)
        came.add(name)
    if came != shapes.keys():
        error = error or CheckpointError(
            f"exported weights differ from those of {source}: {sorted(came ^ shapes.keys())[:5]}"
        )
    return error


def _write_index(folder: Path, layout: Layout) -> None:
    write_json_atomic(folder / INDEX_NAME, layout.index)
