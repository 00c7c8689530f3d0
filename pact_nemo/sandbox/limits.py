"""What a sandboxed call may use, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["ok", "raised", "invalid", "timeout", "killed", "exited", "output", "lost"]


@dataclass(frozen=True)
class Limits:
    """Of one call.

    Attributes:
        seconds: wall time, from the call's start in the worker.
        cpu_seconds: CPU time of each of its processes.
        memory_mb: address space of each of its processes, in MiB.
        processes: processes and threads it may have at once, itself included.
        scratch_mb: size of its writable folder ``/tmp``, in MiB (memory-backed, empty at the start, gone at the end).
        output_chars: longest result; a longer one is cut, and one more than ten times as long is an error.
    """

    seconds: float = 10.0
    cpu_seconds: int = 10
    memory_mb: int = 1024
    processes: int = 16
    scratch_mb: int = 16
    output_chars: int = 20_000


@dataclass(frozen=True)
class CallResult:
    """Outcome of one call.

    Attributes:
        text: what the tool returned (strings as they are, dictionaries and lists as JSON, the rest by ``str``), or what
            went wrong.
        kind: ``ok``; ``raised`` (the tool raised); ``invalid`` (no such function, arguments that don't fit, source that
            doesn't compile); ``timeout``; ``killed`` (a signal: memory, CPU time); ``exited`` (it ended the process);
            ``output`` (far too much of it); ``lost`` (the worker itself died and was replaced).
        seconds: wall time of the call, without waiting for a free worker.
    """

    text: str
    kind: Kind
    seconds: float

    @property
    def ok(self) -> bool:
        return self.kind == "ok"
