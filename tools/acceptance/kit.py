"""How the checks of a step run: in groups, each in a process with a time limit, every result on disk at once.

A check returns what it measured. One that raises is a finding, too; the others still run. So a crash, a hang or a
poisoned CUDA context costs the rest of its group and nothing else.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pact_nemo.checkout import ROOT
from pact_nemo.runtime.files import write_text_atomic

Check = Callable[["Settings"], dict[str, Any]]


@dataclass(frozen=True)
class Settings:
    """What a check is told.

    Attributes:
        small: sizes for a machine without a GPU, to rehearse the script itself.
        folder: scratch folder, big enough for a model of a few gigabytes.
    """

    small: bool
    folder: Path


@dataclass(frozen=True)
class Group:
    """Checks that share a process.

    Attributes:
        name: of the group.
        limit_s: seconds after which its process is killed.
    """

    name: str
    limit_s: float
    checks: tuple[Check, ...]


def checks_of(name: str, limit_s: float, *checks: Check) -> Group:
    """A group of these checks."""
    return Group(name, limit_s, checks)


def run_group(group: Group, settings: Settings, lines: Path) -> None:
    """In the group's own process: run its checks, append one JSON line each."""
    for check in group.checks:
        name, start = check.__name__, time.perf_counter()
        _append(lines, {"group": group.name, "check": name, "started": True})
        try:
            found: dict[str, Any] = {"result": check(settings)}
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-3000:]}
        _append(lines, {"group": group.name, "check": name, "seconds": time.perf_counter() - start, **found})


def run_step(step: str, groups: Sequence[Group], command: Sequence[str], out: Path, *, limit_s: float) -> int:
    """Run the groups one after another, write ``out`` after each, print the last state as JSON.

    Args:
        command: of a group's process; ``--group NAME --lines FILE`` follow.
        limit_s: seconds of the whole step; a group gets what is left, at most its own limit.

    Returns:
        0 when every check ended without an error, else 1.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    lines, end = out.with_suffix(".lines"), time.monotonic() + limit_s
    lines.unlink(missing_ok=True)
    stopped: dict[str, str] = {}
    found: dict[str, Any] = {}
    for group in groups:
        left = end - time.monotonic()
        if left < 10:
            stopped[group.name] = "not started: the step's time is over"
            continue
        why = _child(group, command, lines, min(group.limit_s, left))
        if why is not None:
            stopped[group.name] = why
        found = {"step": step, "checks": collected(lines), "stopped": stopped}
        write_text_atomic(out, json.dumps(found, indent=1))
    print(json.dumps(found, indent=1))
    broken = [check for check in found.get("checks", ()) if "result" not in check]
    return 1 if stopped or broken else 0


def collected(lines: Path) -> list[dict[str, Any]]:
    """The last line of every check; one that only started was cut off."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for line in lines.read_text().splitlines() if lines.is_file() else ():
        row = json.loads(line)
        rows[row["group"], row["check"]] = row
    return list(rows.values())


def _append(lines: Path, row: dict[str, Any]) -> None:
    with lines.open("a") as handle:
        handle.write(json.dumps(row, default=str) + "\n")
    label = row.get("error") or json.dumps(row.get("result", "..."), default=str)
    print(f"[{row['group']}] {row['check']}: {label[:1500]}", file=sys.stderr, flush=True)


def _child(group: Group, command: Sequence[str], lines: Path, limit_s: float) -> str | None:
    """Run one group; why it was stopped, None = it ended by itself."""
    command = [*command, "--group", group.name, "--lines", str(lines)]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        code = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        _end_session(process.pid)
        process.wait()
        return f"killed after {limit_s:.0f} s"
    finally:
        _end_session(process.pid)
    return None if code == 0 else f"exit code {code}"


def _end_session(leader: int) -> None:
    """Kill what the group left running."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return
