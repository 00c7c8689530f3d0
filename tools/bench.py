#!/usr/bin/env python
"""Benchmarks with a ratio as their result: interleaved rounds in one process tree, medians, the peer named.

    python tools/bench.py refit                       # export, verification and reload against a plain copy of the same bytes on the same disk
    python tools/bench.py refit --rounds 9 --json
    torchrun --nproc-per-node=2 tools/bench.py refit --no-server policy.pipeline_parallel=2     # several writers

Every subcommand prints a small table with the ratio last; ``--json``: one object with ``ratio``, ``goal``, both medians and the spread.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import shutil
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pact_nemo.checkpoints.embedded import materialise_embedded_model
from pact_nemo.checkpoints.hf import export_version
from pact_nemo.checkpoints.manifest import prune_exports, verify_manifest
from pact_nemo.files import flush_file
from pact_nemo.policy.config import OptimizerConfig
from pact_nemo.policy.policy import MegatronPolicy
from pact_nemo.training.config import load_config

REPOSITORY = Path(__file__).resolve().parents[1]
PRESET = REPOSITORY / "conf" / "pact_bfcl-smollm2_135m-cpu.yaml"


def copied(source: Path, target: Path) -> float:
    """Seconds of a plain copy of a folder's files, each flushed to disk as an export's are."""
    target.mkdir()
    start = time.perf_counter()
    for path in sorted(source.iterdir()):
        shutil.copyfile(path, target / path.name)
        flush_file(target / path.name)
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def first_token(client: Any) -> float:
    """Seconds from a request to its one token."""
    from pact_nemo.rollouts.client import GenerationRequest

    async def ask() -> None:
        async with client:
            await client.generate(GenerationRequest((1, 2, 3), max_tokens=1, temperature=0.0, top_p=1.0, stop_token_ids=(), seed=0))

    start = time.perf_counter()
    asyncio.run(ask())
    return time.perf_counter() - start


def bench_refit(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each part of a refit by export, over rounds of copy, export, verification, reload, first token."""
    config = load_config(PRESET, arguments.overrides)
    model = Path(config.model.path) if config.model.path else materialise_embedded_model(REPOSITORY / config.run.cache_dir)
    policy = MegatronPolicy(config.policy, OptimizerConfig(), model, seed=0, total_steps=1, trainable=False)
    chief, parts = dist.get_rank() == 0, {name: [] for name in ("copy", "export", "verify", "pause", "load", "finish", "first token")}  # type: ignore[var-annotated]
    nbytes = 0
    with ExitStack() as stack:
        box = [stack.enter_context(tempfile.TemporaryDirectory(dir=arguments.folder)) if chief else None]
        dist.broadcast_object_list(box, src=0)
        root = Path(str(box[0]))
        client: Any = None
        if chief and not arguments.no_server:
            from pact_nemo.rollouts.client import RolloutClient
            from pact_nemo.rollouts.server import RolloutServer

            settings = dataclasses.replace(config.rollout.server, dtype=arguments.dtype)
            server = stack.enter_context(RolloutServer(settings, model, log_file=root / "server.log"))
            client = RolloutClient(
                endpoint=server.endpoint, weight_version=0, request_timeout_s=120.0, connect_retries=1, admin_timeout_s=600.0
            )
            first_token(client)
        for version in range(1, arguments.rounds + 2):  # the first round warms up
            with torch.no_grad():  # as after a step: every tensor has changed, nothing can be linked
                for chunk in policy.chunks:
                    for parameter in chunk.parameters():
                        parameter.mul_(1.001)
            dist.barrier()
            start = time.perf_counter()
            folder = export_version(policy, root / "exports", version, dtype=arguments.dtype)
            dist.barrier()
            seconds = {"export": time.perf_counter() - start}
            if chief:
                seconds["copy"] = copied(folder, root / "copy")
                start = time.perf_counter()
                nbytes = verify_manifest(folder, expect_version=version).total_bytes
                seconds["verify"] = time.perf_counter() - start
                if client is not None:
                    from pact_nemo.rollouts.refit import refit

                    report = refit(client, folder, version, like=model)
                    seconds |= {"verify": report.verify_s, "pause": report.pause_s, "load": report.reload_s, "finish": report.finish_s}
                    seconds["first token"] = first_token(client)
                prune_exports(root / "exports", keep=1)
                for name, value in seconds.items():
                    if version > 1:
                        parts[name].append(value)
    medians = {name: statistics.median(values) for name, values in parts.items() if values}
    spread = {name: [min(values), max(values)] for name, values in parts.items() if values}
    ratios = {"export": medians["copy"] / medians["export"], "verify": medians["copy"] / medians["verify"]} if chief else {}
    if "load" in medians:
        ratios["reload"] = medians["copy"] / (medians["verify"] + medians["pause"] + medians["load"] + medians["finish"])
    return {
        "bench": "refit",
        "bytes": nbytes,
        "ranks": dist.get_world_size(),
        "rounds": arguments.rounds,
        "goal": 0.8,
        "ratio": ratios.get("export"),
        "ratios": ratios,
        "median_seconds": medians,
        "spread_seconds": spread,
    }


def show(found: dict[str, Any]) -> None:
    table = Table(title=f"refit of {found['bytes'] / 1e6:,.0f} MB, {found['ranks']} writer(s), {found['rounds']} rounds")
    for column in ("part", "median s", "spread s", "MB/s", "times the speed of a copy"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for name, value in found["median_seconds"].items():
        low, high = found["spread_seconds"][name]
        sized = name in ("copy", "export", "verify", "load")
        table.add_row(
            name,
            f"{value:.3f}",
            f"{low:.3f} - {high:.3f}",
            f"{found['bytes'] / value / 1e6:,.0f}" if sized else "",
            f"{found['median_seconds']['copy'] / value:.2f}" if sized else "",
        )
    for name, value in found["ratios"].items():
        table.add_row(f"{name} / copy, goal {found['goal']}", "", "", "", f"{value:.2f}")
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    refit = commands.add_parser("refit", help="export, verification, reload against a plain copy")
    refit.add_argument("--rounds", type=int, default=5)
    refit.add_argument("--dtype", default="float32", help="of the export and of the server")
    refit.add_argument("--folder", default=".", help="where exports go: the disk that is measured")
    refit.add_argument("--no-server", action="store_true", help="export and verification only")
    refit.add_argument("--json", action="store_true")
    refit.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    found = bench_refit(arguments)
    if dist.get_rank() == 0:
        show(found)
        if arguments.json:
            print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
