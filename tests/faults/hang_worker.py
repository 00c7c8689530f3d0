"""One rank of a job under torchrun in which rank 1 does what the first word says, and the others wait for it in an
all-reduce.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import torch
import torch.distributed as dist

from pact_nemo.policy.distributed import exit_rank, init_distributed
from pact_nemo.runtime.hangs import beat

LIMIT_S = 4.0


def stuck_in_our_code() -> None:
    time.sleep(3600)


def leave() -> None:
    """End with exit code 3 x rank, a line in the buffer, and threads that are inside the store's C++ code."""
    store = dist.distributed_c10d._get_default_store()

    def write() -> None:
        while True:
            store.set("key", "value")

    for _ in range(4):
        threading.Thread(target=write, daemon=True).start()
    dist.barrier()
    print("the end")
    exit_rank(3 * int(os.environ["RANK"]))


def main() -> None:
    what, rank = sys.argv[1], int(os.environ["RANK"])
    if what == "never comes" and rank == 1:
        time.sleep(3600)
    init_distributed(LIMIT_S)
    beat("update")
    if what == "leaves":
        leave()
    dist.all_reduce(torch.ones(1))
    if rank == 1:
        if what == "stopped":
            time.sleep(LIMIT_S / 3)  # it told the store where it is
            os.kill(os.getpid(), signal.SIGSTOP)
        if what == "stuck":
            stuck_in_our_code()
        if what == "busy":  # for longer than the limit, but it gets on
            for _ in range(8):
                time.sleep(LIMIT_S / 4)
                beat()
        if what == "elsewhere":  # the collectives of the ranks don't match
            dist.recv(torch.ones(1), src=0)
    dist.all_reduce(torch.ones(1))
    print("done", flush=True)
    exit_rank(0)


if __name__ == "__main__":
    main()
