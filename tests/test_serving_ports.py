"""Engines of a machine never share a port: not those that start together, not one and its successor."""

from __future__ import annotations

import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pact_nemo.serving import ports
from pact_nemo.serving.ports import RUN, claim_ports
from tests.faults.server_bench import Bench


def told(pid: int) -> int:
    """Where an engine's vLLM begins to look for ports, as the process was told."""
    words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return int(next(word for word in words if word.startswith(b"VLLM_PORT=")).partition(b"=")[2])


def http(url: str) -> int:
    return int(url.rpartition(":")[2])


def test_engines_have_ports_of_their_own_and_other_ones_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever ``VLLM_PORT`` the trainer was started with."""
    monkeypatch.setenv("VLLM_PORT", "51000")
    benches = [Bench(tmp_path / name) for name in ("a", "b")]
    used: list[range] = []
    try:
        for bench in benches:
            bench.folder.mkdir()
            server = bench.launch().server
            for again in (False, True):
                if again:
                    server.restart()  # type: ignore[union-attr]
                    server.wait_ready()
                assert server.pid is not None
                first = told(server.pid)
                assert http(server.endpoint.url) == first - 1
                used.append(range(first - 2, first - 2 + RUN))
    finally:
        for bench in benches:
            bench.close()
    every = [port for run in used for port in run]
    assert len(set(every)) >= 3 * RUN  # a port of a's first process may be b's
    assert not set(used[0]) & set(used[1]) and not set(used[2]) & set(used[3])
    assert not set(used[1]) & {*used[2], *used[3]}  # those that live at the same time


def test_engines_that_start_together_never_claim_the_same_ports() -> None:
    with ThreadPoolExecutor(16) as pool:
        claimed = list(pool.map(lambda _: claim_ports(), range(64)))
    try:
        assert len({one.first for one in claimed}) == 64
    finally:
        for one in claimed:
            one.release()


def test_ports_that_a_program_listens_on_at_any_address_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    first = claim_ports()
    first.release()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", first.first + RUN - 1))
        taken.listen()
        other = claim_ports()
        other.release()
        assert other.first != first.first
    monkeypatch.setattr(ports, "_end", lambda: first.first + RUN - 1)
    with pytest.raises(ports.ServerError, match=f"no {RUN} free ports in a row"):
        claim_ports()


def test_a_claim_ends_with_its_process() -> None:
    """Nothing is written that a killed trainer could leave behind."""
    receiving, sending = os.pipe()
    child = os.fork()
    if not child:
        os.write(sending, str(claim_ports().first).encode())
        os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    was = int(os.read(receiving, 16))
    os.close(receiving)
    os.close(sending)
    again = claim_ports()
    again.release()
    assert again.first <= was
