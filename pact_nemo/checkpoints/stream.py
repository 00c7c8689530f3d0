"""Writing safetensors files tensor by tensor, as they come, by a thread that digests what it writes.

The format's own library needs all tensors of a file at once and copies each of them before it writes; here a file's layout is known from
names, types and shapes before its first tensor is there, so each tensor goes from where it is straight to its place in the file
(measured by ``tools/bench.py refit``).
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from queue import Queue
from typing import Any

import blake3
import torch

from pact_nemo.checkpoints.manifest import FileEntry

TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
PENDING = 4  # tensors that may wait for the thread


class SafetensorsWriter:
    """One safetensors file under construction.

    Args:
        path: file to create.
        shapes: name -> shape of its tensors, in the order in which they are expected.
        dtype: of all of them.
    """

    def __init__(self, path: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype):
        self.path, self.dtype = path, dtype
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, shape in shapes.items():
            size = torch.Size(shape).numel() * dtype.itemsize
            header[name] = {"dtype": TYPES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        head = len(text).to_bytes(8, "little") + text
        self.size = len(head) + offset
        self._places = {name: (len(head) + header[name]["data_offsets"][0], tuple(shape)) for name, shape in shapes.items()}
        self._digest: Any = blake3.blake3(head)
        self._digested = len(head)  # bytes from the start that the digest has seen
        self._file = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_RDWR, 0o644)
        os.pwrite(self._file, head, 0)

    @property
    def missing(self) -> set[str]:
        """Names of tensors that haven't come yet."""
        return set(self._places)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put a tensor into its place. Raises KeyError for one that isn't expected, ValueError for another shape, OSError as the disk does."""
        offset, shape = self._places.pop(name)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, {shape} was expected")
        data = memoryview(tensor.detach().to("cpu", self.dtype).contiguous().reshape(-1).view(torch.uint8).numpy())
        if offset == self._digested:
            self._digest.update(data)
            self._digested += len(data)
        while data:
            done = os.pwrite(self._file, data, offset)
            data, offset = data[done:], offset + done

    def close(self) -> FileEntry:
        """Flush to disk; size and digest of the file. Tensors that came out of order are read again for the digest."""
        try:
            while self._digested < self.size:
                block = os.pread(self._file, 1 << 24, self._digested)
                if not block:
                    raise OSError(f"{self.path} ends after {self._digested} of {self.size} bytes")
                self._digest.update(block)
                self._digested += len(block)
            os.fsync(self._file)
        finally:
            os.close(self._file)
        return FileEntry(self.size, self._digest.hexdigest())


class WriterThread:
    """Runs :class:`SafetensorsWriter` beside whoever makes the tensors; the first failure is kept, and what comes after it dropped."""

    def __init__(self) -> None:
        self.entries: dict[str, FileEntry] = {}
        self.problem: str | None = None
        self._queue: Queue[tuple[SafetensorsWriter, str, torch.Tensor] | None] = Queue(PENDING)
        self._thread = threading.Thread(target=self._work, name="export", daemon=True)
        self._thread.start()

    def put(self, writer: SafetensorsWriter, name: str, tensor: torch.Tensor) -> None:
        """Waits while ``PENDING`` tensors are before it: that bounds the memory."""
        self._queue.put((writer, name, tensor))

    def finish(self) -> None:
        """Until everything is written."""
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            if self.problem is not None:
                continue
            writer, name, tensor = item
            try:
                writer.write(name, tensor)
                if not writer.missing:
                    self.entries[writer.path.name] = writer.close()
            except (OSError, ValueError, KeyError) as error:
                self.problem = f"{writer.path} can't be written: {error}"
