"""The acceptance of a GPU, without one: groups that crash or hang, the checks at small sizes, pruned libraries."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.test_own_worker_life import gone
from tools.acceptance.kit import Group, Settings, collected, run_group, run_step
from tools.acceptance.one_architecture import keep_one_architecture

REPO = Path(__file__).resolve().parents[1]
#: a group's process: says that it started, then does what its name says
PROGRAM = """
import json, os, subprocess, sys, time
name, lines = sys.argv[2], sys.argv[4]
with open(lines, "a") as handle:
    handle.write(json.dumps({"group": name, "check": "first", "result": {"figure": 1}}) + "\\n")
    handle.write(json.dumps({"group": name, "check": "second", "started": True}) + "\\n")
if name == "crash":
    os._exit(139)
if name == "hang":
    print(subprocess.Popen(["sleep", "600"]).pid, file=open(lines + ".child", "w"))
    time.sleep(600)
with open(lines, "a") as handle:
    handle.write(json.dumps({"group": name, "check": "second", "result": {"figure": 2}}) + "\\n")
"""


def run(names: list[str], folder: Path, limit_s: float = 60.0) -> tuple[int, dict[str, Any]]:
    groups = [Group(name, 3.0, ()) for name in names]
    code = run_step("trial", groups, [sys.executable, "-c", PROGRAM], folder / "out.json", limit_s=limit_s)
    return code, json.loads((folder / "out.json").read_text())


def test_a_crash_and_a_hang_cost_their_own_group_alone(tmp_path: Path) -> None:
    code, found = run(["crash", "hang", "good"], tmp_path)
    assert code == 1
    assert found["stopped"] == {"crash": "exit code 139", "hang": "killed after 3 s"}
    results = {(row["group"], row["check"]): row.get("result") for row in found["checks"]}
    assert results == {
        ("crash", "first"): {"figure": 1},
        ("crash", "second"): None,
        ("hang", "first"): {"figure": 1},
        ("hang", "second"): None,
        ("good", "first"): {"figure": 1},
        ("good", "second"): {"figure": 2},
    }
    assert gone([int((tmp_path / "out.lines.child").read_text())]), "what it started is gone as well"


def test_a_step_without_time_starts_nothing_more(tmp_path: Path) -> None:
    code = run_step("trial", [Group("good", 3.0, ())], [sys.executable, "-c", PROGRAM], tmp_path / "o.json", limit_s=5)
    assert code == 1 and not (tmp_path / "o.lines").exists()


def test_all_good_is_zero(tmp_path: Path) -> None:
    assert run(["good"], tmp_path)[0] == 0


def test_a_check_that_raises_is_a_finding(tmp_path: Path) -> None:
    def good(settings: Settings) -> dict[str, Any]:
        return {"small": settings.small}

    def bad(settings: Settings) -> dict[str, Any]:
        raise ValueError("no such kernel")

    run_group(Group("pair", 1.0, (bad, good)), Settings(True, tmp_path), tmp_path / "lines")
    first, second = collected(tmp_path / "lines")
    assert first["error"] == "ValueError: no such kernel" and "raise ValueError" in first["trace"]
    assert second["result"] == {"small": True}


@pytest.mark.parametrize(
    ("step", "groups", "checks"),
    [
        ("trainer", ["machine"], ["machine", "entropies"]),
        pytest.param(
            "trainer",
            ["same", "deterministic", "offload", "step", "resume", "kernels", "families", "waiting"],
            ["same", "deterministic", "offload", "step", "disk", "resume", "kernels", "families", "waiting"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "fp8",
            ["layers", "bf16", "blockwise", "tensorwise", "adapters"],
            ["machine", "layers", "bf16", "blockwise", "tensorwise", "adapters"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_checks_run_at_small_sizes(step: str, groups: list[str], checks: list[str], tmp_path: Path) -> None:
    command = [sys.executable, str(REPO / "tools" / "gpu_acceptance.py"), step, "--small", "--only", *groups]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out.json")], capture_output=True, text=True, timeout=400, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "out.json").read_text())
    assert {row["check"] for row in found["checks"]} == set(checks) and json.loads(done.stdout) == found
    results = {row["check"]: row["result"] for row in found["checks"]}
    if "same" in results:
        assert results["same"]["again"]["equal"] == 1.0 and results["same"]["separate"]["max"] < 1e-4
    if "deterministic" in results:
        assert results["deterministic"]["after"]["equal"] == 1.0


def fat_binary(entries: list[tuple[int, int, bytes]]) -> bytes:
    """Entries of (kind, architecture, payload) behind a header, as nvcc lays them out."""
    body = b""
    for kind, architecture, payload in entries:
        head = struct.pack("<HHIQ", kind, 257, 64, len(payload)) + bytes(12) + struct.pack("<I", architecture)
        body += head.ljust(64, b"\x01") + payload
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def test_only_one_architecture_is_kept_and_nothing_moves(tmp_path: Path) -> None:
    old, ours, text = b"a" * 800, b"b" * 512, b"c" * 96
    blob = b"before" + fat_binary([(2, 80, old), (2, 90, ours), (1, 90, text)]) + b"between \x50\xed\x55\xba no"
    blob += fat_binary([(2, 120, old)]) + b"after"
    path = tmp_path / "library.so"
    path.write_bytes(blob)
    assert keep_one_architecture(path, 90) == (512, 800 + 96 + 800)
    zeroed = path.read_bytes()
    assert len(zeroed) == len(blob) and zeroed.find(ours) == blob.find(ours)
    assert zeroed == blob.replace(old, bytes(800)).replace(text, bytes(96))
    assert keep_one_architecture(path, 90) == (512, 800 + 96 + 800), "a second time changes nothing"
    assert path.read_bytes() == zeroed
