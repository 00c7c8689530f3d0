"""The processes of a machine look at an export once, and any change of it has it looked at again."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from pact_nemo.checkpoints import verified
from pact_nemo.checkpoints.manifest import new_export
from pact_nemo.errors import CheckpointError


@pytest.fixture
def export(tmp_path: Path) -> Path:
    with new_export(tmp_path / "exports", 3) as folder:
        (folder / "config.json").write_text("{}")
        save_file({"w": np.arange(4096, dtype=np.float32)}, folder / "model.safetensors")
    return tmp_path / "exports" / "v000003"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every hashing of an export."""
    seen: list[str] = []
    real = verified.verify_manifest

    def counted(folder: Path, *, expect_version: int | None = None, digests: bool = True):
        if digests:
            seen.append(str(folder))
            time.sleep(0.05)  # the others come meanwhile
        return real(folder, expect_version=expect_version, digests=digests)

    monkeypatch.setattr(verified, "verify_manifest", counted)
    return seen


def test_eight_readers_hash_once(export: Path, hashed: list[str], tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    together = threading.Barrier(8)

    def read(_: int) -> int:
        together.wait(10)
        return verified.verify_once(export, expect_version=3, notes=notes).version

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(read, range(8))) == [3] * 8
    assert len(hashed) == 1


def test_a_process_of_its_own_reads_the_note(export: Path, hashed: list[str]) -> None:
    """In the private folder that the machine's processes share."""
    code = "import sys; from pact_nemo.checkpoints.verified import verify_once; verify_once(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(export)], check=True, timeout=60)
    place = verified._notes()
    assert place is not None and place.stat().st_mode & 0o077 == 0
    verified.verify_once(export, expect_version=3)
    assert hashed == []


@pytest.mark.parametrize("kind", ["flipped in place", "flipped in a new file", "truncated", "other version"])
def test_what_changed_is_not_let_pass(export: Path, hashed: list[str], tmp_path: Path, kind: str) -> None:
    verified.verify_once(export, notes=tmp_path)
    assert len(hashed) == 1
    weights = export / "model.safetensors"
    data, before = bytearray(weights.read_bytes()), weights.stat()
    data[-1] ^= 1
    if kind == "flipped in a new file":
        weights.unlink()
    if kind != "other version":
        weights.write_bytes(data[:-1] if kind == "truncated" else data)
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a copy that keeps the times
    with pytest.raises(CheckpointError):
        verified.verify_once(export, expect_version=4 if kind == "other version" else 3, notes=tmp_path)


def test_a_look_holds_for_minutes_only(
    export: Path, hashed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verified.verify_once(export, notes=tmp_path)
    later = time.time() + 2 * verified.HOLDS_S
    monkeypatch.setattr(verified.time, "time", lambda: later)
    verified.verify_once(export, notes=tmp_path)
    assert len(hashed) == 2


def test_without_a_private_folder_everybody_hashes(
    export: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verified, "_notes", lambda: None)
    for _ in range(2):
        verified.verify_once(export)
    assert len(hashed) == 2
