"""The parts of an export: layout, a rank's writer, and where exports are kept."""

from __future__ import annotations

import errno
import json
import os
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pact_nemo.checkpoints.manifest import new_export, read_manifest
from pact_nemo.config.load import load_config
from pact_nemo.errors import CheckpointError, ConfigError
from pact_nemo.policy.export import writer as export_writer
from pact_nemo.policy.export.hf_folder import write_folder
from pact_nemo.policy.export.layout import LayoutSettings, plan_layout
from pact_nemo.policy.export.writer import FolderWriter
from pact_nemo.runtime.digests import FileEntry, file_entry
from pact_nemo.runtime.tensor_files import read_tensors
from pact_nemo.tracking.run_folder import Workspace
from tests.workers.policy_kit import loaded, make_model


def weights_of(count: int, size: int, *, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"model.layers.{i}.mlp.down_proj.weight": torch.randn(size, size, generator=generator) for i in range(count)
    }


def shapes_of(weights: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


# -------------------------------------------------------------------------------------------------------------------
# layout


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=60),
    st.integers(1, 9),
    st.integers(50, 2000),
    st.sampled_from(["bfloat16", "fp8_block"]),
)
def test_every_tensor_has_one_place_and_writers_are_balanced(
    rows: list[int], ranks: int, file_bytes: int, dtype: str
) -> None:
    shapes = {
        f"model.layers.{i}.{kind}.weight": (n, 3) for i, n in enumerate(rows) for kind in ("mlp.down_proj", "norm")
    }
    layout = plan_layout(shapes, dtype, ranks, LayoutSettings(file_bytes=file_bytes, min_writer_bytes=1))
    assert sorted(name for plan in layout.files for name in plan.weights) == sorted(shapes)
    loads: dict[int, int] = {}
    for plan in layout.files:
        stored = sorted((plan.starts[t.name], t) for tensors in plan.weights.values() for t in tensors)
        position = len(plan.header)
        for start, tensor in stored:
            assert start == position and start % tensor.dtype.itemsize == 0
            position += tensor.size
        assert position == plan.size and (plan.size - len(plan.header) <= file_bytes or len(plan.weights) == 1)
        loads[plan.writer] = loads.get(plan.writer, 0) + plan.size - len(plan.header)
    largest = max(sum(t.size for t in tensors) for plan in layout.files for tensors in plan.weights.values())
    assert (
        sum(loads.values()) == layout.tensor_bytes
        and max(loads.values()) - min(loads.values()) <= largest
        or len(loads) < ranks
    )
    assert layout == plan_layout(shapes, dtype, ranks, LayoutSettings(file_bytes=file_bytes, min_writer_bytes=1))


def test_parts_of_a_fused_matrix_stay_with_one_writer_and_small_models_in_one_file() -> None:
    names = [
        f"model.layers.{i}.{part}_proj.weight"
        for i in range(8)
        for part in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up")
    ]
    layout = plan_layout(dict.fromkeys(names, (64, 64)), "bfloat16", 4, LayoutSettings(min_writer_bytes=1))
    for i in range(8):
        assert len({layout.weights[name].writer for name in names if f".{i}.self_attn" in name}) == 1
        assert len({layout.weights[name].writer for name in names if f".{i}.mlp" in name}) == 1
    assert len({plan.writer for plan in layout.files}) == 4
    assert [
        plan.name for plan in plan_layout(dict.fromkeys(names, (64, 64)), "bfloat16", 4, LayoutSettings()).files
    ] == ["model.safetensors"]


# -------------------------------------------------------------------------------------------------------------------
# writer


def write(
    folder: Path,
    weights: dict[str, torch.Tensor],
    *,
    file_bytes: int = 1 << 30,
    previous: Path | None = None,
    dtype: str = "bfloat16",
) -> FolderWriter:
    """Export with a manifest of the digests from memory."""
    layout = plan_layout(shapes_of(weights), dtype, 1, LayoutSettings(file_bytes=file_bytes))
    folder.mkdir()
    known = (
        (previous, {plan.name: file_entry_of(previous, plan.name) for plan in layout.files})
        if previous is not None
        else None
    )
    writer = FolderWriter(folder, layout.files, dtype, previous=known)
    for name, tensor in weights.items():
        writer.put(name, tensor)
    entries = writer.close()
    for name, entry in entries.items():
        assert entry.size == (folder / name).stat().st_size
        (folder / f"{name}.entry").write_text(json.dumps(entry.parts))
    return writer


def file_entry_of(folder: Path, name: str) -> FileEntry:
    parts = json.loads((folder / f"{name}.entry").read_text())
    return FileEntry(parts[-1][0], tuple((end, digest) for end, digest in parts))


def test_files_hold_what_safetensors_would_write_whatever_the_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(export_writer._CHUNK_BYTES, "cpu", 1000)
    monkeypatch.setattr(export_writer, "PART_BYTES", 3000)
    monkeypatch.setattr(export_writer, "_FLUSH_BYTES", 2000)
    weights = {
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "view": torch.randn(9, 70).t(),
        "odd": torch.randn(7, 11, 13),
    }
    weights |= weights_of(3, 50)
    write(tmp_path / "a", weights, file_bytes=6000)
    assert len(list((tmp_path / "a").glob("*.safetensors"))) == 4
    got = loaded(tmp_path / "a")
    assert got.keys() == weights.keys() and all(
        torch.equal(got[name], value.bfloat16()) for name, value in weights.items()
    )
    for path in (tmp_path / "a").glob("*.safetensors"):
        entry = file_entry_of(tmp_path / "a", path.name)
        export_writer.check_files(tmp_path / "a", {path.name: entry}, "")
        assert max(b - a for a, b, _ in export_writer._parts(entry)[1:]) <= 3000


def test_what_waits_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that stands still, a stream that makes each weight when asked: never more alive than the queue and one
    waiting to get in.
    """
    alive, peak, size = 0, 0, 256 * 256 * 4
    lock = threading.Lock()
    moves = threading.Event()
    threading.Timer(0.5, moves.set).start()

    def died() -> None:
        nonlocal alive
        with lock:
            alive -= 1

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal alive, peak
        for i in range(40):
            tensor = torch.full((256, 256), float(i))
            weakref.finalize(tensor, died)
            with lock:
                alive += 1
                peak = max(peak, alive)
            yield f"w{i}", tensor
            del tensor

    original = export_writer._write
    monkeypatch.setattr(export_writer, "_write", lambda *args: (moves.wait(), original(*args)))
    layout = plan_layout({f"w{i}": (256, 256) for i in range(40)}, "float32", 1, LayoutSettings())
    writer = FolderWriter(tmp_path, layout.files, "float32", queue_bytes=4 * size)
    for name, tensor in stream():
        writer.put(name, tensor)
        del tensor
    writer.close()
    assert peak == 4 + 1, "what the threads hold counts as waiting"
    assert all(torch.equal(value, torch.full((256, 256), float(name[1:]))) for name, value in loaded(tmp_path).items())


def test_unchanged_files_become_links_and_partly_changed_ones_are_whole(tmp_path: Path) -> None:
    weights = weights_of(6, 64)
    write(tmp_path / "v1", weights, file_bytes=2 * 64 * 64 * 2)
    changed = dict(weights)
    changed["model.layers.3.mlp.down_proj.weight"] = (
        changed["model.layers.3.mlp.down_proj.weight"] + 1
    )  # the second weight of the second file
    writer = write(tmp_path / "v2", changed, file_bytes=2 * 64 * 64 * 2, previous=tmp_path / "v1")
    files = sorted(path.name for path in (tmp_path / "v2").glob("*.safetensors"))
    assert [(tmp_path / "v1" / name).samefile(tmp_path / "v2" / name) for name in files] == [True, False, True]
    assert writer.linked == sum((tmp_path / "v2" / files[i]).stat().st_size for i in (0, 2))
    assert all(torch.equal(value, changed[name].bfloat16()) for name, value in loaded(tmp_path / "v2").items())
    for name in files:
        export_writer.check_files(tmp_path / "v2", {name: file_entry_of(tmp_path / "v2", name)}, "")
    other = write(tmp_path / "v3", changed, file_bytes=2 * 64 * 64 * 2, dtype="float32")
    assert other.linked == 0


def test_a_corrupt_previous_version_is_not_linked(tmp_path: Path) -> None:
    weights = weights_of(2, 64)
    write(tmp_path / "v1", weights)
    data = bytearray((tmp_path / "v1" / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (tmp_path / "v1" / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="delete .*v1 and export again"):
        write(tmp_path / "v2", weights, previous=tmp_path / "v1")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_in_the_middle_is_named_and_nothing_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    writes: list[int] = []
    original = os.pwrite

    def pwrite(fd: int, data: memoryview, position: int) -> int:
        writes.append(position)
        if len(writes) > 4:
            raise OSError(code, os.strerror(code))
        return original(fd, data, position)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(CheckpointError, match=r"model\.safetensors can't be written .*rollout\.exports_dir"):
        write(tmp_path / "v1", weights_of(30, 64))


def test_weights_that_differ_from_the_source_are_refused(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "llama")
    weights = load_file(model / "model.safetensors")
    shapes = {name: entry.shape for name, entry in read_tensors(model).items()}
    last = list(weights)[-1]

    def export(stream: list[tuple[str, torch.Tensor]]) -> None:
        write_folder(stream, model, tmp_path / "out", "float32", shapes=shapes)

    rows = list(weights.items())
    for stream, message in (
        (rows[:-1], f"differ.*{last}"),
        ([*rows, ("more.weight", torch.ones(1))], r"differ.*more\.weight"),
        ([*rows, rows[0]], "twice"),
        ([*rows[:-1], (last, torch.ones(3))], r"has shape \(3,\)"),
    ):
        with pytest.raises(CheckpointError, match=message):
            export(stream)
    with pytest.raises(ConfigError, match="int8"):
        write_folder(rows, model, tmp_path / "out", "int8", shapes=shapes)


# ----------------------------------------------------------------------------------------------------------------
# placement


def test_exports_go_to_the_disk_that_was_asked_for(tmp_path: Path) -> None:
    spaces = [Workspace(tmp_path / root / "run-1") for root in ("a", "b")]
    for space in spaces:
        assert space.exports == space.folder / "exports"
        space.place_exports(str(tmp_path / "nvme"))
        space.check_exports()
    assert len({space.exports for space in spaces}) == 2 and all(
        space.exports.parent == tmp_path / "nvme" for space in spaces
    )
    spaces[0].place_exports(None)
    (tmp_path / "file").write_text("")
    spaces[0].place_exports(str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"rollout\.exports_dir: .*can't be written"):
        spaces[0].check_exports()
    with pytest.raises(ConfigError, match="absolute"):
        load_config(None, ["rollout.exports_dir=nvme/exports"])
    assert (
        load_config(None, ["rollout.exports_dir=/nvme", "rollout.export_dtype=fp8_block"]).rollout.exports_dir
        == "/nvme"
    )
    with pytest.raises(ConfigError, match="export_writers"):
        load_config(None, ["policy.export_writers=0"]).policy.validate(cuda=False)


def test_the_manifest_takes_digests_from_memory_and_refuses_a_file_that_changed_since(tmp_path: Path) -> None:
    entry = None
    with new_export(tmp_path, 1) as folder:
        save_file({"a": torch.ones(10)}, folder / "model.safetensors")
        entry = file_entry(folder / "model.safetensors")
    assert read_manifest(tmp_path / "v000001").files["model.safetensors"] == entry
