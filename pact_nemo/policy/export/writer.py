"""One rank's part of an export: its files, written by threads while the next weights are still being gathered.

A weight is converted, digested and written in chunks that stay in the processor's cache, straight to its place in its
file. Nothing is collected: what is held is the queue of weights that wait, bounded in bytes. The folder's reader gets
every digest from memory, so an error of the disk can't hide in it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from blake3 import blake3

from pact_nemo.errors import CheckpointError
from pact_nemo.policy.export import fp8_block
from pact_nemo.policy.export.layout import FilePlan, StoredTensor, converter
from pact_nemo.runtime.digests import PART_BYTES, FileEntry, check_files

QUEUE_BYTES = (
    512 << 20
)  #: weights that wait for a thread, in bytes as gathered; one weight may always wait, however large
THREADS = 2  #: one waits for the disk while the other converts
_CHUNK_BYTES = {
    "cpu": 2 << 20,
    "cuda": 32 << 20,
}  # converted at a time: fits the cache; on a GPU, long enough for the bus
_FLUSH_BYTES = (
    32 << 20
)  # of a file: then its pages start on their way to the disk, so that the final fsync finds little left
_Part = tuple[int, int, str]  # first byte, end (exclusive), digest


@dataclass
class _File:
    """A file that is being written. ``old`` is the previous version's entry while everything that came equals it;
    nothing is written until then.
    """

    plan: FilePlan
    left: int
    old: FileEntry | None
    fd: int | None = None
    parts: list[_Part] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


class FolderWriter:
    """Writes the files of one rank. ``put`` every weight, then ``close``.

    Args:
        folder: existing folder.
        plans: files that this rank writes.
        dtype: export dtype.
        previous: (folder, manifest entries) of an earlier export; a file that would come out equal becomes a hard link
            to its file there.
        queue_bytes: bound of the queue.

    Attributes:
        linked: bytes of files that became links.
    """

    def __init__(
        self,
        folder: Path,
        plans: list[FilePlan],
        dtype: str,
        *,
        previous: tuple[Path, dict[str, FileEntry]] | None = None,
        queue_bytes: int = QUEUE_BYTES,
        threads: int = THREADS,
    ):
        self._folder, self._convert, self._queue_bytes = folder, converter(dtype), queue_bytes
        self._previous = previous[0] if previous is not None else None
        entries = previous[1] if previous is not None else {}
        self._states = [_File(plan, len(plan.weights), _same_layout(plan, entries)) for plan in plans]
        self._files = {name: state for state in self._states for name in state.plan.weights}
        self._waiting: deque[tuple[str, torch.Tensor]] = deque()
        self._waiting_bytes = 0
        self._change = threading.Condition()
        self._closing = False
        self._error: Exception | None = None
        self.linked = 0
        self._threads = [
            threading.Thread(target=self._run, name=f"export-{index}", daemon=True)
            for index in range(threads if plans else 0)
        ]
        for thread in self._threads:
            thread.start()

    def wants(self, name: str) -> bool:
        """Whether this rank writes the weight."""
        return name in self._files

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Hand over a weight, which must stay as it is until ``close``. Waits while the queue is full; after a failure
        it is dropped.
        """
        size = tensor.numel() * tensor.element_size()
        with self._change:
            while self._error is None and self._waiting and self._waiting_bytes + size > self._queue_bytes:
                self._change.wait()
            if self._error is None:
                self._waiting.append((name, tensor))
                self._waiting_bytes += size
                self._change.notify_all()

    def close(self) -> dict[str, FileEntry]:
        """Wait until everything is on the disk; safe to call after a failure and twice.

        Raises:
            CheckpointError: a file can't be written; the message names it and the remedy.
        """
        with self._change:
            self._closing = True
            self._change.notify_all()
        for thread in self._threads:
            thread.join()
        for state in self._states:
            if state.fd is not None:  # a failure, or weights that never came
                os.close(state.fd)
                state.fd = None
        if self._error is not None:
            raise self._error
        unfinished = [state.plan.name for state in self._states if state.left]
        if unfinished:
            raise CheckpointError(f"{self._folder / unfinished[0]}: some of its weights never came; export again")
        return {state.plan.name: _entry(state) for state in self._states}

    # ---------------------------------------------------------------- threads

    def _run(self) -> None:
        while True:
            with self._change:
                while not self._waiting and not self._closing:
                    self._change.wait()
                if not self._waiting:
                    return
                name, tensor = self._waiting.popleft()
            size = tensor.numel() * tensor.element_size()
            try:
                if self._error is None:
                    self._store(self._files[name], name, tensor.detach())
            except Exception as error:  # handed to the caller by close()
                with self._change:
                    self._error = self._error or self._typed(self._files[name].plan, error)
            finally:
                del tensor
                with self._change:
                    self._waiting_bytes -= size
                    self._change.notify_all()

    def _typed(self, plan: FilePlan, error: Exception) -> Exception:
        if isinstance(error, OSError):
            remedy = (
                "make room there, lower rollout.keep_exports or set rollout.exports_dir to another disk"
                if error.errno == errno.ENOSPC
                else ("check that disk, or set rollout.exports_dir to another one")
            )
            typed = CheckpointError(f"{self._folder / plan.name} can't be written ({error}); {remedy}")
            typed.__cause__ = error
            return typed
        return error

    @torch.no_grad()
    def _store(self, file: _File, name: str, weight: torch.Tensor) -> None:
        """Digest a weight, and write it unless the previous version's file holds the very same so far."""
        if file.old is not None:
            parts = self._pass(file, name, weight, None)
            with file.lock:
                if file.old is not None:
                    if set(parts) <= set(_parts(file.old)):
                        file.parts += parts
                        self._finish_one(file)
                        return
                    self._open_with_old_parts(file)
        with file.lock:
            if file.fd is None:
                file.fd = self._open(file)
        parts = self._pass(file, name, weight, file.fd)
        with file.lock:
            file.parts += parts
            self._finish_one(file)

    def _pass(self, file: _File, name: str, weight: torch.Tensor, fd: int | None) -> list[_Part]:
        """Convert a weight chunk by chunk and digest its tensors; write them when there is a file."""
        stored = file.plan.weights[name]
        cursors = [_Cursor(file.plan.starts[tensor.name]) for tensor in stored]
        for rows in _chunks(weight, stored, _CHUNK_BYTES.get(weight.device.type, _CHUNK_BYTES["cuda"])):
            for cursor, tensor in zip(cursors, self._convert(name, rows), strict=True):
                data = memoryview(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
                if fd is not None:
                    _write(fd, data, cursor.position)
                cursor.add(data)
                if fd is not None and cursor.position - cursor.flushed >= _FLUSH_BYTES:
                    start_writeback(fd, cursor.flushed, cursor.position)
                    cursor.flushed = cursor.position
        return [part for cursor in cursors for part in cursor.end()]

    def _open(self, file: _File) -> int:
        fd = os.open(self._folder / file.plan.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        _write(fd, memoryview(file.plan.header), 0)
        return fd

    def _open_with_old_parts(self, file: _File) -> None:
        """The first weight of a file that changed: from here on it is written, after the unchanged ones that came
        before.
        """
        fd = self._open(file)
        file.fd = fd
        assert self._previous is not None
        source = self._previous / file.plan.name
        with open(source, "rb", buffering=0) as handle:
            for start, end, digest in file.parts:
                data = os.pread(handle.fileno(), end - start, start)
                if blake3(data).hexdigest() != digest:
                    raise CheckpointError(f"{source} is corrupt: delete {self._previous} and export again")
                _write(fd, memoryview(data), start)
        file.old = None

    def _finish_one(self, file: _File) -> None:
        """Count a weight; with the last one the file is complete. Under the file's lock."""
        file.left -= 1
        if file.left:
            return
        if file.old is None:
            assert file.fd is not None
            os.fsync(file.fd)
            os.close(file.fd)
            file.fd = None
            return
        assert self._previous is not None
        source, target = self._previous / file.plan.name, self._folder / file.plan.name
        check_files(self._previous, {file.plan.name: file.old}, f"delete {self._previous} and export again")
        try:
            os.link(source, target)
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(source, target)
            with open(target, "rb") as handle:
                os.fsync(handle.fileno())
        with self._change:
            self.linked += file.plan.size


class _Cursor:
    """Where a tensor's next bytes go, and the digests of those before."""

    def __init__(self, start: int):
        self.position = self.flushed = self._part_start = start
        self._digest = blake3()
        self._parts: list[_Part] = []

    def add(self, data: memoryview) -> None:
        while data:
            piece = data[: self._part_start + PART_BYTES - self.position]
            self._digest.update(piece)
            self.position += len(piece)
            data = data[len(piece) :]
            if self.position - self._part_start == PART_BYTES:
                self._cut()

    def _cut(self) -> None:
        self._parts.append((self._part_start, self.position, self._digest.hexdigest()))
        self._part_start, self._digest = self.position, blake3()

    def end(self) -> list[_Part]:
        if self.position > self._part_start:
            self._cut()
        return self._parts


def _chunks(weight: torch.Tensor, stored: list[StoredTensor], limit: int) -> Iterator[torch.Tensor]:
    """Consecutive rows of a weight, about ``limit`` bytes each; whole blocks where they share scales."""
    rows = weight.reshape(1) if weight.dim() == 0 else weight
    step = max(1, limit // max(1, rows[:1].numel() * weight.element_size()))
    if len(stored) > 1:
        step = -(-step // fp8_block.BLOCK) * fp8_block.BLOCK
    return (rows[start : start + step] for start in range(0, rows.shape[0], step))


def _same_layout(plan: FilePlan, entries: dict[str, FileEntry]) -> FileEntry | None:
    """The previous version's file of that name, if it holds the same tensors at the same places."""
    entry = entries.get(plan.name)
    same = (
        entry is not None
        and entry.size == plan.size
        and entry.parts[0] == (len(plan.header), blake3(plan.header).hexdigest())
    )
    return entry if same else None


def _parts(entry: FileEntry) -> list[_Part]:
    return [(start, end, digest) for (start, _), (end, digest) in pairwise([(0, ""), *entry.parts])]


def _entry(file: _File) -> FileEntry:
    header = (len(file.plan.header), blake3(file.plan.header).hexdigest())
    return FileEntry(file.plan.size, (header, *((end, digest) for _, end, digest in sorted(file.parts))))


def _write(fd: int, data: memoryview, position: int) -> None:
    while data:
        written = os.pwrite(fd, data, position)
        data, position = data[written:], position + written


_SYNC_FILE_RANGE_WRITE = 2
_sync_file_range = getattr(
    ctypes.CDLL(None, use_errno=True), "sync_file_range", None
)  # Linux; Python has no name for it


def start_writeback(fd: int, start: int, end: int) -> None:
    """Ask the kernel to begin writing dirty pages of a file, without waiting; a hint only."""
    if _sync_file_range is not None:
        _sync_file_range(fd, ctypes.c_int64(start), ctypes.c_int64(end - start), _SYNC_FILE_RANGE_WRITE)
