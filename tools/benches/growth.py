"""How a step grows: its time and memory against group size, trace, prompt, vocabulary and processes, PACT beside plain
GRPO, and the planner's line.

Every point is one step from finished rollouts to new weights (scoring under the old policy and the reference, forward,
backward, optimizer) of a small random Llama in float32 on this machine's CPU, in processes of its own. One length
changes along an axis, all others keep their value (``--base``). Both methods train on rollouts of the same lengths;
every PACT prompt is trained under its trace (q = 0), the dearest case.

- time: median of ``--rounds`` steps, the methods in turn;
- memory: peak of the resident set over what lasts from step to step, of one more step; with several processes, of the
  fullest;
- ``processes``: the same eight prompts over 1 to 8 data-parallel processes of one thread each (gloo). Past this
  machine's cores they only share;
- planned: :mod:`pact_nemo.planning` on the rates measured here at the start. Its memory is what autograd, head and
  scoring need; the optimizer's temporaries and the allocator's gaps are not in it.

Exponents are slopes on log-log axes: over all points of an axis (zeros left out), and of its last two. ``ratio`` is the
largest, over the axes of lengths, of PACT's measured growth of time from the first to the last point over the planned
one: above 1, something grows that arithmetic doesn't ask for.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pact_nemo.errors import ConfigError, PactError
from pact_nemo.planning.hardware import Hardware, this_cpu
from tools.benches.growth_picture import growth_svg
from tools.benches.growth_point import METHODS, Point, predict
from tools.benches.kit import report

GOAL = 1.25
MIB = 1 << 20
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Axis:
    """What changes, how it is called in the picture, its values, and settings of its own."""

    field: str
    label: str
    values: tuple[int, ...]
    base: dict[str, int] = dataclasses.field(default_factory=dict)


AXES = {
    "K": Axis("group", "K, rollouts a prompt", (2, 4, 8, 16, 32)),
    "trace": Axis("trace", "trace, tokens", (0, 512, 1024, 2048, 4096, 8192)),
    "prompt": Axis("prompt", "prompt, tokens", (512, 1024, 2048, 4096, 8192)),
    "vocabulary": Axis("vocabulary", "vocabulary", (8192, 16384, 32768, 65536, 151936)),
    "processes": Axis("processes", "processes (data parallel)", (1, 2, 4, 8), {"prompts": 8, "group": 4, "threads": 1}),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--points", type=int, help="only the first so many of each axis")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--base", nargs="*", default=[], metavar="FIELD=N", help=f"of every point: {', '.join(vars(Point()))}"
    )
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds that a point may take")
    parser.add_argument("--out", type=Path, help="write points and exponents as JSON")
    parser.add_argument("--picture", type=Path, help="draw them as SVG")
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="JSON",
        help="measure nothing: plan and draw the points of an earlier --out anew",
    )


def run(options: Namespace) -> int:
    if options.source is not None:
        try:
            found = json.loads(options.source.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{options.source}: no result of this bench ({error})") from error
    else:
        found = sweep(options)
    data = summarise(found)
    if options.out is not None:
        options.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    if options.picture is not None:
        options.picture.write_text(growth_svg(data), encoding="utf-8")
    rows = [
        {
            "axis": name,
            "value": point["value"],
            "GRPO s": point["grpo"]["seconds"],
            "PACT s": point["pact"]["seconds"],
            "ratio": point["ratio"],
            "planned s": point["pact"]["planned_seconds"],
            "GRPO MiB": point["grpo"]["bytes"] / MIB,
            "PACT MiB": point["pact"]["bytes"] / MIB,
            "planned MiB": point["pact"]["planned_bytes"] / MIB,
        }
        for name, axis in data["axes"].items()
        for point in axis["points"]
    ]
    exponents_by_axis = {name: axis["exponents"] for name, axis in data["axes"].items()}
    lines = {
        f"{name}, PACT's {what}": _slopes(found, f"pact {key}")
        for name, found in exponents_by_axis.items()
        for what, key in (("time", "seconds"), ("memory", "bytes"))
    }
    result = {**lines, "exponents": exponents_by_axis, "ratio": data["ratio"], "goal": f"<= {GOAL}"}
    report(options, "a step from finished rollouts to new weights", rows, result)
    return 0


def _slopes(found: dict[str, dict[str, float | None]], name: str) -> str:
    """PACT's exponents of an axis in words; ``name`` such as ``pact bytes``."""
    measured, planned = found[name], found[name.replace(" ", " planned_")]
    if measured["all"] is None:
        return "one point"
    return (
        f"x^{measured['all']:.2f} (planned {planned['all']:.2f}), at the end x^{measured['end']:.2f} (planned"
        f" {planned['end']:.2f})"
    )


def sweep(options: Namespace) -> dict[str, Any]:
    """Measure every point of every axis: ``hardware`` by number of threads, and ``axes``."""
    cores = len(os.sched_getaffinity(0))
    base = _settings(options.base)
    hardware = {str(threads): dataclasses.asdict(_rates(threads)) for threads in sorted({1, cores})}
    axes: dict[str, Any] = {}
    found = {"cores": cores, "hardware": hardware, "axes": axes}
    with tempfile.TemporaryDirectory(prefix="bench-growth-") as folder:
        for name in options.axes:
            axis = AXES[name]
            values = axis.values[: options.points]
            points = [
                Point(**{"threads": cores, **axis.base, **base, axis.field: value, "rounds": options.rounds})
                for value in values
            ]
            for value, point in zip(values, points, strict=True):
                measured = _apart(point, Path(folder), options.timeout)
                axes.setdefault(name, {"label": axis.label, "points": []})["points"].append(
                    {"value": value, **measured}
                )
                seconds = ", ".join(f"{method} {measured[method]['seconds']:.2f} s" for method in METHODS)
                print(f"{name} {value}: {seconds}", file=sys.stderr, flush=True)
                if options.out is not None:  # what there is, for --from, should a later point fail
                    options.out.write_text(json.dumps(found), encoding="utf-8")
    return found


def _settings(words: Sequence[str]) -> dict[str, int]:
    found = {}
    for word in words:
        key, _, value = word.partition("=")
        if key not in vars(Point()) or not value.isdigit():
            raise ConfigError(f"--base {word}: want FIELD=N with FIELD one of {', '.join(vars(Point()))}")
        found[key] = int(value)
    return found


def _rates(threads: int) -> Hardware:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return this_cpu()
    finally:
        torch.set_num_threads(before)


def _apart(point: Point, folder: Path, timeout: float) -> dict[str, Any]:
    """Measure a point in processes of its own, so that its peak memory is nobody else's."""
    given, taken = folder / "point.json", folder / "found.json"
    given.write_text(json.dumps(dataclasses.asdict(point)), encoding="utf-8")
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={point.processes}"]
        if point.processes > 1
        else []
    )
    command = [sys.executable, *launcher, "-m", "tools.benches.growth_point", str(given), str(taken), str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": str(point.threads)}
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired as error:
        raise PactError(f"{point}: not measured within {timeout:g} s (--timeout)") from error
    if done.returncode:
        raise PactError(f"{point}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(taken.read_text(encoding="utf-8"))
    return found


def summarise(found: dict[str, Any]) -> dict[str, Any]:
    """What was measured, with the plan of each point, the ratios and the exponents added."""
    for axis in found["axes"].values():
        for entry in axis["points"]:
            point = Point(**entry["point"])
            for method in METHODS:
                plan = predict(point, method, _beside(found, point))
                entry[method] |= {f"planned_{name}": value for name, value in plan.items()}
            entry["ratio"] = entry["pact"]["seconds"] / entry["grpo"]["seconds"]
            entry["memory_ratio"] = entry["pact"]["bytes"] / entry["grpo"]["bytes"]
        values = [entry["value"] for entry in axis["points"]]
        axis["exponents"] = {
            f"{method} {name}": exponents(values, [entry[method][name] for entry in axis["points"]])
            for method in METHODS
            for name in ("seconds", "planned_seconds", "bytes", "planned_bytes")
        }
    return {**found, "ratio": _growth_over_plan(found["axes"])}


def _beside(found: dict[str, Any], point: Point) -> Hardware:
    """What one process gets: its threads' rates, and its share of them where the processes have more threads than there
    are cores.
    """
    hardware = Hardware(**found["hardware"].get(str(point.threads), found["hardware"][str(found["cores"])]))
    share = min(1.0, found["cores"] / (point.threads * point.processes))
    return dataclasses.replace(
        hardware,
        bf16=hardware.bf16 * share,
        memory_bandwidth=hardware.memory_bandwidth * share,
        node_bandwidth=hardware.node_bandwidth * share,
        network_bandwidth=hardware.network_bandwidth * share,
    )


def _growth_over_plan(axes: dict[str, Any]) -> float:
    found = []
    for name, axis in axes.items():
        first, last = axis["points"][0]["pact"], axis["points"][-1]["pact"]
        if name != "processes":
            found.append(last["seconds"] / first["seconds"] / (last["planned_seconds"] / first["planned_seconds"]))
    return max(found, default=1.0)


def exponents(x: Sequence[float], y: Sequence[float]) -> dict[str, float | None]:
    """p of y ~ x^p: ``all`` by least squares on the logarithms, ``end`` between the last two; None with fewer than two
    positive points.
    """
    points = [(math.log(a), math.log(b)) for a, b in zip(x, y, strict=True) if a > 0 and b > 0]
    if len(points) < 2:
        return {"all": None, "end": None}
    mean_a, mean_b = (sum(values) / len(points) for values in zip(*points, strict=True))
    slope = sum((a - mean_a) * (b - mean_b) for a, b in points) / sum((a - mean_a) ** 2 for a, _ in points)
    (before_a, before_b), (last_a, last_b) = points[-2:]
    return {"all": slope, "end": (last_b - before_b) / (last_a - before_a)}
