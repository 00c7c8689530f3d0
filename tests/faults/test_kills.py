"""kill -9 at random moments of every phase of a run: what is resumed ends with the numbers and weights of a run that was never killed.

The whole recipe, with a real rollout server process whose samples are a function of its weights, the prompt and the seed (fake_server.py), so
that two runs can be compared bit for bit.
"""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from pact_nemo.chat.template import ChatFormat
from pact_nemo.checkpoints.embedded import materialise_embedded_model
from pact_nemo.training.config import load_config
from pact_nemo.training.data import build_dataset, build_environment
from tests.faults import tally
from tests.faults.kit import REPO
from tests.workers.policy_kit import make_model

PRESET = REPO / "conf" / "pact_bfcl-smollm2_135m-cpu.yaml"
STEPS = 4
PHASES = ("set-up", "warm-up", "generation", "rollout", "score", "update", "refit", "checkpoint", "evaluation", "export")
TIMING = ("time/", "refit/", "rollout/tokens_per_second")


class Runner:
    """run_worker.py, started once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._log = open(folder / "worker.log", "wb")  # noqa: SIM115 - closed by close
        environment = {**os.environ, "PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.run_worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            env=environment, cwd=REPO,
        )  # fmt: skip
        assert self._hear(120).get("ready")

    def _hear(self, seconds: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        assert ready, f"no answer within {seconds} s"
        line = self._process.stdout.readline()
        assert line, (self.folder / "worker.log").read_text()[-3000:]
        answer: dict[str, Any] = json.loads(line)
        return answer

    def play(self, words: list[str], resume: Path | None, killer: Any = None, *, limit_s: float = 180.0) -> tuple[int, Path]:
        """One run or the rest of one; its exit code (negative: the signal that ended it) and the file of its phases."""
        phases = self.folder / f"phases-{time.monotonic_ns()}"
        phases.touch()
        job = {
            "words": words, "resume": None if resume is None else str(resume), "server": str(self.folder / "server"),
            "log": str(self.folder / "run.log"), "phases": str(phases), "preset": str(PRESET),
        }  # fmt: skip
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        pid = self._hear(10)["pid"]
        if killer is not None:
            threading.Thread(target=killer, args=(pid, phases), daemon=True).start()
        code: int = self._hear(limit_s)["code"]
        return code, phases

    def said(self) -> str:
        return (self.folder / "run.log").read_text()[-3000:]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            stream.close()  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("kills")
    embedded = materialise_embedded_model(REPO / ".cache" / "pact_nemo")
    model = make_model(folder / "model", "llama", layers=2, vocabulary=49152, heads=2)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (model / name).write_bytes((embedded / name).read_bytes())
    words = [
        f"model.path={model}", f"trainer.steps={STEPS}", "trainer.batch_size=2", "trainer.mini_batch_size=1", "trainer.checkpoint_every=1",
        "trainer.keep_checkpoints=2", "objective.group_size=3", "objective.kl_coef=0.01", "rollout.importance=tis", "warmup.steps=1",
        "warmup.batch_size=2", "optimizer.lr=1e-3", "tasks.max_eval=2", "tasks.max_train=8", "rollout.sampling.max_turn_tokens=40",
        "rollout.sampling.max_turns=3", "rollout.server.heartbeat_s=0.5",
    ]  # fmt: skip
    config = load_config(PRESET, [*words, f"run.root={folder / 'none'}"])
    chat = ChatFormat.from_pretrained(model, config.model.tool_format)
    environment = build_environment(config)
    try:
        dataset = build_dataset(config, environment, chat)
        answers = {}
        for task in dataset.train:
            prompt = chat.prompt_ids(list(task.user_turns[0]), list(task.tools))
            calls = chat.tool_format.render_calls([call for turn in task.reference_calls for call in turn])
            answers[" ".join(map(str, prompt))] = [*chat.encode_assistant("Use it.\n" + calls)[0], chat.end_of_turn_id]
        server = folder / "server"
        server.mkdir()
        (server / "faults.json").write_text("[]")
        (server / "answers.json").write_text(json.dumps(answers))
    finally:
        environment.close()
    runner = Runner(folder)
    yield {"folder": folder, "words": words, "runner": runner}
    runner.close()
    shutil.rmtree(folder, ignore_errors=True)


def finished(run: Path) -> dict[str, Any]:
    """What a run leaves that doesn't depend on the clock."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    numbers = [{key: value for key, value in row.items() if not key.startswith(TIMING)} for row in rows]
    played = {}
    for path in sorted((run / "rollouts").glob("step_*.jsonl")):
        played[path.name] = [json.loads(line) | {"seconds": 0} for line in path.read_text().splitlines()]
    weights = blake3((run / "hf" / "model.safetensors").read_bytes()).hexdigest()
    score = json.loads((run / "summary.json").read_text())["eval"]["after"]["score"]
    return {"metrics": numbers, "rollouts": played, "weights": weights, "score": score}


def durations(phases: Path) -> dict[str, list[float]]:
    """Seconds of each time that a phase was gone through."""
    found: dict[str, list[float]] = defaultdict(list)
    opened: dict[str, float] = {}
    for line in phases.read_text().splitlines():
        kind, name, at = line.split("|")
        if kind == "start":
            opened[name] = float(at)
        else:
            found[name].append(float(at) - opened.pop(name))
    return found


def kill_in(phase: str, occurrence: int, after: float, done: Counter[str]) -> Any:
    """A killer that waits until ``phase`` is entered for the ``occurrence``-th time, then ``after`` seconds."""

    def kill(pid: int, phases: Path) -> None:
        while phases.read_text().count(f"start|{phase}|") < occurrence:
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.001)
        time.sleep(after)
        try:
            os.kill(pid, signal.SIGKILL)
            done[phase] += 1
        except ProcessLookupError:
            pass

    return kill


def left_running(folder: Path) -> list[str]:
    """Command lines of processes that a run started: they have the run's standard output, or name the server's folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            output = os.readlink(process / "fd" / "1")
        except OSError:
            continue
        if str(folder / "server") in line or output == str(folder / "run.log"):
            found.append(line)
    return found


def nobody_left(folder: Path, seconds: float = 10.0) -> None:
    """Fails when processes of a run outlive it by more than ``seconds``."""
    deadline = time.monotonic() + seconds
    while left_running(folder) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left_running(folder)


def killed_runs(stage: dict[str, Any], kills: int, seed: int) -> dict[str, Any]:
    """Runs of the same configuration, each killed and resumed until it ends by itself, until there were ``kills`` kills."""
    folder, runner, rng = stage["folder"], stage["runner"], random.Random(seed)
    reference = folder / f"reference-{seed}"
    code, phases = runner.play([*stage["words"], f"run.root={reference}"], None)
    assert code == 0, runner.said()
    expected, known = finished((reference / "latest").resolve()), durations(phases)
    assert set(PHASES) <= set(known), sorted(known)
    assert any(row["reward/mean"] for row in expected["metrics"] if row["stage"] == "rl")
    done: Counter[str] = Counter()
    runs = lost = attempts = 0
    while done.total() < kills:
        root, resume = folder / f"killed-{seed}-{runs}", None
        while True:
            phase = rng.choice(PHASES)
            length = rng.choice(known[phase])
            before = done.total()
            killer = kill_in(phase, rng.randint(1, 2), rng.random() * length, done)
            code, phases = runner.play([*stage["words"], f"run.root={root}"], resume, killer)
            attempts += 1
            if code == 0:
                break
            assert code == -signal.SIGKILL and done.total() >= before, (code, phase, runner.said())
            nobody_left(folder)
            # where not even the configuration was written there is no run to resume
            resume = (root / "latest").resolve() if (root / "latest" / "config.yaml").is_file() else None
        found = finished((root / "latest").resolve())
        for key, value in expected.items():
            if found[key] != value:
                lost += 1
            assert found[key] == value, f"{key} differs after {dict(done)}"
        shutil.rmtree(root)
        nobody_left(folder)
        runs += 1
    shutil.rmtree(reference)
    return {"kills": done, "runs": runs, "attempts": attempts, "lost": lost}


def test_a_run_killed_a_few_times_ends_as_if_it_never_was(stage: dict[str, Any]) -> None:
    found = killed_runs(stage, 3, seed=1)
    assert found["lost"] == 0 and found["kills"].total() >= 3


@pytest.mark.slow
@pytest.mark.faults
def test_a_hundred_kills_over_all_phases(stage: dict[str, Any]) -> None:
    kills = int(os.environ.get("PACT_KILLS", "100"))
    found = killed_runs(stage, kills, seed=2)
    print(f"{found['kills'].total()} kills in {found['runs']} runs and {found['attempts']} attempts: {dict(found['kills'])}")
    tally.record("kill -9 of the trainer", injected=found["kills"].total(), survived=found["kills"].total() - found["lost"], lost=found["lost"])
    assert found["lost"] == 0 and (kills < 100 or set(found["kills"]) == set(PHASES))
