"""A whole PACT step against a plain GRPO step on the same rollouts: old-policy and reference scoring, both
contexts forward and backward, SFT, optimizer.

Same process, same policy object, same rollouts of a finished run; only ``method`` differs (so GRPO has its
own advantages and no traces). ``--naive`` adds PACT without the shared prefix (``policy.share_prefix=false``): every
sequence on its own, as elsewhere.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from tools.benches.kit import interleaved, median_ratio, recorded_groups, report, stand_in, still_policy, timed_step

GOAL = 1.35


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=Path, default=Path("runs/latest"), help="finished run with rollouts/ and hf/")
    parser.add_argument("--steps", type=int, nargs="+", help="which dumped steps (default: all)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--naive", action="store_true", help="also time PACT with every sequence on its own")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of the run's config, for all contestants"
    )


def run(options: argparse.Namespace) -> int:
    steps = options.steps or sorted(
        int(path.stem.split("_")[-1]) for path in (options.run / "rollouts").glob("*_*.jsonl*")
    )
    config, groups = recorded_groups(options.run, steps, method="pact", words=options.set)
    plain_config, plain_groups = recorded_groups(options.run, steps, method="grpo", words=options.set)
    policy = still_policy(config, options.run / "hf")
    contestants = {"grpo": (plain_config, plain_groups, True), "pact": (config, groups, True)}
    if options.naive:
        contestants["pact, naive"] = (config, groups, False)

    def contest(name: str) -> dict[str, float]:
        settings, batches, shared = contestants[name]
        policy.config.share_prefix = shared
        run_of = stand_in(settings, policy)
        total: dict[str, float] = {}
        for step, batch in zip(steps, batches, strict=True):
            run_of.state.step = step
            for key, value in timed_step(run_of, batch).items():
                total[key] = total.get(key, 0.0) + value
        return total

    times = interleaved(options.rounds, {name: lambda name=name: contest(name) for name in contestants})  # type: ignore[misc]
    rows = [
        {
            "step": name,
            **{part: statistics.median(row[part] for row in found) for part in ("score", "update", "total", "tokens")},
        }
        for name, found in times.items()
    ]
    totals = {name: [row["total"] for row in found] for name, found in times.items()}
    ratio, spread = median_ratio(totals["pact"], totals["grpo"])
    tokens = {name: found[0]["tokens"] for name, found in times.items()}
    result: dict[str, Any] = {
        "steps": len(steps),
        "median_pact_s": statistics.median(totals["pact"]),
        "median_grpo_s": statistics.median(totals["grpo"]),
        "token_ratio": tokens["pact"] / tokens["grpo"],
        "spread": spread,
        "ratio": ratio,
        "goal": f"<= {GOAL}",
    }
    if options.naive:
        result = {"naive_ratio": median_ratio(totals["pact, naive"], totals["grpo"])[0], **result}
    report(
        options,
        f"{len(steps)} steps of {options.run.resolve().name}, seconds, medians of {options.rounds} rounds",
        rows,
        result,
    )
    return 0
