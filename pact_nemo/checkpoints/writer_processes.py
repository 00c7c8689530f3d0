"""The processes that megatron starts to write a checkpoint: they end with the trainer, and one that is killed ends the
save.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.context import ForkProcess
from multiprocessing.managers import SyncManager
from typing import Any

from pact_nemo.runtime.interrupt import SIGNALS
from pact_nemo.runtime.machine import short_folder
from pact_nemo.runtime.orphans import leave_with

_WATCH_SECONDS = 0.2


def start_results_queue() -> None:
    """Start the process through which writers hand over their results, as megatron does, but so that it leaves with
    this one: megatron's stays for ever, with everything it imported, when the trainer is killed."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is None:
        sockets = short_folder()  # the default is below TMPDIR, which may be too long for a socket
        atexit.register(shutil.rmtree, sockets, ignore_errors=True)
        manager = SyncManager(address=str(sockets / "results"), ctx=multiprocessing.get_context("spawn"))
        with _bare_children(), _deaf_children():
            manager.start(leave_with, (os.getpid(), str(sockets)))
        filesystem_async._results_queue = manager.Queue()


@contextmanager
def _deaf_children() -> Iterator[None]:
    """Spawned processes don't hear signals that ask for an end: a scheduler sends them to every process of a job, and
    the trainer says when the save is done.
    """
    resource_tracker.ensure_running()  # its own start would let the signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _bare_children() -> Iterator[None]:
    """Spawned processes don't import the main module, for which they would need seconds and some hundred MB, and only
    then look whether we live.
    """
    main = sys.modules["__main__"]
    hidden: dict[str, Any] = {name: vars(main)[name] for name in ("__file__", "__spec__") if name in vars(main)}
    vars(main).update(dict.fromkeys(hidden))
    try:
        yield
    finally:
        vars(main).update(hidden)


def watched(write: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Runs in the process that megatron forks for a save, which forks one writer a file and waits for all of them: for
    ever, if one was killed.
    """
    writers: list[Any] = []
    start = ForkProcess.start

    def noted(process: Any) -> None:
        start(process)
        writers.append(process)

    def watch() -> None:
        while not any((writer.exitcode or 0) < 0 for writer in writers):
            time.sleep(_WATCH_SECONDS)
        os._exit(1)  # the trainer finds no results, and tells

    ForkProcess.start = noted  # type: ignore[assignment,method-assign] # of this process only
    threading.Thread(target=watch, name="checkpoint-writers", daemon=True).start()
    return write(*args, **kwargs)
