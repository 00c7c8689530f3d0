"""Ports of the engines of a machine: each engine holds a run of them that no other engine has while it lives.

vLLM looks for ports of its own upwards from ``VLLM_PORT``, and what it finds is free only at the moment that it looks.
Engines that start together from one such number would find the same ports. So an engine is given a run of ports. Its
first port stays bound here, which is what keeps the run from other engines, of other jobs too.
"""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass
from pathlib import Path

from pact_nemo.errors import ServerError

RUN = 16  #: ports of an engine: one that is held, one for HTTP, the others for vLLM's own processes
_FIRST = 20_000  #: below are the ports of services
_LAST = 60_000
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


@dataclass(frozen=True)
class Ports:
    """A run of ports that is this process's, until it lets go of it or ends.

    Attributes:
        first: the port that is held; nothing else listens on it.
    """

    first: int
    _held: socket.socket

    @property
    def http(self) -> int:
        return self.first + 1

    @property
    def internal(self) -> int:
        """Where vLLM begins to look for its own."""
        return self.first + 2

    def release(self) -> None:
        """Let other engines have them. Safe to call twice."""
        self._held.close()


def claim_ports() -> Ports:
    """The first run of :data:`RUN` ports that are all free, on every address of this machine.

    The kernel gives ports of a range to whoever connects or asks for any port. Runs lie below that range, where there
    is room.

    Raises:
        ServerError: there is none.
    """
    for start in range(_FIRST, _end() - RUN + 1, RUN):
        if (held := _bound(start)) is None:
            continue
        if all(_free(port) for port in range(start + 1, start + RUN)):
            return Ports(start, held)
        held.close()
    raise ServerError(
        f"no {RUN} free ports in a row between {_FIRST} and {_end()} for a rollout engine; end what listens there"
    )


def _end() -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        first = int(_EPHEMERAL.read_text().split()[0])
        if first >= _FIRST + 64 * RUN:
            return first
    return _LAST


def _bound(port: int) -> socket.socket | None:
    """A socket at this port of every address; None where somebody has one of them."""
    probe = socket.socket()
    try:
        probe.bind(("", port))
    except OSError:
        probe.close()
        return None
    return probe


def _free(port: int) -> bool:
    probe = _bound(port)
    if probe is not None:
        probe.close()
    return probe is not None
