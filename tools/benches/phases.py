"""Where a step's wall time goes, and the share that is neither generation nor matrix products.

Generation, refit and the trainer's phases are the means over the steps of a finished run (``time/*`` of its
``metrics.jsonl``; the first step warms everything up and is left out). What of scoring and update is matrix products
and attention is measured by torch's profiler on one of the run's steps, done again on its dumped rollouts: the self
time of those operators over the wall time of the same pass.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from tools.benches.kit import recorded_groups, report, stand_in, still_policy, timed_step

GOAL = 0.10
ATTENTION = ("aten::_scaled_dot_product", "aten::_flash_attention", "aten::_efficient_attention")
MATMUL = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", *ATTENTION)
OPTIMIZER = ("aten::_foreach", "aten::_fused_adam", "Optimizer.step", "aten::lerp_", "aten::addcdiv_", "aten::addcmul_")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run", type=Path, default=Path("runs/latest"), help="finished run with metrics.jsonl, rollouts/ and hf/"
    )
    parser.add_argument("--skip", type=int, default=1, help="first steps that are left out of the means")
    parser.add_argument("--step", type=int, default=1, help="which dumped step is done again under the profiler")
    parser.add_argument("--top", type=int, default=8, help="how many other operators to name")


def run(options: argparse.Namespace) -> int:
    recorded = [json.loads(line) for line in (options.run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in recorded if row.get("stage") == "rl" and "time/rollout" in row][options.skip :]
    phases = {
        name: statistics.fmean(row[f"time/{name}"] for row in steps) for name in ("rollout", "score", "update", "refit")
    }
    total = statistics.fmean(row["time/total"] for row in steps)
    share, wall, others = matmul_share(options.run, options.step, options.top)
    trainer = phases["score"] + phases["update"]
    neither = 1.0 - (phases["rollout"] + share * trainer) / total
    rows = [{"phase": name, "seconds": value, "share": value / total} for name, value in phases.items()]
    rows.append(
        {"phase": "the rest", "seconds": total - sum(phases.values()), "share": 1 - sum(phases.values()) / total}
    )
    rows += [
        {"phase": f"  of score and update: {name}", "seconds": part * trainer, "share": part * trainer / total}
        for name, part in others.items()
    ]
    result: dict[str, Any] = {
        "steps": len(steps),
        "step_s": total,
        "matmul_share_of_trainer": share,
        "profiled_s": wall,
        "ratio": neither,
        "goal": f"<= {GOAL}",
    }
    report(options, f"{options.run.resolve().name}: means of {len(steps)} steps", rows, result)
    return 0


def matmul_share(run: Path, step: int, top: int) -> tuple[float, float, dict[str, float]]:
    """Share of scoring and update in matrix products; the wall seconds; shares of matrix products and of the largest
    other operators.
    """
    config, groups = recorded_groups(run, [step])
    policy = still_policy(config, run / "hf")
    run_of = stand_in(config, policy)
    run_of.state.step = step
    timed_step(run_of, groups[0])
    cuda = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as found:
        wall = timed_step(run_of, groups[0])["total"]
    spent = {
        event.key: (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6
        for event in found.key_averages()
    }
    groupings = {"matrix products and attention": MATMUL, "optimizer": OPTIMIZER}
    shares = {
        title: sum(value for key, value in spent.items() if key.startswith(prefixes)) / wall
        for title, prefixes in groupings.items()
    }
    rest = {key: value / wall for key, value in spent.items() if not key.startswith(MATMUL + OPTIMIZER)}
    shares |= dict(sorted(rest.items(), key=lambda item: -item[1])[:top])
    return shares["matrix products and attention"], wall, shares
