"""What the machine says of a server's processes, and the end of its log."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from pathlib import Path


def group_members(group: int) -> list[int]:
    """Ids of the live (not zombie) processes of a process group, from ``/proc``; empty off Linux."""
    members = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            state, _, process_group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(process_group) == group and state not in ("Z", "X"):
                members.append(int(entry.name))
    return members


def peak_resident(group: int) -> int:
    """Sum of the peak resident sizes of a process group, bytes."""
    return sum(_peak_resident(pid) for pid in group_members(group))


def _peak_resident(pid: int) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def tail_of(file: Path, lines: int, secret: str | None = None) -> str:
    """Last lines of a log, without the key: they end up in errors and logs."""
    with contextlib.suppress(OSError), open(file, "rb") as handle:
        handle.seek(0, os.SEEK_END)
        handle.seek(max(0, handle.tell() - 64 * 1024))
        text = handle.read().decode("utf-8", errors="replace")
        text = "\n".join(deque(text.splitlines(), maxlen=lines))
        return text.replace(secret, "(key)") if secret else text
    return "(no log)"
