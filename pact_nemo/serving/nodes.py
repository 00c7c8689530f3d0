"""Engines on every node of a job: who starts which, and how rank 0 gets to know them.

vLLM's own data-parallel serving is not used. Its replicas are one service: one start, one front end, one end, so the
death of one ends all. Its router balances servers that somebody else starts, refits and restarts. Here each engine is a
server of its own with a life of its own (docs/cluster/slurm.md).
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pact_nemo.errors import ConfigError, PactError
from pact_nemo.runtime.collective import gather, host, on_rank_zero, raise_together, rank
from pact_nemo.serving.adapters import AdapterRoom
from pact_nemo.serving.board import Board
from pact_nemo.serving.config import RolloutServerConfig
from pact_nemo.serving.launch import on_cuda
from pact_nemo.serving.placement import EnginePlace, engines_per_node, places_on_node
from pact_nemo.serving.remote import Keeper, RemoteServer, Where
from pact_nemo.serving.server import RolloutServer

#: Makes a connection to the job's store.
NewStore = Callable[[], Any]


@dataclass(frozen=True)
class Seat:
    """What a rank says of itself.

    Attributes:
        leader: it starts its node's engines.
        host, address: of its machine, and where the other nodes reach it.
        devices: GPUs that it sees, as ``CUDA_VISIBLE_DEVICES`` names them; None: the engines run on the CPU.
        ranks: trainer ranks of its node.
        missing: folders of the run that are not there.
    """

    rank: int
    leader: bool
    host: str
    address: str
    devices: tuple[str, ...] | None
    ranks: int
    missing: tuple[str, ...]


@dataclass
class JobEngines:
    """A job's engines, as one rank sees them.

    Attributes:
        servers: all of them, by number, on rank 0; elsewhere none.
        keepers: of those that this rank starts for rank 0.
    """

    servers: list[RolloutServer | RemoteServer] = field(default_factory=list)
    keepers: list[Keeper] = field(default_factory=list)


def engine_log(log_file: Path, number: int) -> Path:
    """``server-3.log`` of the third engine after the first."""
    return log_file.with_name(f"{log_file.stem}-{number}{log_file.suffix}")


def job_engines(
    config: RolloutServerConfig,
    source: Path,
    log_file: Path,
    new_store: NewStore,
    shared: tuple[Path, ...] = (),
    adapters: AdapterRoom | None = None,
) -> JobEngines:
    """The engines of every node, none of them launched. Collective.

    Engines of rank 0's node are its own children. Every other node's are children of that node's first rank, which a
    thread of it starts when rank 0's supervisor says so.

    Args:
        source: the HF folder to serve, which all nodes see.
        log_file: in a folder that all nodes see; each engine has its own (:func:`engine_log`).
        new_store: used where there is more than one node.
        shared: further folders that all nodes see.
        adapters: that refits bring; None: they bring whole models.

    Raises:
        ConfigError, PactError: on all ranks: a node has too few GPUs or others than the first one, doesn't see one
            of the folders, or doesn't find the way to rank 0.
    """
    key = on_rank_zero(lambda: os.environ.get(config.api_key_env) or secrets.token_urlsafe(32))
    leaders, found = _leaders(config, (source, log_file.parent, *shared)), JobEngines()
    count = engines_per_node(config, len(leaders), _trainer_gpus(leaders[0]))
    places = [_places(config, count, leader, key) for leader in leaders]  # the same, or refused, on all ranks
    for number in range(count * len(leaders)):
        leader, place = leaders[number // count], places[number // count][number % count]
        log = engine_log(log_file, number) if count * len(leaders) > 1 else log_file
        if leader.rank == rank():
            server = RolloutServer(config, source, log_file=log, place=place, adapters=adapters)
            if rank() == 0:
                found.servers.append(server)
            else:
                found.keepers.append(Keeper(server, Board(new_store(), number)))
        elif rank() == 0:
            where = Where(leader.host, leader.rank, log, key)
            found.servers.append(RemoteServer(config, Board(new_store(), number), where, adapters=adapters))
    for keeper in found.keepers:
        keeper.start()
    return found


def _leaders(config: RolloutServerConfig, folders: tuple[Path, ...]) -> list[Seat]:
    """The first rank of each node, the same list on all ranks. Collective.

    Raises:
        ConfigError, PactError: on all ranks.
    """
    seat, failure = None, None
    try:
        seat = Seat(
            rank(),
            os.environ.get("LOCAL_RANK", "0") == "0",
            host(),
            address_towards(os.environ.get("MASTER_ADDR")),
            _gpus(config),
            int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            tuple(str(folder) for folder in folders if not folder.is_dir()),
        )
    except (OSError, PactError) as error:
        failure = error
    raise_together(failure)
    leaders = [one for one in gather(seat) if one is not None and one.leader]
    if not leaders or leaders[0].rank != 0:
        raise ConfigError(
            "rank 0 is no first rank of its node (LOCAL_RANK is not 0): rollout.server.engines needs ranks that are"
            " numbered node by node, as torchrun and srun do"
        )
    for one in leaders[1:]:
        if one.missing:
            raise ConfigError(
                f"{one.host} does not see {', '.join(one.missing)}: engines there need it for weights and logs; put"
                " model.path, run.root and rollout.exports_dir on a file system of all nodes, or set"
                " rollout.server.engines=1"
            )
        if _trainer_gpus(one) != _trainer_gpus(leaders[0]):
            raise ConfigError(
                f"the trainer has {_trainer_gpus(one)} GPUs on {one.host} and {_trainer_gpus(leaders[0])} on"
                f" {leaders[0].host}; rollout.server.engines needs nodes that are alike"
            )
    return leaders


def _trainer_gpus(seat: Seat) -> int | None:
    """GPUs of the trainer's ranks: a machine that is not the job's alone may have more."""
    return min(len(seat.devices), seat.ranks) if seat.devices is not None else None


def address_towards(master: str | None) -> str:
    """This machine's address in the network that leads to rank 0; the loopback's in a job of one process.

    Raises:
        ConfigError: there is no way there.
    """
    if not master:
        return "127.0.0.1"
    try:
        family, kind, _, _, target = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)  # sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError(f"{host()} finds no way to rank 0 at MASTER_ADDR={master}: {error}") from error


def _places(config: RolloutServerConfig, count: int, leader: Seat, key: str) -> list[EnginePlace]:
    address = None if leader.rank == 0 else leader.address
    return places_on_node(count, config.tensor_parallel_size, leader.devices, address=address, api_key=key)


def _gpus(config: RolloutServerConfig) -> tuple[str, ...] | None:
    """GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them; None where the engines run on the CPU."""
    if not on_cuda(config):
        return None
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return tuple(named.split(",")) if named else tuple(str(index) for index in range(torch.cuda.device_count()))
