"""A save or an export that is cut at any system call, or whose disk refuses, leaves a whole checkpoint of the old or
the new step; never a mixture.

Real saves of a real (small) policy, in forked processes (saver.py) that cutter.c ends, or whose calls it fails, at the
Nth call that changes something under the folder. The quick tests take a sample of N and kinds; the slow ones take every
N.
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from pact_nemo.checkpoints import manifest, resume, resume_folders, resume_manifest
from pact_nemo.policy.distributed import init_distributed
from pact_nemo.policy.policy import MegatronPolicy
from tests.faults import tally
from tests.faults.kit import COUNT, FAIL_FROM, FAIL_ONCE, KILL, KILL_SELF, TORN, Saver, build_cutter
from tests.workers.policy_kit import make_model

KINDS = ("save", "background", "export")
REMEDY = re.compile(
    r"can't be (written|deleted) .*(make room|writable again|check that disk|free or repair)", re.DOTALL
)


@dataclass
class Stage:
    """What all tests share: the saver, what it saves from step 1 (``template``) and 2, and a policy to load checkpoints
    into.
    """

    saver: Saver
    folder: Path
    checker: MegatronPolicy
    prints: dict[str, dict[int, str]] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    loaded: dict[str, tuple[int, str]] = field(
        default_factory=dict
    )  # what loading the same files, byte for byte, has given
    checks: int = 0

    def root(self, kind: str, name: str = "root") -> Path:
        """A fresh copy of the folder with the old checkpoint or export in it."""
        root = self.folder / name
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(self.folder / "template" / ("export" if kind == "export" else "save"), root)
        return root

    def fingerprint(self, kind: str, folder: Path) -> tuple[int, str]:
        """Step and content of a checkpoint as a resume sees it, or of an export as a server does; raises
        CheckpointError when it is refused.
        """
        digest = hashlib.sha256()
        if kind == "export":
            step = manifest.verify_manifest(folder).version
            for path in sorted(folder.iterdir()):
                if path.name != manifest.MANIFEST_NAME:
                    digest.update(path.name.encode() + path.read_bytes())
            return step, digest.hexdigest()
        resume_manifest.verify(folder)
        for path in sorted(folder.rglob("*")):
            digest.update(str(path.relative_to(folder)).encode() + (path.read_bytes() if path.is_file() else b""))
        files = digest.hexdigest()
        if files not in self.loaded:
            self.loaded[files] = self._load(folder)
        return self.loaded[files]

    def _load(self, folder: Path) -> tuple[int, str]:
        digest = hashlib.sha256()
        state = resume.load(self.checker, folder)
        assert state == {"step": self.checker.step}
        values = [param.detach() for param in self.checker.chunks[0].parameters()]
        trained = sum(param.requires_grad for param in self.checker.chunks[0].parameters())
        for one in getattr(self.checker.optimizer, "chained_optimizers", [self.checker.optimizer]):
            values += [
                value for entry in one.optimizer.state.values() for value in entry.values() if torch.is_tensor(value)
            ]
        assert len(values) >= 3 * trained  # the moments are among them
        for value in values:
            digest.update(value.numpy().tobytes())
        return self.checker.step, digest.hexdigest()

    def visible(self, kind: str, root: Path) -> list[Path]:
        if kind == "export":
            return [manifest.export_path(root, version) for version in manifest.versions(root)]
        return [resume_folders.checkpoint_path(root, step) for step in resume_folders.steps(root)]

    def check(self, kind: str, root: Path, *, go_on: bool = True) -> int:
        """What has to hold however a save ended. Returns the newest whole step."""
        folders = self.visible(kind, root)
        assert folders, "the old one is gone"
        for folder in folders:  # whatever is visible is whole, and is bit for bit what was saved under that name
            step, content = self.fingerprint(kind, folder)
            assert folder.name.endswith(f"{step:06d}") and self.prints[kind][step] == content, folder
        if kind != "export":
            assert resume_folders.latest_complete(root) == folders[-1]
            resume_folders.remove_unfinished(root)
        if not go_on:
            return step
        self.checks += 1
        if (
            step == 1 and self.checks % 8
        ):  # the next save, at the end of the last cut's folder, in one case out of eight: it takes longest
            leftovers = {path.name for path in root.iterdir()} - {"latest", *(folder.name for folder in folders)}
            if kind == "export":
                manifest.prune_exports(root, 1)
                leftovers = {path.name for path in root.iterdir()} - {folders[-1].name}
            assert not leftovers
            return step
        if step == 1:
            said = self.saver.run(kind=kind, root=root)
            assert said["error"] is None, said
        elif kind == "export":  # a resumed run prunes before and after each refit
            manifest.prune_exports(root, 1)
        else:
            resume_folders.prune(root, 1)
        assert self.fingerprint(kind, self.visible(kind, root)[-1]) == (2, self.prints[kind][2])
        assert sorted(path.name for path in root.iterdir()) == (
            ["v000002"] if kind == "export" else ["latest", "step_000002"]
        ), "leftovers"
        return step


#: of all weights, or of adapters of that rank
every_kind = pytest.mark.parametrize("stage", [0, pytest.param(8, marks=pytest.mark.slow)], indirect=True)


@pytest.fixture(scope="module")
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """Its parameter, if there is one: the rank of the adapters that are saved."""
    rank = getattr(request, "param", 0)
    folder = tmp_path_factory.mktemp("cuts")
    cutter = build_cutter(folder)
    model = make_model(folder / "hf", "llama", layers=1)
    with Saver(model, cutter, folder / "saver.log", rank) as saver:
        for kind in ("save", "export"):
            assert saver.run(kind=kind, root=folder / "template" / kind, step=1)["error"] is None
        init_distributed(60)
        from tests.faults.saver import build

        stage = Stage(saver, folder, build(model, rank))
        for kind in KINDS:
            root = stage.root(kind)
            old = stage.fingerprint(kind, stage.visible(kind, root)[0])
            said = saver.run(kind=kind, root=root, mode=COUNT)
            assert said["error"] is None and not said["killed"]
            stage.calls[kind] = said["count"]
            new = stage.fingerprint(kind, stage.visible(kind, root)[-1])
            assert (old[0], new[0]) == (1, 2) and old[1] != new[1]
            stage.prints[kind] = dict((old, new))
        assert stage.prints["save"][2] == stage.prints["background"][2], (
            "a save in the background is of the weights of its step"
        )
        yield stage


def cut(stage: Stage, kind: str, mode: int, number: int) -> int:
    root = stage.root(kind)
    said = stage.saver.run(kind=kind, root=root, cut=number, mode=mode)
    assert said["killed"], said
    return stage.check(kind, root)


def refuse(stage: Stage, kind: str, mode: int, number: int, code: int) -> None:
    """The disk refuses, for good or once; then it is repaired and the same process saves again."""
    root = stage.root(kind)
    said = stage.saver.run(kind=kind, root=root, cut=number, mode=mode, errno=code, again=kind != "background")
    assert not said["killed"]
    if said["error"] is not None:
        assert said["type"] == "CheckpointError" and str(root) in said["error"] and REMEDY.search(said["error"]), said
    elif mode == FAIL_FROM:  # only what was left to delete, or a hint to the disk, can have been refused without harm
        assert stage.check(kind, root, go_on=False) == 2
    again = said.get("again")
    assert again is None or "exists already" in again, again
    stage.check(kind, root)


def sample(stage: Stage, kind: str, count: int) -> list[int]:
    """Numbers of calls, spread over the whole save, with the first and the last."""
    total = stage.calls[kind]
    return sorted({1, total, *random.Random(kind).sample(range(1, total + 1), min(count, total))})


@every_kind
@pytest.mark.parametrize("kind", KINDS)
def test_a_save_that_is_cut_leaves_the_old_or_the_new_checkpoint(stage: Stage, kind: str) -> None:
    steps = {cut(stage, kind, mode, number) for number in sample(stage, kind, 3) for mode in (KILL, TORN)}
    assert steps == {1, 2}


@every_kind
@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_refuses_is_told_and_the_old_checkpoint_stands(stage: Stage, kind: str) -> None:
    for number, code in zip(sample(stage, kind, 2), (errno.ENOSPC, errno.EROFS, errno.EIO, errno.EACCES), strict=False):
        refuse(stage, kind, FAIL_FROM, number, code)


def every(stage: Stage, kind: str) -> range:
    return range(1, stage.calls[kind] + 1)


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("mode", [KILL, TORN], ids=["killed", "torn"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_system_call_of_a_save_may_be_the_last(stage: Stage, kind: str, mode: int) -> None:
    steps = [cut(stage, kind, mode, number) for number in every(stage, kind)]
    assert steps == sorted(steps) and set(steps) == {1, 2}, "from some call on it is the new one, for good"
    tally.record(
        f"{kind} cut at each system call, {'torn' if mode == TORN else 'killed'}",
        injected=len(steps),
        survived=len(steps),
        lost=0,
    )


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("mode", [FAIL_FROM, FAIL_ONCE], ids=["from", "once"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS], ids=["ENOSPC", "EIO", "EROFS"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_system_call_of_a_save_may_be_refused(stage: Stage, kind: str, code: int, mode: int) -> None:
    for number in every(stage, kind):
        refuse(stage, kind, mode, number, code)
    name = (
        f"{kind} refused at each system call, {errno.errorcode[code]}"
        f" {'from there on' if mode == FAIL_FROM else 'once'}"
    )
    tally.record(name, injected=stage.calls[kind], survived=stage.calls[kind], lost=0)


def test_a_background_writer_that_is_killed_is_told(stage: Stage) -> None:
    """The writer alone (the kernel took its memory back, say): the trainer lives on and hears of it."""
    for number in (1, 7):
        root = stage.root("background")
        said = stage.saver.run(kind="background", root=root, cut=number, mode=KILL_SELF)
        assert (
            not said["killed"]
            and said["type"] == "CheckpointError"
            and "the previous checkpoint stands" in said["error"]
        ), said
        assert stage.check("background", root) == 1


def test_the_cutter_counts_what_the_kernel_sees(stage: Stage, tmp_path: Path) -> None:
    """No system call that changes something goes past it: strace counts the same number."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    for kind in KINDS:
        root = stage.root(kind)
        stage.saver.tell(kind=kind, root=root, mode=COUNT, stop=True)
        pid = stage.saver.hear()["stopped"]
        calls = "write,pwrite64,writev,pwritev,pwritev2,sendfile,copy_file_range,fsync,fdatasync,ftruncate,fallocate,"
        calls += "fchmod,chmod,mkdir,mkdirat,"
        calls += (
            "unlink,unlinkat,rmdir,truncate,rename,renameat,renameat2,link,linkat,symlink,symlinkat,open,openat,creat"
        )
        log = tmp_path / f"{kind}.log"
        tracer = subprocess.Popen(
            ["strace", "-f", "-y", "-s", "0", "-o", str(log), "-e", f"trace={calls}", "-p", str(pid)],
            stderr=subprocess.PIPE,
        )
        assert tracer.stderr is not None
        first = tracer.stderr.readline().decode()
        if "attached" not in first:
            os.kill(pid, 18)
            stage.saver.hear()
            pytest.skip(f"strace may not attach: {first.strip()}")
        os.kill(pid, 18)  # SIGCONT
        said = stage.saver.hear()
        tracer.wait(30)
        assert said["error"] is None, said
        seen = [line for line in log.read_text().splitlines() if touches(line, str(root))]
        assert len(seen) == said["count"] == stage.calls[kind], "\n".join(seen)


def touches(line: str, root: str) -> bool:
    """Whether a line of strace's is (the begin of) a call that changes something under the folder."""
    call = re.match(r"\d+ +(\w+)\((.*)", line)
    if call is None:
        return False
    name, rest = call.groups()
    if name in ("open", "openat", "creat") and not re.search(r"O_CREAT|O_TRUNC|O_TMPFILE", rest):
        return False
    if name in (
        "write",
        "pwrite64",
        "writev",
        "pwritev",
        "pwritev2",
        "fsync",
        "fdatasync",
        "ftruncate",
        "fallocate",
        "fchmod",
        "sendfile",
    ):
        rest = rest.split(",")[0]
    return root + "/" in rest or f"{root}>" in rest or f'{root}"' in rest
