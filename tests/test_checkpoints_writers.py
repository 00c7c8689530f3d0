"""The helper processes of a save: a scheduler's signal goes to every process of a job, and must not end them."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from pact_nemo.checkpoints import writer_processes
from pact_nemo.policy.megatron_import import prepare_megatron
from pact_nemo.runtime.interrupt import SIGNALS

prepare_megatron()


def test_the_process_of_results_is_deaf_to_the_signals_that_stop_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    monkeypatch.setattr(filesystem_async, "_results_queue", None)
    started: list[int] = []
    start = writer_processes.SyncManager.start

    def noted(manager: object, *args: object) -> None:
        start(manager, *args)
        started.append(manager._process.pid)

    monkeypatch.setattr(writer_processes.SyncManager, "start", noted)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    writer_processes.start_results_queue()
    status = Path(f"/proc/{started[0]}/status").read_text()
    blocked = int(next(line for line in status.splitlines() if line.startswith("SigBlk")).split()[1], 16)
    assert all(blocked >> (number - 1) & 1 for number in SIGNALS)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
