"""kill -9 at random moments of every phase of a run: what is resumed ends with the numbers and weights of a run that
was never killed.

Of the trainer, and of its rollout server; and SIGTERM, after which a run leaves by itself.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults import tally
from tests.faults.kit import every_kind_of_weights
from tests.faults.runner import durations, finished, nobody_left, open_stage, server_of

PHASES = (
    "set-up",
    "warm-up",
    "generation",
    "rollout",
    "score",
    "update",
    "refit",
    "checkpoint",
    "evaluation",
    "export",
)


every_kind = pytest.mark.parametrize("stage", every_kind_of_weights(), indirect=True)


@pytest.fixture(scope="module")
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Its parameter, if there is one: words of the configuration."""
    with open_stage(tmp_path_factory.mktemp("kills"), *getattr(request, "param", [])) as opened:
        yield opened


@pytest.fixture(scope="module")
def undisturbed(stage: dict[str, Any]) -> dict[str, Any]:
    """What the same run leaves that nobody disturbs (``left``), and how long its phases are (``lengths``)."""
    root = stage["folder"] / "undisturbed"
    code, phases = stage["runner"].play([*stage["words"], f"run.root={root}"], None)
    assert code == 0, stage["runner"].said()
    left, lengths = finished((root / "latest").resolve()), durations(phases)
    assert set(PHASES) <= set(lengths), sorted(lengths)
    assert any(row["reward/mean"] for row in left["metrics"] if row["stage"] == "rl")
    shutil.rmtree(root)
    return {"left": left, "lengths": lengths}


class Signaller:
    """Sends ``number`` to a run in its ``occurrence``-th time through ``phase``, ``after`` seconds from its begin;
    ``at`` says when it did.
    """

    def __init__(self, number: signal.Signals, phase: str, occurrence: int, after: float):
        self.number, self.phase, self.occurrence, self.after = number, phase, occurrence, after
        self.at: float | None = None

    def __call__(self, pid: int, phases: Path) -> None:
        try:
            while phases.read_text().count(f"start|{self.phase}|") < self.occurrence:
                os.kill(pid, 0)
                time.sleep(0.001)
            time.sleep(self.after)
            at = time.monotonic()
            os.kill(pid, self.number)
            self.at = at
        except ProcessLookupError:
            pass


def disturbed_runs(
    stage: dict[str, Any], undisturbed: dict[str, Any], number: signal.Signals, times: int, seed: int
) -> tuple[dict[str, list[float]], int, int]:
    """Runs of the same configuration, each sent the signal and resumed until it ends by itself, until there were
    ``times`` signals. Fails where one ends otherwise than the undisturbed one. Returns seconds from each signal to the
    end, by phase; runs; starts.
    """
    folder, runner, rng, lengths = stage["folder"], stage["runner"], random.Random(seed), undisturbed["lengths"]
    sent: dict[str, list[float]] = defaultdict(list)
    runs = starts = 0
    while sum(map(len, sent.values())) < times:
        root, resume = folder / f"disturbed-{seed}-{runs}", None
        while True:
            phase = rng.choice(PHASES)
            sender = Signaller(number, phase, rng.randint(1, 2), rng.random() * rng.choice(lengths[phase]))
            code, _ = runner.play([*stage["words"], f"run.root={root}"], resume, sender)
            starts += 1
            if sender.at is not None:
                sent[phase].append(time.monotonic() - sender.at)
            if code == 0:
                break
            assert code == (75 if number == signal.SIGTERM else -number), (code, phase, runner.said())
            nobody_left(folder)
            # where not even the configuration was written there is no run to resume
            resume = (root / "latest").resolve() if (root / "latest" / "config.yaml").is_file() else None
        found = finished((root / "latest").resolve())
        for key, value in undisturbed["left"].items():
            assert found[key] == value, f"{key} differs after {dict(sent)}"
        shutil.rmtree(root)
        nobody_left(folder)
        runs += 1
    return sent, runs, starts


@pytest.mark.slow
@pytest.mark.faults
@every_kind
def test_a_run_killed_twice_ends_as_if_it_never_was(stage: dict[str, Any], undisturbed: dict[str, Any]) -> None:
    assert disturbed_runs(stage, undisturbed, signal.SIGKILL, 2, seed=1)[0]


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.timeout(7200)
def test_a_hundred_kills_over_all_phases(stage: dict[str, Any], undisturbed: dict[str, Any]) -> None:
    kills = int(os.environ.get("PACT_KILLS", "100"))
    sent, runs, starts = disturbed_runs(stage, undisturbed, signal.SIGKILL, kills, seed=2)
    count = {phase: len(seconds) for phase, seconds in sent.items()}
    print(f"{sum(count.values())} kills in {runs} runs and {starts} starts: {count}")
    tally.record("kill -9 of the trainer", injected=sum(count.values()), survived=sum(count.values()), lost=0)
    assert kills < 100 or set(count) == set(PHASES)


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_sigterm_in_any_phase_checkpoints_and_leaves_soon(stage: dict[str, Any], undisturbed: dict[str, Any]) -> None:
    """Soon: what is left of the longest step's update and a checkpoint, and the time a process takes to leave."""
    times = int(os.environ.get("PACT_SIGTERMS", "20"))
    sent, runs, _ = disturbed_runs(stage, undisturbed, signal.SIGTERM, times, seed=3)
    lengths = undisturbed["lengths"]
    limit = sum(max(lengths[phase]) for phase in ("score", "update", "refit", "checkpoint", "warm-up")) + 10
    for phase, seconds in sorted(sent.items()):
        print(f"SIGTERM in {phase}: gone after {', '.join(f'{value:.1f}' for value in seconds)} s")
    assert max(max(seconds) for seconds in sent.values()) < limit
    total = sum(map(len, sent.values()))
    tally.record("SIGTERM", injected=total, survived=total, lost=0)


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_a_server_killed_at_random_moments_changes_nothing(stage: dict[str, Any], undisturbed: dict[str, Any]) -> None:
    """In generation, and in every other phase after the first one: nobody notices before the server is asked again."""
    kills, rng = int(os.environ.get("PACT_SERVER_KILLS", "20")), random.Random(4)
    lengths, done = undisturbed["lengths"], Counter[str]()

    def killer(pid: int, phases: Path) -> None:
        seen = 0
        while True:
            phase = rng.choice(("generation", "generation", "score", "update", "refit", "checkpoint"))
            after = rng.random() * rng.choice(lengths[phase])
            # a server that dies at its first start ends the run: generation begins when it is there
            while f"start|{phase}|" not in (text := phases.read_text())[seen:] or "end|warm-up|" not in text:
                if "start|export|" in text:
                    return
                time.sleep(0.001)
            time.sleep(after)
            seen = len(text)
            if (server := server_of(pid, stage["folder"])) is not None:
                os.kill(server, signal.SIGKILL)
                done[phase] += 1

    runs = 0
    while done.total() < kills:
        root = stage["folder"] / f"servers-{runs}"
        code, _ = stage["runner"].play(
            [*stage["words"], f"run.root={root}", "rollout.server.max_restarts=1000"], None, killer
        )
        assert code == 0, stage["runner"].said()
        found = finished((root / "latest").resolve())
        for key, value in undisturbed["left"].items():
            assert found[key] == value, f"{key} differs after {dict(done)}"
        shutil.rmtree(root)
        nobody_left(stage["folder"])
        runs += 1
    print(f"{done.total()} kills of the server in {runs} runs: {dict(done)}")
    tally.record("kill -9 of the server", injected=done.total(), survived=done.total(), lost=0)


@pytest.mark.slow
@pytest.mark.faults
def test_a_server_that_is_given_up_ends_the_run_with_a_checkpoint(
    stage: dict[str, Any], undisturbed: dict[str, Any]
) -> None:
    """In the midst of a batch (``generate``), and at a refit (``load``), whose step is done."""
    server: Path = stage["folder"] / "server"
    for kind, after in (("generate", 30), ("load", 3)):
        counter = server / f"{kind}.count"
        now = int(counter.read_text()) if counter.exists() else 0
        (server / "faults.json").write_text(
            json.dumps([{"at": now + after + i, "do": "exit", "of": kind} for i in range(60)])
        )
        root = stage["folder"] / f"given-up-{kind}"
        code, _ = stage["runner"].play([*stage["words"], f"run.root={root}", "rollout.server.max_restarts=1"], None)
        said = stage["runner"].said()
        assert (
            code == 1
            and "given up after 1 restarts (rollout.server.max_restarts)" in said
            and f"--resume {(root / 'latest').resolve()}" in said
        )
        (server / "faults.json").write_text("[]")
        before = len((root / "latest" / "metrics.jsonl").read_text().splitlines())
        code, _ = stage["runner"].play([], (root / "latest").resolve())
        assert code == 0, stage["runner"].said()
        assert finished((root / "latest").resolve()) == undisturbed["left"] and before >= 2
        nobody_left(stage["folder"])
