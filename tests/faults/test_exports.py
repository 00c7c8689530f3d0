"""An export that is torn, truncated, bit-flipped, mixed of two versions, or of another version than due is refused
before any server hears of it.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from pact_nemo.checkpoints import hf, manifest
from pact_nemo.errors import CheckpointError
from pact_nemo.policy.export.hf_folder import write_folder
from pact_nemo.policy.export.layout import LayoutSettings
from pact_nemo.runtime.tensor_files import read_tensors
from pact_nemo.serving.client import RolloutClient
from pact_nemo.serving.endpoint import ServerEndpoint
from pact_nemo.serving.refit import refit
from tests.faults import tally
from tests.workers.policy_kit import make_model

VERSIONS = (3, 4)


class Weights:
    """Two versions of one model, written as a policy writes them, in several files."""

    def __init__(self, source: Path, version: int):
        self.source, self.version = source, version

    def export_hf(
        self, folder: str | Path, *, dtype: str = "bfloat16", previous: object = None
    ) -> dict[str, manifest.FileEntry]:
        shapes = {name: entry.shape for name, entry in read_tensors(self.source).items()}
        draw = torch.Generator().manual_seed(self.version)
        weights = ((name, torch.randn(shape, generator=draw)) for name, shape in shapes.items())
        return write_folder(
            weights, self.source, folder, dtype, shapes=shapes, settings=LayoutSettings(file_bytes=20_000)
        )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("damage") / "hf", "llama", layers=1)


@pytest.fixture(scope="module")
def exports(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("exports")
    for version in VERSIONS:
        hf.export_version(Weights(source, version), root, version, dtype="float32")
    assert len(list((root / "v000004").glob("*.safetensors"))) > 2
    return root


def client(version: int = 3) -> RolloutClient:
    """Of a server that isn't there: whoever asks it anything gets a ServerError, not the CheckpointError that is
    expected.
    """
    return RolloutClient(
        ServerEndpoint("http://127.0.0.1:9", "key"),
        weight_version=version,
        request_timeout_s=1.0,
        connect_retries=0,
        admin_timeout_s=1.0,
    )


def damage(draw: random.Random, folder: Path, other: Path) -> str:
    """Do one thing to an export that is to be found out. Returns what."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    weights = [path for path in files if path.suffix == ".safetensors"]
    kind = draw.choice(
        [
            "flip",
            "flip header",
            "flip manifest",
            "truncate",
            "extend",
            "zeros",
            "swap",
            "swap manifest",
            "missing",
            "stray",
            "cross",
        ]
    )
    path = draw.choice(files)
    if kind == "flip":
        data = bytearray(path.read_bytes())
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(bytes(data))
    elif kind == "flip header":
        path = draw.choice(weights)
        data = bytearray(path.read_bytes())
        data[draw.randrange(8 + int.from_bytes(data[:8], "little"))] ^= 1 << draw.randrange(8)
        path.write_bytes(bytes(data))
    elif kind == "flip manifest":
        path = folder / manifest.MANIFEST_NAME
        data = bytearray(path.read_bytes())
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(bytes(data))
    elif kind == "truncate":
        path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])
    elif kind == "extend":
        path.write_bytes(path.read_bytes() + draw.randbytes(draw.randint(1, 100)))
    elif kind == "zeros":  # what a file system may leave of a file whose size reached the disk and whose data didn't
        path = draw.choice(weights)
        data = path.read_bytes()
        start = draw.randrange(len(data))
        path.write_bytes(data[:start] + bytes(len(data) - start))
        if not any(data[start:]):
            return "nothing"
    elif kind == "swap":  # a weight file of another version
        path = draw.choice(weights)
        shutil.copy(other / path.name, path)
    elif kind == "swap manifest":
        shutil.copy(other / manifest.MANIFEST_NAME, folder)
    elif kind == "missing":
        path.unlink()
    elif kind == "stray":  # a loader would read it too
        shutil.copy(weights[0], folder / "model-99999.safetensors")
    else:  # two files of this very version under each other's names
        first, second = draw.sample(weights, 2)
        one, two = first.read_bytes(), second.read_bytes()
        first.write_bytes(two), second.write_bytes(one)
    return f"{kind} {path.name}"


def harmless(folder: Path, whole: Path) -> bool:
    """Whether the manifest still says the very same: a flipped bit in a free-text fact, in white space or in the case
    of a hexadecimal digit.
    """
    try:
        return (
            manifest.read_manifest(folder).files == manifest.read_manifest(whole).files
            and manifest.read_manifest(folder).version == VERSIONS[1]
        )
    except CheckpointError:
        return False


def refused(exports: Path, source: Path, folder: Path, seeds: range) -> int:
    count = 0
    for seed in seeds:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(exports / "v000004", folder)
        what = damage(random.Random(seed), folder, exports / "v000003")
        if what == "nothing" or "manifest" in what and harmless(folder, exports / "v000004"):
            continue
        try:
            refit(client(), folder, 4, like=source)
        except CheckpointError as error:
            assert str(folder) in str(error), (seed, what, error)
            count += 1
        else:
            raise AssertionError(f"seed {seed}: {what} was served")
    return count


def test_whole_exports_reach_the_server(exports: Path, source: Path) -> None:
    """The tests below can fail: an undamaged export goes on to the server."""
    from pact_nemo.errors import ServerError

    with pytest.raises(ServerError, match="can't be reached"):
        refit(client(), exports / "v000004", 4, like=source)


def test_damaged_exports_are_refused(exports: Path, source: Path, tmp_path: Path) -> None:
    seeds = range(300)
    assert refused(exports, source, tmp_path / "v000004", seeds) > 280


@pytest.mark.slow
@pytest.mark.faults
def test_thousands_of_damaged_exports_are_refused(exports: Path, source: Path, tmp_path: Path) -> None:
    count = refused(exports, source, tmp_path / "v000004", range(1000, 6000))
    tally.record("export damaged", injected=count, survived=count, lost=0)


@pytest.mark.parametrize(
    ("folder", "due", "served"), [("v000003", 4, 3), ("v000004", 5, 4), ("v000003", 3, 4), ("v000004", 3, 3)]
)
def test_exports_out_of_order_are_refused(exports: Path, source: Path, folder: str, due: int, served: int) -> None:
    with pytest.raises(CheckpointError, match="says version|versions only grow"):
        refit(client(served), exports / folder, due, like=source)


def test_the_server_checks_what_it_sees_itself(exports: Path, tmp_path: Path) -> None:
    """A server on another machine may see another state of the folder than the trainer, who verified it."""
    pytest.importorskip("vllm")
    from pact_nemo.serving.worker import RefitExtension

    loaded: list[str] = []

    class Worker(RefitExtension):
        class model_runner:
            @staticmethod
            def get_model() -> torch.nn.Module:
                return torch.nn.Module()

        def reload_weights(self, weights_path: str) -> None:
            loaded.append(weights_path)
            if weights_path.endswith("breaks"):
                raise RuntimeError("half way")

    worker = Worker()
    assert worker.pact_heartbeat() == {"version": None}
    worker.pact_load_weights(str(exports / "v000003"), 3, True)
    assert worker.pact_heartbeat() == {"version": 3} and len(loaded) == 1
    for kind, verify in (("old", False), ("truncated", False), ("flipped", True)):
        folder = tmp_path / kind
        shutil.copytree(exports / ("v000003" if kind == "old" else "v000004"), folder)
        path = next(folder.glob("*.safetensors"))
        data = path.read_bytes()
        if kind != "old":
            path.write_bytes(data[:-1] if kind == "truncated" else data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(CheckpointError):
            worker.pact_load_weights(str(folder), 4, verify)
    assert worker.pact_heartbeat() == {"version": 3} and len(loaded) == 1, "nothing was loaded"
    shutil.copytree(exports / "v000004", tmp_path / "breaks")
    with pytest.raises(RuntimeError):
        worker.pact_load_weights(str(tmp_path / "breaks"), 4, True)
    assert worker.pact_heartbeat() == {"version": -1}, "neither the old nor the new weights"


def test_a_manifest_of_nonsense_is_refused(exports: Path, tmp_path: Path) -> None:
    folder = tmp_path / "v000004"
    shutil.copytree(exports / "v000004", folder)
    path = folder / manifest.MANIFEST_NAME
    row = json.loads(path.read_text())
    name = next(iter(row["files"]))
    rows = [
        [],
        None,
        7,
        {**row, "schema": 99},
        {**row, "files": []},
        {**row, "files": {}},
        {**row, "files": {name: {}}},
        {**row, "version": "four"},
        {**row, "files": {**row["files"], name: {"size": -1, "blake3": []}}},
        {**row, "files": {**row["files"], "../../etc/passwd": {"size": 1}}},
    ]
    for nonsense in rows:
        path.write_text(json.dumps(nonsense))
        with pytest.raises(CheckpointError):
            manifest.verify_manifest(folder, expect_version=4)
