"""How much of the machine's matrix peak the trainer and the server reach, in each precision.

The peak is that of a linear layer of the model's own feed-forward: 1,024 rows as the trainer has, 32 rows as a server
with 32 episodes has. It is measured before every round, so that other work on the machine slows both. Scoring and
update of one of a finished run's steps are done again on its dumped rollouts, in each precision. Their rate is the
operations of all matrix products, counted by torch, over the wall time; attention's are not counted. The server's rate
is that of the run: two operations a parameter and sampled token, over the rollout phase. Reading prompts is left out
there, so it is a lower bound.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from pact_nemo.config.load import load_config
from pact_nemo.planning.shape import ModelShape
from tools.benches.kit import (
    interleaved,
    median_ratio,
    recorded_groups,
    report,
    seconds,
    stand_in,
    still_policy,
    timed_step,
)

GOAL = 0.4
ROWS = {"trainer": 1024, "server": 32}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OF_SERVER = {"float32": "fp32", "bfloat16": "bf16"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run", type=Path, default=Path("runs/latest"), help="finished run with metrics.jsonl, rollouts/ and hf/"
    )
    parser.add_argument("--step", type=int, default=1, help="which dumped step is done again")
    parser.add_argument("--rounds", type=int, default=3)


def run(options: argparse.Namespace) -> int:
    shape = ModelShape.from_hf(json.loads((options.run / "hf" / "config.json").read_text()))
    steps = {name: steps_in(options.run, options.step, name) for name in DTYPES}

    def contest(name: str) -> dict[str, float]:
        most = {part: peak(shape, rows, DTYPES[name]) for part, rows in ROWS.items()}
        return {"seconds": steps[name][0](), **most}

    found = interleaved(options.rounds, {name: lambda name=name: contest(name) for name in DTYPES})  # type: ignore[misc]
    times = {name: [each["seconds"] for each in rounds] for name, rounds in found.items()}
    peaks = {
        (part, name): statistics.median(each[part] for each in rounds)
        for name, rounds in found.items()
        for part in ROWS
    }
    rows: list[dict[str, Any]] = []
    for name, (_, operations) in steps.items():
        wall = statistics.median(times[name])
        rows.append(row("score and update", name, wall, operations / wall, peaks["trainer", name]))
    name, rate, wall = sampled(options.run, shape.parameters)
    rows.append(row("generation, as the run had it", name, wall, rate, peaks["server", name]))
    ratio, spread = median_ratio(times["bf16"], times["fp32"])
    result = {"threads": torch.get_num_threads(), "spread": spread, "ratio": ratio, "goal": f"<= {GOAL}"}
    report(options, f"{options.run.resolve().name}: share of the matrix peak", rows, result)
    return 0


def row(part: str, precision: str, wall: float, rate: float, most: float) -> dict[str, Any]:
    """One line of the table; rates in operations a second."""
    return {
        "part": part,
        "precision": precision,
        "seconds": wall,
        "GFLOP/s": rate / 1e9,
        "peak GFLOP/s": most / 1e9,
        "share": rate / most,
    }


def peak(shape: ModelShape, rows: int, dtype: torch.dtype, repeats: int = 15) -> float:
    """Operations a second of the feed-forward's first matrix, forward."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = torch.randn(rows, shape.hidden, device=device).to(dtype)
    weight = torch.randn(shape.intermediate, shape.hidden, device=device).to(dtype)

    def product() -> None:
        torch.nn.functional.linear(inputs, weight)
        if device == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        product()
    return 2.0 * rows * shape.hidden * shape.intermediate / statistics.median(seconds(product) for _ in range(repeats))


def steps_in(run: Path, step: int, precision: str) -> tuple[Callable[[], float], float]:
    """A call that does the step again and returns its seconds, and the operations of its matrix products."""
    config, groups = recorded_groups(run, [step], words=[f"policy.precision={precision}"])
    run_of = stand_in(config, still_policy(config, run / "hf"))
    run_of.state.step = step
    with counter() as found:
        timed_step(run_of, groups[0])
    return lambda: timed_step(run_of, groups[0])["total"], float(found.get_total_flops())


def counter() -> FlopCounterMode:
    """Counts the operations of matrix products, those that add to a tensor in place included."""
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _accumulated})


def _accumulated(own: Any, left: Any, right: Any, **_: Any) -> int:
    """Operations of ``addmm_`` on tensors of these shapes, which torch doesn't count."""
    return 2 * int(left[0]) * int(left[1]) * int(right[1])


def sampled(run: Path, parameters: int) -> tuple[str, float, float]:
    """Precision of the run's server, operations a second while it generated, and seconds a step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    speeds = [line["rollout/tokens_per_second"] for line in lines if line.get("rollout/tokens_per_second")]
    waits = [line["time/rollout"] for line in lines if line.get("rollout/tokens_per_second")]
    dtype = load_config(run / "config.yaml").rollout.server.dtype
    later = slice(1, None) if len(speeds) > 1 else slice(None)  # the first step warms the server up
    return OF_SERVER[dtype], 2.0 * parameters * statistics.median(speeds[later]), statistics.median(waits[later])
