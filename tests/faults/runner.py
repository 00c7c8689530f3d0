"""Whole runs of the recipe for tests to kill, with a real rollout server process whose samples are a function of its
weights, the prompt and the seed (fake_server.py), so that two runs can be compared bit for bit.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blake3 import blake3

from pact_nemo.chat.template import ChatFormat
from pact_nemo.config.load import load_config
from pact_nemo.data.dataset import build_dataset
from pact_nemo.data.tasks import build_environment
from tests.faults.kit import REPO
from tests.workers.policy_kit import make_chat_model

PRESET = REPO / "conf" / "pact_bfcl-smollm2_135m-cpu.yaml"
STEPS = 4
CLOCK = ("time/", "refit/", "moved/", "rollout/tokens_per_second")
FAULTS = ("server/restarts", "rollout/reissued", "engines/share")


class Runner:
    """run_worker.py, started once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._log = open(folder / "worker.log", "wb")  # noqa: SIM115 - closed by close
        environment = {**os.environ, "PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.run_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
            cwd=REPO,
        )
        assert self._hear(120).get("ready")

    def _hear(self, seconds: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        assert ready, f"no answer within {seconds} s"
        line = self._process.stdout.readline()
        assert line, (self.folder / "worker.log").read_text()[-3000:]
        answer: dict[str, Any] = json.loads(line)
        return answer

    def play(
        self, words: list[str], resume: Path | None, killer: Any = None, *, limit_s: float = 180.0, output: str = ""
    ) -> tuple[int, Path]:
        """One run or the rest of one; its exit code (negative: the signal that ended it) and the file of its phases."""
        phases = self.folder / f"phases-{time.monotonic_ns()}"
        phases.touch()
        job = {
            "words": words,
            "resume": None if resume is None else str(resume),
            "server": str(self.folder / "server"),
            "log": str(self.folder / "run.log"),
            "phases": str(phases),
            "preset": str(PRESET),
            "output": output,
        }
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


@contextmanager
def open_stage(folder: Path, *further: str) -> Iterator[dict[str, Any]]:
    """A tiny model, the words of a configuration that uses it (``further`` ones last), and a Runner."""
    model = make_chat_model(folder / "model")
    words = [
        f"model.path={model}",
        f"trainer.steps={STEPS}",
        "trainer.batch_size=2",
        "trainer.mini_batch_size=1",
        "trainer.checkpoint_every=1",
        "trainer.keep_checkpoints=2",
        "objective.group_size=3",
        "objective.kl_coef=0.01",
        "rollout.importance=tis",
        "warmup.steps=1",
        "warmup.batch_size=2",
        "optimizer.lr=1e-3",
        "tasks.max_eval=2",
        "tasks.max_train=8",
        "rollout.sampling.max_turn_tokens=40",
        "rollout.sampling.max_turns=3",
        "rollout.server.heartbeat_s=0.5",
        "traces.max_missing=null",
        *further,
    ]
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
    numbers = [{key: value for key, value in row.items() if not key.startswith((*CLOCK, *FAULTS))} for row in rows]
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


def left_running(folder: Path) -> list[str]:
    """Processes that a run started, with their state: they have the run's standard output, or name the server's
    folder.
    """
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            output = os.readlink(process / "fd" / "1")
            if str(folder / "server") in line or output == str(folder / "run.log"):
                name, _, rest = (process / "stat").read_text().rpartition(")")
                found.append(
                    f"{name}) state {rest.split()[0]}, parent {rest.split()[1]}, in {(process / 'wchan').read_text()}:"
                    f" {line}"
                )
        except OSError:
            continue
    return found


def nobody_left(folder: Path, seconds: float = 10.0) -> None:
    """Fails when processes of a run outlive it by more than ``seconds``."""
    deadline = time.monotonic() + seconds
    while (found := left_running(folder)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not found, found


def server_of(trainer: int, folder: Path) -> int | None:
    """Process id of the rollout server that a run has now."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == trainer and str(folder / "server").encode() in (process / "cmdline").read_bytes():
                return int(process.name)
        except OSError:
            continue
    return None
