"""Pickles in checkpoints and model folders: none is read that would run anything, and ours hold known names only."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import zipfile
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch

from pact_nemo.checkpoints import pickles, random_state, resume_manifest
from pact_nemo.errors import CheckpointError, ConfigError
from pact_nemo.runtime import tensor_files
from pact_nemo.serving.config import RolloutServerConfig
from pact_nemo.serving.server import RolloutServer
from tests.faults import tally


class Evil:
    """What a pickle of it does when it is read."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def seal(base: Path) -> None:
    """Write the manifest anew: whoever can change a file of a checkpoint can do that too."""
    (base / resume_manifest.MANIFEST_NAME).unlink(missing_ok=True)
    resume_manifest.write_manifest(base)


def checkpoint(folder: Path) -> Path:
    """A checkpoint as megatron writes it, with a hidden object, made without megatron."""
    from torch.distributed.checkpoint import save

    weights = folder / "step_000001" / "weights"
    save({"w": torch.arange(4.0), "object": {"a": 1}}, checkpoint_id=weights, no_dist=True)
    torch.save({"args": 1}, weights / "common.pt")
    (weights.parent / "state.json").write_text("{}")
    seal(weights.parent)
    return weights.parent


def test_a_checkpoint_as_it_is_written_passes(tmp_path: Path) -> None:
    resume_manifest.verify(checkpoint(tmp_path))


def test_pickles_that_would_run_something_are_refused_unread(tmp_path: Path) -> None:
    mark, base = tmp_path / "mark", checkpoint(tmp_path)
    index, common = base / "weights" / ".metadata", base / "weights" / "common.pt"
    whole = {path: path.read_bytes() for path in (index, common)}

    def archive(data: bytes) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr("archive/data.pkl", data)
        return buffer.getvalue()

    # names given by way of the memo, by opcodes of protocol 0, by two texts from elsewhere on the stack, and by the
    # extension registry
    popped = b"\x80\x04\x8c\x05posix\x8c\x06system\x8c\x0bcollections\x8c\x0bOrderedDict00\x93\x8c\x02ls\x85R."
    marked = b"\x80\x04\x8c\x05posix\x8c\x06system(\x8c\x0bcollections\x8c\x0bOrderedDict1\x93\x8c\x02ls\x85R."
    memo = b"\x80\x04\x8c\x05posix\x940\x8c\x06system\x940h\x00h\x01\x93\x8c\x02ls\x85R."
    pickles = [pickle.dumps(Evil(mark), protocol=protocol) for protocol in range(6)] + [
        popped,
        marked,
        memo,
        b"\x80\x02\x82\x01.",
        b"",
        b"\x80\x04",
    ]
    for data in pickles:
        for path, content in ((index, data), (common, archive(data))):
            path.write_bytes(content)
            seal(base)
            with pytest.raises(CheckpointError, match=re.escape(path.name)):
                resume_manifest.verify(base)
            path.write_bytes(whole[path])
    seal(base)
    resume_manifest.verify(base)
    assert not mark.exists()
    tally.record("pickles in checkpoints", injected=2 * len(pickles), survived=2 * len(pickles), lost=0)


def test_an_object_among_the_weights_is_looked_into_too(tmp_path: Path) -> None:
    from torch.distributed.checkpoint import save

    mark = tmp_path / "mark"
    base = checkpoint(tmp_path)
    shutil.rmtree(base / "weights")
    save({"w": torch.arange(4.0), "object": Evil(mark)}, checkpoint_id=base / "weights", no_dist=True)
    seal(base)
    with pytest.raises(CheckpointError, match="would run .*system"):
        resume_manifest.verify(base)
    assert not mark.exists()


def test_random_states_come_back_exactly_and_hold_no_pickle(tmp_path: Path) -> None:
    import random

    import numpy as np

    random.gauss(0, 1)
    np.random.standard_normal(3)
    torch.randn(5)
    states = json.loads(json.dumps([random_state.rng_state()]))
    before = random.random(), random.gauss(0, 1), np.random.standard_normal(4).tolist(), torch.randn(5).tolist()
    random_state.set_rng_state(states[0])
    assert (
        random.random(),
        random.gauss(0, 1),
        np.random.standard_normal(4).tolist(),
        torch.randn(5).tolist(),
    ) == before


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.ckpt"])
def test_a_model_folder_of_pickles_is_refused_by_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(pickle.dumps(Evil(tmp_path / "mark")))
    with pytest.raises(CheckpointError, match=re.escape(name)):
        tensor_files.read_tensors(tmp_path)
    with pytest.raises(ConfigError, match=re.escape(name)):
        RolloutServer(RolloutServerConfig(device="cpu"), tmp_path, log_file=tmp_path / "log").launch()
    assert not (tmp_path / "mark").exists()


def test_a_file_beside_the_manifest_is_refused(tmp_path: Path) -> None:
    base = checkpoint(tmp_path)
    (base / "weights" / "extra.pt").write_bytes(pickle.dumps(Evil(tmp_path / "mark")))
    with pytest.raises(CheckpointError, match=r"extra\.pt is not in the manifest"):
        resume_manifest.verify(base)


def test_names_are_listed_without_running_anything(tmp_path: Path) -> None:
    assert pickles.names_in(pickle.dumps(Evil(tmp_path / "mark"))) == {"posix.system"}
    assert not (tmp_path / "mark").exists()


class _Fetched:
    """Pickled as ``getattr(owner, name)``."""

    def __init__(self, owner: Any, name: str):
        self.owner, self.name = owner, name

    def __reduce__(self) -> Any:
        return getattr, (self.owner, self.name)


def test_getattr_in_a_checkpoint_may_fetch_members_of_known_enumerations_and_nothing_else() -> None:
    """Early Python 3.11 pickles enumerations so; elsewhere this pickle is made by hand."""
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

    known = frozenset({"torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING", "pathlib.PosixPath"})
    members = [_Fetched(_MEM_FORMAT_ENCODING, member.name) for member in _MEM_FORMAT_ENCODING]
    pickles.check_pickle(pickle.dumps(members), known, "index")
    for owner, name in (
        (Path.cwd().__class__, "unlink"),
        (_MEM_FORMAT_ENCODING, "mro"),
        (_MEM_FORMAT_ENCODING, "__subclasses__"),
    ):
        with pytest.raises(CheckpointError, match="would run builtins.getattr"):
            pickles.check_pickle(pickle.dumps([*members, _Fetched(owner, name)]), known, "index")
    with pytest.raises(CheckpointError, match="would run .*Decimal"):
        pickles.check_pickle(pickle.dumps([*members, Decimal(1)]), known, "index")
