"""What ranks are to each other, looked at in the first seconds of a job: every rank is there once, on a device of its
own, and no link between two of them is far slower than the others.

A number that is given twice, or two ranks on one GPU, otherwise shows as a hang; a cable that fell back to a slower
speed, as a run that takes days longer.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from pact_nemo.errors import ConfigError
from pact_nemo.policy.device import local_device, use_cuda
from pact_nemo.runtime.collective import gather, host, rank, world_size

_CUDA_BYTES, _CPU_BYTES = 256 << 20, 4 << 20  #: that a link carries in one round
_ROUNDS = 3
SLOW = 1 / 3  #: of the usual rate of its kind: a slow link
FAR_BELOW = 1 / 10  #: of what the plan counts on: slow, whatever the others do


def take_rank(store: Any, number: int, size: int) -> None:
    """Write into the job's store that this process is rank ``number`` of ``size``.

    Args:
        store: of this job and attempt alone.

    Raises:
        ConfigError: another process is that rank, or counts another number of ranks.
    """
    me = f"process {os.getpid()} of {host()}"
    if not 0 <= number < size:
        raise ConfigError(f"RANK={number}, WORLD_SIZE={size}: ranks go from 0 to WORLD_SIZE - 1 ({me})")
    if store.add(f"came/{number}", 1) > 1:
        other = store.get(f"who/{number}").decode()
        raise ConfigError(
            f"RANK={number} was given twice: to {me} and to {other}; whatever starts the ranks has to number them 0 to"
            f" {size - 1}, once each"
        )
    store.set(f"who/{number}", me)
    first = store.compare_set("world", "", json.dumps([size, me])).decode()
    others, who = json.loads(first)
    if others != size:
        raise ConfigError(f"WORLD_SIZE={size} for {me} and {others} for {who}; all ranks have to be told the same")


@dataclass(frozen=True)
class Link:
    """One direction between two ranks that are neighbours by number.

    Attributes:
        hosts: of the sender, of the receiver.
        rate: bytes per second that arrived.
    """

    source: int
    target: int
    hosts: tuple[str, str]
    rate: float

    @property
    def within(self) -> bool:
        """Both on one machine."""
        return self.hosts[0] == self.hosts[1]

    def __str__(self) -> str:
        return (
            f"rank {self.source} ({self.hosts[0]}) to rank {self.target} ({self.hosts[1]}): {self.rate / 1e9:.2f} GB/s"
        )


@dataclass(frozen=True)
class Links:
    """What was measured.

    Attributes:
        ring: rank r to rank r + 1, all at the same time.
        all_reduce: bytes per second of bus bandwidth: 2 (n - 1) / n times the size over the seconds.
        seconds: that looking took.
    """

    ring: list[Link]
    all_reduce: float
    seconds: float

    def describe(self) -> str:
        return (
            f"{len(self.ring)} ranks on {len({link.hosts[0] for link in self.ring})} host(s): all-reduce"
            f" {self.all_reduce / 1e9:.2f} GB/s (bus), slowest link {min(link.rate for link in self.ring) / 1e9:.2f}"
            f" GB/s, looked at in {self.seconds:.1f} s"
        )


def slow_links(ring: list[Link], expected: dict[bool, float]) -> list[str]:
    """Warnings about links that are far slower than others of their kind, or than was counted on.

    Args:
        expected: bytes per second that the plan counts on, within a machine (True) and between two (False); nothing for
            a kind that it says nothing of.
    """
    found = []
    for within, kind in ((True, "within a host"), (False, "between hosts")):
        links = [link for link in ring if link.within is within]
        if not links:
            continue
        usual, planned = statistics.median(link.rate for link in links), expected.get(within)
        slow = [link for link in links if link.rate < SLOW * usual]
        if slow:
            shown = "; ".join(map(str, sorted(slow, key=lambda link: link.rate)[:4]))
            found.append(f"slow link(s) {kind}, where {usual / 1e9:.2f} GB/s are usual here: {shown}")
        if planned is not None and usual < FAR_BELOW * planned:
            hosts = sorted({name for link in links for name in link.hosts})
            found.append(
                f"links {kind} carry {usual / 1e9:.2f} GB/s, and the plan counts on {planned / 1e9:.0f}: every exchange"
                f" will take longer ({', '.join(hosts[:8])}); NCCL_DEBUG=INFO says which network is used"
            )
    return found


def check_links() -> Links | None:
    """Check and measure; collective. None for a single rank.

    Raises:
        ConfigError: two ranks on one GPU; or a sum over all ranks in which one is missing or there twice.
    """
    size, me = world_size(), rank()
    if size == 1:
        return None
    started = time.perf_counter()
    device = local_device()
    places = gather((host(), str(torch.cuda.get_device_properties(device).uuid) if use_cuda() else me))
    refuse_shared(places)
    sums = torch.zeros(size, device=device)
    sums[me] = 1.0
    dist.all_reduce(sums)
    refuse_miscounted(sums.tolist(), [name for name, _ in places])
    payload = torch.ones((_CUDA_BYTES if use_cuda() else _CPU_BYTES) // 4, device=device)
    received = torch.empty_like(payload)

    def shift() -> None:
        for work in dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, payload, (me + 1) % size),
                dist.P2POp(dist.irecv, received, (me - 1) % size),
            ]
        ):
            work.wait()

    arrived = payload.nbytes / _best_seconds(shift)
    reduced = 2 * (size - 1) / size * payload.nbytes / _best_seconds(lambda: dist.all_reduce(payload))
    rows = gather((arrived, reduced))
    ring = [Link((at - 1) % size, at, (places[at - 1][0], places[at][0]), rate) for at, (rate, _) in enumerate(rows)]
    return Links(ring, min(rate for _, rate in rows), time.perf_counter() - started)


def refuse_shared(places: list[tuple[str, Any]]) -> None:
    """Raises ConfigError where two ranks have the same device.

    Args:
        places: rank -> (host, device).
    """
    seen: dict[tuple[str, Any], int] = {}
    for number, place in enumerate(places):
        if place in seen:
            raise ConfigError(
                f"ranks {seen[place]} and {number} are both on GPU {place[1]} of {place[0]}: each rank needs a"
                " LOCAL_RANK of its own on its machine, and CUDA_VISIBLE_DEVICES has to show as many GPUs"
            )
        seen[place] = number


def refuse_miscounted(counts: list[float], hosts: list[str]) -> None:
    """Raises ConfigError where a sum, to which every rank gave a one in its own place, isn't all ones.

    Args:
        counts: [ranks].
    """
    wrong = [f"rank {at} ({hosts[at]}) {value:g} times" for at, value in enumerate(counts) if value != 1.0]
    if wrong:
        raise ConfigError(
            f"a sum over all ranks counted {'; '.join(wrong)}, and should have once each: the devices or the network"
            " don't add up; take these hosts out"
        )


def _best_seconds(run: Any) -> float:
    """Of a few rounds, begun together; on a GPU until it is done."""
    best = float("inf")
    for _ in range(_ROUNDS + 1):  # the first one connects
        dist.barrier()
        started = time.perf_counter()
        run()
        if use_cuda():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best
