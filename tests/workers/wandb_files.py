"""Reads what an offline W&B run has written: LevelDB's log format around W&B's own protobuf records."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32768, 7  # bytes


@dataclass
class OfflineRun:
    """One W&B run, of all its offline folders."""

    project: str = ""
    name: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    axes: dict[str, str] = field(default_factory=dict)
    exit_code: int | None = None


def _chunks(data: bytes) -> Iterator[bytes]:
    """The records of a log; the file begins with W&B's own seven bytes."""
    assert data[:4] == b":W&B", data[:HEADER]
    position, parts = HEADER, b""
    while position + HEADER <= len(data):
        if BLOCK - position % BLOCK < HEADER:
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + HEADER])
        parts += data[position + HEADER : position + HEADER + length]
        position += HEADER + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def offline_runs(folder: Path) -> dict[str, OfflineRun]:
    """What ``wandb sync`` would upload of a run folder, by W&B's run id."""
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # W&B's service writes in a process beside this one; the files are whole once it has ended
    runs: dict[str, OfflineRun] = {}
    found = {path.resolve() for path in (folder / "wandb").glob("*/*.wandb")}  # latest-run is a link to one of them
    for path in sorted(found, key=lambda file: file.stat().st_mtime_ns):
        run = runs.setdefault(re.fullmatch(r"run-(\w+)\.wandb", path.name)[1], OfflineRun())
        for chunk in _chunks(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(chunk)
            _take(run, record)
    return runs


def _take(run: OfflineRun, record: Any) -> None:
    def plain(items: Any) -> dict[str, Any]:
        return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}

    kind = record.WhichOneof("record_type")
    if kind == "run":
        run.project, run.name, run.tags = record.run.project, record.run.display_name, list(record.run.tags)
        run.config |= plain(record.run.config.update)
    elif kind == "history":
        run.history.append(plain(record.history.item) | {"_step": record.history.step.num})
    elif kind == "summary":
        run.summary |= plain(record.summary.update)
    elif kind == "metric" and record.metric.step_metric:
        run.axes[record.metric.name] = record.metric.step_metric
    elif kind == "exit":
        run.exit_code = record.exit.exit_code
