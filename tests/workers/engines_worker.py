"""One rank of a job whose engines are spread over its nodes: ``engines_worker.py FOLDER MODEL ENGINES WHAT``.

Rank 0 plays a batch, refits and plays another one, and writes what was sampled, what was said and who served it to
FOLDER/result.json. WHAT is what goes wrong: ``nothing``, ``node`` (the second node's engine dies in mid-batch, twice),
``rank`` (rank 0 fails), ``kill`` (the second rank is killed) or ``vllm``: one batch of vLLM's own engines, of which the
second node's is killed in the middle. Everywhere else fake_server.py is in the place of vLLM.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from pact_nemo.errors import PactError, ServerError
from pact_nemo.policy.distributed import exit_rank, init_distributed, new_store
from pact_nemo.runtime.collective import on_rank_zero, rank
from pact_nemo.serving.config import RolloutServerConfig
from pact_nemo.serving.fleet import Fleet
from pact_nemo.serving.nodes import JobEngines, job_engines
from pact_nemo.serving.server import RolloutServer
from pact_nemo.serving.supervisor import SupervisedServer
from tests.faults import fake_server
from tests.faults.server_bench import CONFIG, content, play

TASKS = 6
KILL_AT = 4  #: of the 12 or more requests of a batch, two of each of six tasks
PATIENT: dict[str, Any] = {**CONFIG, "heartbeat_timeout_s": 20.0, "request_timeout_s": 20.0, "refit_timeout_s": 20.0}
#: One sequence at a time and no cache: nothing depends on what is computed together, so bits can be compared.
VLLM: dict[str, Any] = dict(
    device="cpu", dtype="float32", max_model_len=512, max_num_seqs=1, prefix_caching=False, cpu_threads=1
)


def drive(folder: Path, model: Path, engines: JobEngines, what: str) -> dict[str, Any]:
    """On rank 0."""
    notes, asked = list[str](), list[Any]()

    def requested(body: dict[str, Any]) -> None:
        asked.append(body)
        if len(asked) == KILL_AT:
            (folder / "now").touch()

    supervised = [SupervisedServer(one, note=notes.append, on_request=requested, like=model) for one in engines.servers]
    fleet = Fleet(supervised, min_share=0.5, note=notes.append)
    for server in engines.servers:
        server.launch()
    fleet.wait_ready()
    (folder / "ready").touch()
    if what == "rank":
        raise ServerError("rank 0 has had enough")
    if what == "kill":
        time.sleep(60)
    urls = [engine.server.endpoint.url for engine in fleet.engines]
    made = [content(play(fleet, tasks=TASKS, whole=what != "vllm"))]
    if what != "vllm":
        fleet.refit(folder / "exports" / "v000001", 1, like=model)
        made.append(content(play(fleet, 1, TASKS)))
    time.sleep(0.5)  # what a node says of its engine is known here a moment later
    counts, peak = fleet.counts(), [server.peak_memory_bytes() for server in engines.servers]
    fleet.close()
    return {"made": made, "urls": urls, "notes": notes, "counts": counts, "peak": peak}


def kill_when_told(engines: JobEngines, folder: Path) -> None:
    """This node's engine dies in the middle of rank 0's batch."""
    while not (folder / "now").exists():
        time.sleep(0.05)
    pid = engines.keepers[0].pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


def main() -> int:
    folder, model, count, what = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
    init_distributed(60.0)
    settings = VLLM if what == "vllm" else PATIENT
    if what != "vllm":
        RolloutServer.program = (sys.executable, fake_server.__file__, str(folder / f"faults-{rank()}"))
    engines = JobEngines()
    try:
        config = RolloutServerConfig(**{**settings, "engines": count, "max_restarts": 1})
        engines = job_engines(config, model, folder / "server.log", new_store)
        if what == "vllm" and engines.keepers:
            threading.Thread(target=kill_when_told, args=(engines, folder), daemon=True).start()
        result = on_rank_zero(lambda: drive(folder, model, engines, what))
        if rank() == 0:
            (folder / "result.json").write_text(json.dumps(result))
        return 0
    except PactError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        return 1
    finally:
        for keeper in engines.keepers:
            keeper.stop()
        for server in engines.servers:
            server.close()


if __name__ == "__main__":
    code = main()
    exit_rank(code)
    sys.exit(code)
