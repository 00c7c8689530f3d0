"""Building the cutter and talking to the saver."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).resolve().parents[2]
HANGS_S = 30
#: refits bring adapters of rank 8. Their reference is the base, which a warm-up leaves
ADAPTERS = ["policy.lora.rank=8", "rollout.lora_refit=adapter", "objective.kl_coef=0"]
COUNT, KILL, TORN, FAIL_FROM, FAIL_ONCE, KILL_SELF = range(6)  # cutter.c's modes


def every_kind_of_weights() -> list[Any]:
    """Words of the configuration, as parameters: all weights are trained, or adapters alone."""
    return [pytest.param([], id="all weights"), pytest.param(ADAPTERS, id="adapters")]


def build_cutter(folder: Path) -> Path:
    """Compile cutter.c; skips the test where that can't be done."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("cutting at system calls needs Linux and a C compiler (cc)")
    library = folder / "cutter.so"
    done = subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(Path(__file__).with_name("cutter.c")), "-ldl"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return library


class Saver:
    """A running saver.py; a context manager. With a rank it saves adapters."""

    def __init__(self, model: Path, cutter: Path | None, log: Path, rank: int = 0):
        environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        if cutter is not None:
            preload = " ".join(word for word in (str(cutter), environment.get("LD_PRELOAD", "")) if word)
            environment |= {"PACT_CUTTER": str(cutter), "LD_PRELOAD": preload}
        self._log = open(log, "wb")  # noqa: SIM115 - closed by __exit__
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.saver", str(model), str(rank)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
            cwd=REPO,
        )
        self._path = log

    def tell(self, **job: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"step": 2, **job}, default=str) + "\n")
        self._process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], HANGS_S)
        if not ready:
            self._process.kill()  # its next answer would be to this question
        assert ready, f"no answer within {HANGS_S} s: a save hangs\n{self._path.read_text()[-3000:]}"
        line = self._process.stdout.readline()
        assert line, self._path.read_text()[-3000:]
        answer: dict[str, Any] = json.loads(line)
        return answer

    def run(self, **job: Any) -> dict[str, Any]:
        """One save in a forked child, from the weights of ``step`` (2 if not said)."""
        self.tell(**job)
        return self.hear()

    def __enter__(self) -> Saver:
        assert "ready" in self.hear()
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            stream.close()  # type: ignore[union-attr]
