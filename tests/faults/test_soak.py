"""Hundreds of steps of a tiny run through real vLLM: what grows, and how fast. ``PACT_SOAK_STEPS`` (500) sets how
many.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import theilslopes

from tests.faults import tally
from tests.faults.kit import REPO, every_kind_of_weights
from tests.workers.policy_kit import make_chat_model

KEEP = 5  #: steps whose rollouts stay on disk
LOOK_S = 2.0
SETTLED = 0.3  #: of the run, after which caches are full and slopes are taken


@dataclass
class Sample:
    """One look at a run: steps done; of trainer and server with all their children, MiB, file descriptors, threads and
    processes; ids of zombies; MiB on disk, but for the metrics, which are meant to grow."""

    step: int
    trainer_mb: float
    server_mb: float
    descriptors: int
    threads: int
    processes: int
    zombies: list[int]
    disk_mb: float
    metrics_mb: float


def family(root: int) -> list[int]:
    """``root`` and everything below it."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            children.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(int(stat.parent.name))
        except OSError:
            continue
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def look(root: int, run: Path) -> Sample | None:
    """None when the run is ending."""
    memory, descriptors, threads, members = {"trainer": 0.0, "server": 0.0}, 0, 0, family(root)
    zombies: list[int] = []
    try:
        group = os.getpgid(root)
        for pid in members:
            place = Path("/proc") / str(pid)
            status = dict(line.split(":\t", 1) for line in (place / "status").read_text().splitlines() if ":\t" in line)
            if status["State"].startswith("Z"):
                zombies.append(pid)
                continue
            private = (place / "smaps_rollup").read_text()
            pages = sum(
                int(line.split()[1]) for line in private.splitlines() if line.startswith("Pss:")
            )  # shared pages once
            memory["trainer" if os.getpgid(pid) == group else "server"] += pages / 1024
            descriptors += len(list((place / "fd").iterdir()))
            threads += int(status["Threads"])
        rows = (run / "metrics.jsonl").read_text().count("\n")
        files = {path: path.stat().st_size / 2**20 for path in run.rglob("*") if path.is_file()}
    except OSError:  # of a process or file that went while it was looked at
        return None
    grown = sum(size for path, size in files.items() if path.name == "metrics.jsonl" or "tfevents" in path.name)
    return Sample(
        rows,
        memory["trainer"],
        memory["server"],
        descriptors,
        threads,
        len(members),
        zombies,
        sum(files.values()) - grown,
        grown,
    )


def settings(model: Path, runs: Path, steps: int) -> list[str]:
    """A tiny run that writes, rotates and deletes all the time."""
    return [
        f"model.path={model}",
        f"run.root={runs}",
        f"trainer.steps={steps}",
        "trainer.batch_size=2",
        "trainer.mini_batch_size=1",
        "trainer.checkpoint_every=5",
        "trainer.keep_checkpoints=2",
        "trainer.async_checkpoint=true",
        f"trainer.keep_rollouts={KEEP}",
        "objective.group_size=2",
        "objective.kl_coef=0.01",
        "rollout.importance=tis",
        "warmup.steps=0",
        "evaluation.before=false",
        "evaluation.after=false",
        "tasks.max_eval=2",
        "tasks.max_train=12",
        "rollout.sampling.max_turn_tokens=12",
        "rollout.sampling.max_turns=2",
        "rollout.server.log_stats=true",
        "rollout.server.log_mb=1",
        "rollout.server.cpu_threads=1",
        # memory of the KV cache is taken from the system block by block as it is first used, 1 GiB in 500 steps: this
        # one is small and full at once
        "rollout.server.extra_args=[--num-gpu-blocks-override=256]",
    ]


def watched(words: list[str], folder: Path) -> list[Sample]:
    """Looks at a run with these settings, from its first step to its end, which has to be a good one."""
    log = open(folder / "run.log", "wb")  # noqa: SIM115 - closed below
    command, environment = [sys.executable, "recipes/pact_bfcl.py", *words], os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(command, cwd=REPO, stdout=log, stderr=log, start_new_session=True, env=environment)
    samples: list[Sample] = []
    try:
        while run.poll() is None:
            time.sleep(LOOK_S)
            sample = look(run.pid, folder / "runs" / "latest")
            if sample is not None and sample.step > 0:
                samples.append(sample)
    finally:
        run.kill()
        run.wait()
        log.close()
    assert run.returncode == 0, (folder / "run.log").read_text()[-3000:]
    return samples


def growth(settled: list[Sample]) -> dict[str, float]:
    """Of every number, per 100 steps."""
    at = np.array([sample.step for sample in settled], dtype=float)
    slopes = {}
    for name in ("trainer_mb", "server_mb", "descriptors", "threads", "processes", "disk_mb", "metrics_mb"):
        values = np.array([getattr(sample, name) for sample in settled], dtype=float)
        slopes[name] = float(theilslopes(values, at)[0]) * 100  # not moved by checkpoint writers, which come and go
        print(
            f"{name}: {values[0]:.1f} at step {at[0]:.0f}, {values[-1]:.1f} at step {at[-1]:.0f}, {slopes[name]:+.3f}"
            " per 100 steps"
        )
    return slopes


def longest_zombie(samples: list[Sample]) -> int:
    """The number of looks in which one and the same ended process was still there."""
    waits = Counter(
        pid for sample in samples for pid in sample.zombies
    )  # a writer that has ended is one until the step is over
    longest, together = max(waits.values(), default=0), max(len(sample.zombies) for sample in samples)
    print(
        f"zombies: {len(waits)} in all, {together} at a time, none for more than {longest} of {len(samples)} looks, one"
        f" each {LOOK_S:g} s"
    )
    return longest


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("words", every_kind_of_weights())
def test_a_long_run_stays_as_large_as_it_is(words: list[str], tmp_path: Path) -> None:
    steps = int(os.environ.get("PACT_SOAK_STEPS", "500"))
    samples = watched([*settings(make_chat_model(tmp_path / "model"), tmp_path / "runs", steps), *words], tmp_path)
    folder = (tmp_path / "runs" / "latest").resolve()
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == steps
    assert len(list((folder / "rollouts").iterdir())) == min(KEEP, steps)
    assert (folder / "server.log").stat().st_size < 2 * 2**20

    settled = [sample for sample in samples if SETTLED * steps <= sample.step < steps]
    slopes, longest = growth(settled), longest_zombie(samples)
    if where := os.environ.get("PACT_SOAK_OUT"):
        Path(where).write_text(json.dumps([vars(sample) for sample in samples]))
    shutil.rmtree(tmp_path / "runs")
    tally.record("steps of a soak", injected=steps, survived=steps, lost=0)
    assert longest <= 8 and len(samples[-1].zombies) <= 1
    # per 100 steps: memory 1 % of what it is, the rest nothing that would be seen in a thousand
    assert (
        slopes["trainer_mb"] < 0.01 * settled[-1].trainer_mb and slopes["server_mb"] < 0.01 * settled[-1].server_mb
    ), slopes
    assert (
        abs(slopes["descriptors"]) < 1
        and abs(slopes["threads"]) < 1
        and abs(slopes["processes"]) < 0.5
        and abs(slopes["disk_mb"]) < 1
    ), slopes
