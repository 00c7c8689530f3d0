"""Disks that really are full or read-only (a tmpfs of chosen size, remounted), and a folder that the run's user may no
longer write.

What :mod:`tests.faults.test_saves` injects at system calls, done by the kernel. Needs root; skipped elsewhere.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import tally
from tests.faults.test_saves import KINDS, REMEDY, Stage, stage

pytestmark = [
    pytest.mark.slow,
    pytest.mark.faults,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts disks and becomes another user"),
]
__all__ = ["stage"]  # the fixture
NOBODY = 65534
PAGE = 4096


def mount(*words: str) -> None:
    done = subprocess.run(["mount", *words], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"mount {' '.join(words)}: {done.stderr.strip()}")


@pytest.fixture()
def disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    mount("-t", "tmpfs", "-o", "size=1g", "tmpfs", str(place))
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def used(place: Path) -> int:
    state = os.statvfs(place)
    return (state.f_blocks - state.f_bfree) * state.f_frsize


def placed(stage: Stage, kind: str, disk: Path) -> Path:
    """The old checkpoint or export, on the disk."""
    root = disk / "root"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(stage.folder / "template" / ("export" if kind == "export" else "save"), root)
    return root


def refused(stage: Stage, kind: str, root: Path, **job: int) -> None:
    said = stage.saver.run(kind=kind, root=root, **job)
    assert said["type"] == "CheckpointError" and str(root) in said["error"] and REMEDY.search(said["error"]), said
    assert stage.check(kind, root, go_on=False) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_is_full_leaves_the_old_checkpoint_and_goes_on_once_there_is_room(
    stage: Stage, kind: str, disk: Path
) -> None:
    root = placed(stage, kind, disk)
    before = used(disk)
    assert stage.saver.run(kind=kind, root=root, mode=0)["error"] is None
    shutil.rmtree(root)
    sizes = 0
    for share in (0.0, 0.1, 0.4, 0.7, 0.95):  # of what the old one takes, which is what the new one needs
        root = placed(stage, kind, disk)
        room = before + int(share * before)
        mount("-o", f"remount,size={room // PAGE * PAGE}", str(disk))
        refused(stage, kind, root)
        mount("-o", "remount,size=1g", str(disk))
        stage.check(kind, root)
        sizes += 1
    tally.record(f"{kind} on a full disk", injected=sizes, survived=sizes, lost=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_became_read_only(stage: Stage, kind: str, disk: Path) -> None:
    root = placed(stage, kind, disk)
    mount("-o", "remount,ro", str(disk))
    refused(stage, kind, root)
    mount("-o", "remount,rw", str(disk))
    stage.check(kind, root)
    tally.record(f"{kind} on a read-only disk", injected=1, survived=1, lost=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_is_not_ours_any_more(stage: Stage, kind: str) -> None:
    place = Path(tempfile.mkdtemp(prefix="pact-faults-"))  # pytest's own folders are closed to other users
    try:
        place.chmod(0o755)
        root = placed(stage, kind, place)
        refused(stage, kind, root, uid=NOBODY)
        stage.check(kind, root)
    finally:
        shutil.rmtree(place)
    tally.record(f"{kind} without permission", injected=1, survived=1, lost=0)
