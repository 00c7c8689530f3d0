"""A process that has everything imported, and plays whole runs of the recipe in forked children for a test to kill.

Reads one JSON job a line: ``words`` of the configuration, ``resume`` (a run folder or null), ``server`` (folder of
fake_server.py's faults), ``output`` (full, broken or closed: what becomes of standard output), ``log`` and ``phases``,
files that are appended to: what the run prints, and "start|end phase seconds" for each phase that it enters and leaves.
Answers with the child's process id, then with how it ended. There is no gloo before the fork, which would not survive
it.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # a forked OpenMP pool would wait for threads that are gone
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch

torch.set_num_threads(1)
import torch.utils.tensorboard  # noqa: E402, F401 - slow to import
import transformers  # noqa: E402, F401

from pact_nemo.config.load import load_config  # noqa: E402
from pact_nemo.errors import Interrupted, PactError  # noqa: E402
from pact_nemo.serving.server import RolloutServer  # noqa: E402
from pact_nemo.tracking.terminal import Phase, RunProgress  # noqa: E402
from pact_nemo.training import close_run as finish  # noqa: E402, F401 - what the recipe imports
from pact_nemo.training import evaluation, warmup  # noqa: E402, F401 - what the recipe imports
from pact_nemo.training import open_run as setup  # noqa: E402, F401 - what the recipe imports
from recipes.pact_bfcl import run  # noqa: E402


def note_phases(file: str) -> None:
    """Have every phase of a run told to ``file``, in one write each."""
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    entered = RunProgress.phase

    @contextmanager
    def noted(self: RunProgress, name: str, total: int | None = None, *, brief: bool = False) -> Iterator[Phase]:
        kind = "evaluation" if name.startswith("evaluation") else "generation" if name.endswith("rollouts") else name
        os.write(handle, f"start|{kind}|{time.monotonic()}\n".encode())
        with entered(self, name, total, brief=brief) as phase:
            yield phase
        os.write(handle, f"end|{kind}|{time.monotonic()}\n".encode())

    RunProgress.phase = noted  # type: ignore[method-assign]


def child(job: dict[str, Any]) -> int:
    os.setsid()
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if job.get("output") == "full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    elif job.get("output") == "broken":
        reader, writer = os.pipe()
        os.dup2(writer, 1)
        os.close(reader)
        os.close(writer)
    elif job.get("output") == "closed":
        os.close(1)
        os.close(2)
    note_phases(job["phases"])
    RolloutServer.program = (sys.executable, str(Path(__file__).with_name("fake_server.py")), job["server"])
    try:
        saved = [] if job["resume"] is None else [Path(job["resume"]) / "config.yaml"]
        run(load_config([*(saved or [job["preset"]])], [] if saved else job["words"]), job["resume"])
    except Interrupted as interrupted:
        print(interrupted)
        return 75
    except PactError as error:
        print(f"{type(error).__name__}: {error}")
        return 1
    except BaseException:
        traceback.print_exc()
        return 3
    return 0


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            code = 3
            try:
                code = child(job)
                sys.stdout.flush()
            finally:
                os._exit(code)
        print(json.dumps({"pid": pid}), file=answers, flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), file=answers, flush=True)


if __name__ == "__main__":
    main()
