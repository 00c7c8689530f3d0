"""Ranks that talk to each other: how torch.distributed is started, and how long its collectives wait."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
import socket
import sys

import torch
import torch.distributed as dist

from pact_nemo.policy.device import local_device, stay_near_gpu, use_cuda
from pact_nemo.policy.links import take_rank
from pact_nemo.runtime.hangs import HangWatch


def _stay_on_loopback() -> None:
    """Ranks of one machine talk over its loopback interface: gloo and nccl would take the one that the host's name
    leads to. A setting of the user's own stands.
    """
    names = {name for _, name in socket.if_nameindex()}
    loopback = next((name for name in ("lo", "lo0") if name in names), None)
    if loopback is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)


def patience(timeout_s: float) -> datetime.timedelta:
    """How long collectives wait: ranks may wait for one that generates for hours, and when nobody gets on for
    ``timeout_s``, the hang watch ends the job before they do, and says why."""
    return datetime.timedelta(days=1, seconds=timeout_s)


def exit_rank(code: int) -> None:
    """End this process now where it is one of several ranks; otherwise do nothing.

    The interpreter's own end would destroy its objects while threads of gloo and of the job's store still run. One that
    drops a finished collective's tensors at that moment aborts a process whose work was done (exit code -6). Megatron
    keeps its groups alive by a cycle through C++, so they can't be ended before.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)


def new_store() -> dist.Store:
    """A connection of its own to the job's store, whatever the main thread's is waiting for."""
    store = dist.distributed_c10d._get_default_store()
    return store.clone() if hasattr(store, "clone") else store


def init_distributed(timeout_s: float) -> None:
    """Start torch.distributed: nccl for CUDA tensors, gloo for the CPU's and for objects. Under ``torchrun`` its
    environment is used; a plain process becomes a job of one rank that no other process can reach. Does nothing if a
    process group exists already.

    The ranks of one machine use its loopback interface. Several machines have to reach each other, and anyone on their
    network reaches them: keep that network to the cluster. (``torchrun``'s own meeting point listens on every
    interface; torch has no setting for it.)

    Args:
        timeout_s: when no rank gets on for so many seconds, every rank says which one is missing and ends
            (:mod:`pact_nemo.runtime.hangs`); also how long ranks wait for the meeting point.
    """
    if dist.is_initialized():
        return
    timeout = datetime.timedelta(seconds=timeout_s)
    # objects over gloo: over nccl, ranks that wait for rank 0's rollouts would spin on the GPUs that generate them
    backend = "cpu:gloo,cuda:nccl" if use_cuda() else "gloo"
    if use_cuda():
        torch.cuda.set_device(local_device())
        stay_near_gpu()
    world = os.environ.get("WORLD_SIZE")
    if "RANK" in os.environ and world is not None:
        if os.environ.get("LOCAL_WORLD_SIZE") == world:  # torchrun on one machine
            _stay_on_loopback()
        store, rank, size = next(iter(dist.rendezvous("env://", timeout=timeout)))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        take_rank(dist.PrefixStore(f"pact_nemo/ranks/{attempt}", store), rank, size)
        # a connection of its own: the main thread's may be waiting
        own = store.clone() if hasattr(store, "clone") else store
        HangWatch(dist.PrefixStore("pact_nemo/hangs", own), rank, size, timeout_s).start()
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("default_pg", store),
            rank=rank,
            world_size=size,
            timeout=patience(timeout_s),
        )
        return
    _stay_on_loopback()
    # a TCPStore would listen on every interface, whatever address it is given
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
