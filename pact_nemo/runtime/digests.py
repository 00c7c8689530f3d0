"""Digests of files in parts, so that a file can be written in any order, by several threads, and checked by several
threads.

A file's digest is a list of consecutive parts, each with the BLAKE3 of its bytes; together they cover the file. Whoever
writes a file knows the digests of its parts from memory and needs no second look at the disk. BLAKE3 instead of SHA-256
because it is the cheaper of two cryptographic hashes: 4.7 against 1.35 GB/s on one core that has the SHA instructions
(docs/cluster/refit.md).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from blake3 import blake3

from pact_nemo.errors import CheckpointError

PART_BYTES = 64 << 20  #: longest part of a file, and so the grain of parallel checks
_BLOCK_BYTES = 1 << 20  # read at a time: what is hashed next is still in the processor's cache
_THREADS = 16  # at most; both hashes and the reads release the interpreter lock
_ALGORITHMS: dict[str, Callable[[], Any]] = {"blake3": blake3, "sha256": hashlib.sha256}


@dataclass(frozen=True)
class FileEntry:
    """What a file must hold.

    Attributes:
        size: bytes.
        parts: (end of the part, exclusive, in bytes from the file's start; hex digest of its bytes), ascending; the
            last end is ``size``.
        algorithm: of the digests, ``blake3`` or (manifests of schema 1) ``sha256``.
    """

    size: int
    parts: tuple[tuple[int, str], ...]
    algorithm: str = "blake3"

    def __post_init__(self) -> None:
        ends = [0, *(end for end, _ in self.parts)]
        if (
            self.algorithm not in _ALGORITHMS
            or ends[-1] != self.size
            or any(a >= b for a, b in pairwise(ends))
            and self.size
        ):
            raise ValueError(f"parts {ends[1:3]}… do not make up a file of {self.size} bytes")


def file_entry(path: str | os.PathLike[str]) -> FileEntry:
    """Read a file and digest it in parts of ``PART_BYTES``."""
    size = os.stat(path).st_size
    ends = [*range(PART_BYTES, size, PART_BYTES), size]
    with open(path, "rb", buffering=0) as handle:
        return FileEntry(
            size, tuple((end, part_digest(handle.fileno(), start, end)) for start, end in pairwise([0, *ends]))
        )


def part_digest(fd: int, start: int, end: int, algorithm: str = "blake3") -> str:
    """Hex digest of the bytes [start, end) of an open file; of fewer where the file is shorter."""
    digest = _ALGORITHMS[algorithm]()
    buffer = memoryview(bytearray(min(_BLOCK_BYTES, max(end - start, 1))))
    while start < end:
        read = os.preadv(fd, [buffer[: end - start]], start)
        if read == 0:
            break
        digest.update(buffer[:read])
        start += read
    return str(digest.hexdigest())


def file_entries(paths: Iterable[str | os.PathLike[str]]) -> list[FileEntry]:
    """:func:`file_entry` of several files, in parallel."""
    with ThreadPoolExecutor(threads()) as pool:
        return list(pool.map(file_entry, paths))


def check_files(base: Path, entries: dict[str, FileEntry], remedy: str) -> None:
    """Read the files and compare every part with its digest, in parallel; sizes are the caller's to check.

    Args:
        base: folder that the names are relative to.
        entries: what they must hold.
        remedy: end of the error message.

    Raises:
        CheckpointError: names the first file (in the order of ``entries``) that differs.
    """

    def check(job: tuple[str, int, int, str]) -> tuple[str, bool]:
        name, start, end, expected = job
        fd = os.open(base / name, os.O_RDONLY)
        try:
            return name, part_digest(fd, start, end, entries[name].algorithm) == expected
        finally:
            os.close(fd)

    def jobs() -> Iterator[tuple[str, int, int, str]]:
        for name, entry in entries.items():
            for (start, _), (end, expected) in pairwise([(0, ""), *entry.parts]):
                yield name, start, end, expected

    with ThreadPoolExecutor(threads()) as pool:
        for name, same in pool.map(check, jobs()):
            if not same:
                algorithm = entries[name].algorithm.upper().replace("SHA", "SHA-")
                raise CheckpointError(
                    f"{base / name} is corrupt: its {algorithm} differs from the manifest's; {remedy}"
                )


def threads() -> int:
    """Threads for reading and hashing: as many as cores that this process may use, within bounds."""
    return max(2, min(_THREADS, len(os.sched_getaffinity(0))))
