"""The process that vLLM's server runs in: ``python -m pact_nemo.serving.serve_process <vLLM arguments>``.

Started by :mod:`pact_nemo.serving.server`, never imported by the trainer. It imports vLLM only under ``__main__``, so
that engine processes which multiprocessing spawns (they import the main module again) don't load the HTTP front end a
second time.

A watchdog thread in each of these processes ends the whole process group when its parent is gone, however that died.
(The parent's process id is polled; ``PR_SET_PDEATHSIG`` would fire when the *thread* that started the server ends,
which is no reason to stop.)
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time

#: Set by the trainer: its process id, and whether the engine is forked from the front end.
PARENT_ENV = "PACT_ROLLOUT_PARENT"
FORK_ENGINE_ENV = "PACT_ROLLOUT_FORK_ENGINE"
#: Set by the trainer: the private folder of this server's sockets; read by vLLM.
SOCKETS_ENV = "VLLM_RPC_BASE_PATH"
_POLL_SECONDS = 0.5


def watch_parent(parent: int) -> None:
    """End this process group once ``parent`` is no longer our parent. Runs in a daemon thread."""
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    if sockets := os.environ.get(SOCKETS_ENV):  # nobody else is left to do it
        shutil.rmtree(sockets, ignore_errors=True)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def start_watchdog(parent: int) -> None:
    """Watch ``parent`` from a daemon thread of this process."""
    threading.Thread(target=watch_parent, args=(parent,), name="parent-watchdog", daemon=True).start()


def fork_engine() -> None:
    """Let vLLM fork its engine process on the CPU, as it does on GPUs, instead of spawning it.

    vLLM's CPU platform asks for a fresh interpreter because the OpenMP libraries it preloads take effect in a new
    process only. With the worker inside the
    engine process and the libraries preloaded by us from the start, forking is safe and saves importing everything a
    second time. Where this version of vLLM is built otherwise, it starts its own, slower way.
    """
    try:
        from vllm.platforms.cpu import CpuPlatform

        original = CpuPlatform.check_and_update_config.__func__  # type: ignore[attr-defined]
    except (ImportError, AttributeError) as error:
        logging.getLogger(__name__).warning("engine is spawned, not forked: %r", error)
        return

    def check_and_update_config(cls: type, vllm_config: object) -> None:
        original(cls, vllm_config)
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


def main() -> None:
    if os.environ.get(FORK_ENGINE_ENV) == "1":
        fork_engine()
        os.register_at_fork(after_in_child=lambda: start_watchdog(os.getppid()))
    try:
        from vllm.entrypoints.launchers.api_server.entry import main as serve
    except ImportError:  # older layout of the same front end
        import runpy

        runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
        return
    serve()


if __name__ == "__main__":
    start_watchdog(int(os.environ[PARENT_ENV]))
    main()
if __name__ == "__mp_main__":
    spawner = multiprocessing.parent_process()
    if spawner is not None and spawner.pid is not None:
        start_watchdog(spawner.pid)
