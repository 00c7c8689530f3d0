"""Which addresses processes listen on, from ``/proc``."""

from __future__ import annotations

import contextlib
import ipaddress
import os
from collections.abc import Iterable
from pathlib import Path


def _address(text: str) -> str:
    """``0100007F:1F90`` → ``127.0.0.1``: words of four bytes, each in the machine's order."""
    raw = bytes.fromhex(text.partition(":")[0])
    return str(ipaddress.ip_address(b"".join(raw[i : i + 4][::-1] for i in range(0, len(raw), 4))))


def listening(pids: Iterable[int]) -> dict[str, list[str]]:
    """Address -> the listening TCP sockets there (``tcp:port``) of these processes."""
    inodes = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for fd in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    target = os.readlink(fd)
                    if target.startswith("socket:["):
                        inodes.add(target[8:-1])
    found: dict[str, list[str]] = {}
    for table in ("tcp", "tcp6"):
        for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = row.split()
            if fields[3] == "0A" and fields[9] in inodes:  # 0A: LISTEN
                found.setdefault(_address(fields[1]), []).append(f"{table}:{int(fields[1].rpartition(':')[2], 16)}")
    return found


def foreign(pids: Iterable[int]) -> dict[str, list[str]]:
    """:func:`listening` without the loopback interface."""
    return {
        address: ports
        for address, ports in listening(pids).items()
        if not (ipaddress.ip_address(address).is_loopback or address == "::ffff:127.0.0.1")
    }
