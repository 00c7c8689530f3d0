"""A process that has a small policy ready and saves it in forked children, each of which is cut where it is told
(tests/faults/cutter.c).

Reads one JSON job a line, answers with one line each. It has no gloo threads, which a fork would not carry over: its
process group is torch's fake one, exact for a single rank. What the children write is what any trainer writes.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # a forked OpenMP pool would wait for threads that are gone

import torch
import torch.distributed as dist

torch.set_num_threads(1)
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402

from pact_nemo.checkpoints import hf, manifest, resume, resume_folders  # noqa: E402
from pact_nemo.errors import PactError  # noqa: E402
from pact_nemo.policy.config import ADAPTER, MERGED, LoraConfig, OptimizerConfig, PolicyConfig  # noqa: E402
from pact_nemo.policy.policy import MegatronPolicy  # noqa: E402
from tests.workers.policy_kit import loss_fn, make_trees  # noqa: E402

TREES = make_trees(2, seed=21)
KEEP = 1


def build(source: Path, rank: int = 0) -> MegatronPolicy:
    """The policy that savers and checkers have; with a rank, of adapters."""
    settings = PolicyConfig(precision="fp32", micro_batch_tokens=96, logprob_chunk=16, lora=LoraConfig(rank=rank))
    return MegatronPolicy(settings, OptimizerConfig(lr=1e-3, eps=1e-5), source, seed=1, total_steps=8)


def save(policy: MegatronPolicy, root: Path) -> None:
    resume.save(policy, root, {"step": policy.step})
    resume_folders.prune(root, KEEP)


def background(policy: MegatronPolicy, root: Path) -> None:
    """As the training loop does: goes on with the next step while the last one is being written."""
    saving = resume.BackgroundSave(policy, root, {"step": policy.step})
    policy.update(TREES, loss_fn)
    saving.finish()
    resume_folders.prune(root, KEEP)


def export(policy: MegatronPolicy, root: Path) -> None:
    kind = MERGED if policy.adapters is None else ADAPTER
    hf.export_version(policy, root, policy.step, kind=kind, dtype="float32")
    manifest.prune_exports(root, KEEP)


JOBS = {"save": save, "background": background, "export": export}


def child(policy: MegatronPolicy, job: dict[str, Any], cutter: Any, answer: int) -> None:
    root = Path(job["root"])
    if job.get("uid"):
        os.setgid(job["uid"])
        os.setuid(job["uid"])
    said: dict[str, Any] = {"error": None}
    if cutter is not None:
        cutter.cutter_arm(str(root).encode(), job.get("cut", 0), job.get("mode", 0), job.get("errno", 0))
    try:
        JOBS[job["kind"]](policy, root)
    except PactError as error:
        said = {"error": str(error), "type": type(error).__name__}
    except BaseException as error:  # what must not happen is told, too
        said = {"error": repr(error), "type": type(error).__name__}
    if cutter is not None:
        cutter.cutter_disarm()
    if job.get("again"):  # the fault is over: the same process saves once more
        try:
            JOBS[job["kind"]](policy, root)
        except BaseException as error:
            said["again"] = repr(error)
    os.write(answer, json.dumps(said).encode())


def main() -> None:
    source = Path(sys.argv[1])
    cutter = ctypes.CDLL(os.environ["PACT_CUTTER"]) if "PACT_CUTTER" in os.environ else None
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    new_group = dist.new_group
    dist.new_group = lambda *args, **kwargs: new_group(
        *args, **{**kwargs, "backend": "fake"}
    )  # megatron asks for gloo groups by name
    policy = build(source, int(sys.argv[2]))
    policy.update(TREES, loss_fn)
    at = 1
    with (
        tempfile.TemporaryDirectory() as warm
    ):  # what is imported and cached at the first save is not imported by every child
        for kind, action in JOBS.items():
            if kind != "background":
                action(policy, Path(warm) / kind)
    print(json.dumps({"ready": os.getpid()}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        while at < job["step"]:
            policy.update(TREES, loss_fn)
            at += 1
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nothing is left of a test that failed
            os.close(read)
            try:
                if job.get("stop"):  # until a tracer has attached
                    os.kill(os.getpid(), signal.SIGSTOP)
                child(policy, job, cutter, write)
            finally:
                os._exit(0)
        os.close(write)
        if job.get("stop"):
            os.waitpid(pid, os.WUNTRACED)
            print(json.dumps({"stopped": pid}), flush=True)
        _, status = os.waitpid(pid, 0)
        try:
            os.killpg(
                pid, signal.SIGKILL
            )  # before the pipe is read: who is left of the group has its other end open, too
        except ProcessLookupError:
            pass
        with os.fdopen(read, "rb") as pipe:
            said = pipe.read()
        answer = {"killed": os.WIFSIGNALED(status), "count": cutter.cutter_count() if cutter is not None else 0}
        print(json.dumps(answer | (json.loads(said) if said else {})), flush=True)


if __name__ == "__main__":
    main()
