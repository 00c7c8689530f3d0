"""Messages between the trainer and the processes that run tools: a length of four bytes, and JSON."""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from typing import Any

MAX_BYTES = 1 << 26  #: of one message: an observation of the longest kind, however it is escaped


class TooLong(ValueError):
    """A message is longer than ``MAX_BYTES``."""


def encoded(message: dict[str, Any]) -> bytes:
    """A message as bytes. Half a surrogate pair becomes a question mark: it is no text. What isn't JSON, e.g. the date
    of a table, becomes its ``str``.

    Raises:
        TooLong: it is too long.
    """
    body = json.dumps(message, ensure_ascii=False, default=_plain).encode("utf-8", "replace")
    if len(body) > MAX_BYTES:
        raise TooLong(f"{len(body)} bytes, and the limit is {MAX_BYTES}")
    return struct.pack(">I", len(body)) + body


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else str(value)


def send(connection: socket.socket, data: bytes, deadline: float | None, descriptors: Sequence[int] = ()) -> None:
    """Send what :func:`encoded` made, and file descriptors with it.

    Raises:
        TimeoutError: the other side doesn't take it in time.
        OSError: the other side is gone.
    """
    connection.settimeout(_left(deadline))
    sent = socket.send_fds(connection, [data], list(descriptors)) if descriptors else 0
    connection.sendall(data[sent:])


def receive(connection: socket.socket, deadline: float | None, ended: int | None = None) -> dict[str, Any]:
    """The next message.

    Args:
        ended: a descriptor that is readable once the other side's process has ended. A process that it left behind may
            hold the connection open.

    Raises:
        TimeoutError: there is none in time.
        EOFError, OSError: the other side is gone.
        ValueError: what came is no message.
    """
    return decoded(_read(connection, _size(_read(connection, 4, deadline, ended)), deadline, ended))


def receive_with_descriptors(
    connection: socket.socket, deadline: float | None = None
) -> tuple[dict[str, Any], list[int]]:
    """The next message and the descriptors that came with it. Raises as :func:`receive`."""
    connection.settimeout(_left(deadline))
    head, descriptors, _, _ = socket.recv_fds(connection, 4, 2)
    if not head:
        raise EOFError("the connection is closed")
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    head += _read(connection, 4 - len(head), deadline, None)
    return decoded(_read(connection, _size(head), deadline, None)), descriptors


def _size(head: bytes) -> int:
    size: int = struct.unpack(">I", head)[0]
    if size > MAX_BYTES:
        raise TooLong(f"{size} bytes, and the limit is {MAX_BYTES}")
    return size


def decoded(data: bytes) -> dict[str, Any]:
    """The message of the bytes after its length. Raises ValueError where it is none."""
    try:
        message = json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(message, dict):
        raise ValueError("it is no object")
    return message


def _read(connection: socket.socket, size: int, deadline: float | None, ended: int | None) -> bytes:
    data = bytearray()
    waiting = select.poll()  # not select(): a trainer may well have more than 1024 files open
    for descriptor in (connection.fileno(), *(() if ended is None else (ended,))):
        waiting.register(descriptor, select.POLLIN)
    while len(data) < size:
        ready = [descriptor for descriptor, _ in waiting.poll(_milliseconds(deadline))]
        if not ready:
            raise TimeoutError("it doesn't answer in time")
        if connection.fileno() not in ready:
            raise EOFError("its process has ended")
        part = connection.recv(min(size - len(data), 1 << 20))
        if not part:
            raise EOFError("the connection is closed")
        data += part
    return bytes(data)


def has_ended(descriptor: int, seconds: float) -> bool:
    """Whether the process of a descriptor of :func:`os.pidfd_open` ends within that time."""
    waiting = select.poll()
    waiting.register(descriptor, select.POLLIN)
    return bool(waiting.poll(seconds * 1000))


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(deadline - time.monotonic(), 1e-3)


def _milliseconds(deadline: float | None) -> float | None:
    left = _left(deadline)
    return None if left is None else left * 1000
