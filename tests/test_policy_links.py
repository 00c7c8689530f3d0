"""The first look of the ranks at each other: numbers given twice, shared devices, wrong sums, slow links."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from pact_nemo.errors import ConfigError
from pact_nemo.policy.links import Link, Links, refuse_miscounted, refuse_shared, slow_links, take_rank
from pact_nemo.runtime.ranks import RankProcesses

REPO = Path(__file__).resolve().parents[1]
GB = 1e9


def ring(*rates: float, per_host: int = 2) -> list[Link]:
    """Rank r to r + 1, ``per_host`` ranks a host; rates in GB/s by the receiving rank."""
    hosts = [f"node{rank // per_host}" for rank in range(len(rates))]
    return [Link((at - 1) % len(rates), at, (hosts[at - 1], hosts[at]), rate * GB) for at, rate in enumerate(rates)]


def test_a_slow_link_is_named_with_its_hosts_among_those_of_its_kind() -> None:
    even = ring(40, 300, 41, 300, 39, 300)
    assert slow_links(even, {True: 450 * GB, False: 50 * GB}) == []
    (found,) = slow_links(ring(40, 300, 41, 300, 5, 300), {})
    assert "between hosts, where 40.00 GB/s are usual here: rank 3 (node1) to rank 4 (node2): 5.00 GB/s" in found
    (found,) = slow_links(ring(40, 300, 41, 12, 39, 300), {})
    assert "within a host" in found and "rank 2 (node1) to rank 3 (node1): 12.00 GB/s" in found


def test_a_network_far_below_the_plan_is_named_even_where_all_links_are_alike() -> None:
    (found,) = slow_links(ring(1.2, 300, 1.2, 300), {True: 450 * GB, False: 50 * GB})
    assert "links between hosts carry 1.20 GB/s, and the plan counts on 50" in found and "node0, node1" in found
    assert slow_links(ring(1.2, 300, 1.2, 300), {}) == []
    assert "4 ranks on 2 host(s)" in Links(ring(1, 2, 3, 4), 5 * GB, 0.1).describe()


def test_a_rank_number_is_given_once_and_all_count_alike() -> None:
    store = dist.HashStore()
    take_rank(store, 0, 3)
    take_rank(store, 2, 3)
    with pytest.raises(ConfigError, match=f"RANK=2 was given twice: to process {os.getpid()} of .* and to process"):
        take_rank(store, 2, 3)
    with pytest.raises(ConfigError, match="WORLD_SIZE=4 for process .* and 3 for process"):
        take_rank(store, 1, 4)
    with pytest.raises(ConfigError, match="RANK=3, WORLD_SIZE=3"):
        take_rank(store, 3, 3)


def test_two_ranks_on_one_gpu_and_a_sum_that_misses_one_are_refused_by_name() -> None:
    refuse_shared([("a", "GPU-1"), ("a", "GPU-2"), ("b", "GPU-1")])
    with pytest.raises(ConfigError, match="ranks 0 and 2 are both on GPU GPU-1 of a"):
        refuse_shared([("a", "GPU-1"), ("a", "GPU-2"), ("a", "GPU-1")])
    refuse_miscounted([1.0, 1.0], ["a", "b"])
    with pytest.raises(ConfigError, match=r"counted rank 1 \(b\) 0 times; rank 2 \(c\) 2 times"):
        refuse_miscounted([1.0, 0.0, 2.0], ["a", "b", "c"])


WORKER = """
import os, sys, torch, torch.distributed as dist
from pact_nemo.errors import PactError
from pact_nemo.policy.distributed import exit_rank, init_distributed
from pact_nemo.policy import links
if sys.argv[1] == "twice": os.environ["RANK"] = "1"
try:
    init_distributed(60)
    found = links.check_links()
    if os.environ["RANK"] == "0":
        print(len(found.ring), len({link.hosts for link in found.ring}), min(l.rate for l in found.ring) > 0,
              found.all_reduce > 0, [(l.source, l.target) for l in found.ring], found.seconds < 30, flush=True)
        reduce = dist.all_reduce  # a transport that counts the first rank for the second one
        dist.all_reduce = lambda tensor: reduce(tensor.copy_(tensor.roll(1)))
    links.check_links()
except PactError as error:
    print(error, file=sys.stderr, flush=True)
    exit_rank(2); sys.exit(2)
exit_rank(0)
"""


@pytest.mark.parametrize("what", ["once", "twice"])
def test_two_ranks_over_gloo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], what: str
) -> None:
    monkeypatch.setattr("pact_nemo.runtime.ranks.FOLLOW_FAILURE_S", 0.5)
    (tmp_path / "worker.py").write_text(WORKER)
    ending = RankProcesses([sys.executable, str(tmp_path / "worker.py"), what], 2, tmp_path).run()
    said = capfd.readouterr().out + "".join(path.read_text() for path in tmp_path.glob("*.err"))
    assert ending.code == 2, said
    if what == "twice":
        assert "RANK=1 was given twice" in said
    else:
        assert "2 1 True True [(1, 0), (0, 1)] True" in said
        assert "counted rank 0" in said and "0 times" in said and "rank 1" in said and "2 times" in said
