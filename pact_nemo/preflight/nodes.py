"""The nodes of a job: how fast its ranks reach each other, and whether a node's memory holds what they keep there."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch.distributed as dist

from pact_nemo.config.schema import Config
from pact_nemo.errors import PactError
from pact_nemo.planning.from_config import hardware_of
from pact_nemo.planning.host_room import check_host_room
from pact_nemo.policy.device import use_cuda
from pact_nemo.policy.links import check_links, slow_links
from pact_nemo.runtime.collective import raise_together


def look_at_links(config: Config, say: Callable[[str], None]) -> None:
    """How fast the ranks reach each other, and a warning that names hosts where that is slow."""
    found = check_links()
    if found is None:
        return
    expected = {}
    if use_cuda():
        hardware = hardware_of(config)
        expected = {True: hardware.node_bandwidth, False: hardware.network_bandwidth}
    say(found.describe())
    for text in slow_links(found.ring, expected):
        say(f"warning: {text}")


def look_at_host(config: Config) -> None:
    """Refuse, on all ranks, where a node's memory can't hold what its ranks and engines keep there."""
    failure = None
    if use_cuda() and os.environ.get("LOCAL_RANK", "0") == "0":
        try:
            here = os.environ.get("LOCAL_WORLD_SIZE")
            check_host_room(config, world=dist.get_world_size(), ranks_here=int(here) if here else None)
        except PactError as error:
            failure = error
    raise_together(failure)
