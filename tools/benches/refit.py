"""Refit against a plain copy of the same bytes on the same disk.

Each round: all weights change; the previous round's weight files are copied (``shutil.copyfile``, each fsynced, as the
export does); the policy is exported; the server verifies and loads the export and generates one token. The copy is one
process, as ``cp`` is. ``ratio`` is the worse of two: copy time / export time, and copy time / (verification + reload)
time; medians over the rounds of each round's own ratio, because other work on the machine slows whole rounds. Under
torchrun every rank exports, rank 0 does the rest.

With ``--lora-rank`` the policy has adapters, and a refit brings them alone, or with ``--refit merged`` the whole model
with them in it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pact_nemo.checkpoints.embedded import materialise_embedded_model
from pact_nemo.checkpoints.hf import export_version
from pact_nemo.checkpoints.manifest import prune_exports, verify_manifest
from pact_nemo.policy.config import ADAPTER, LORA_MATRICES, MERGED, LoraConfig, OptimizerConfig, PolicyConfig
from pact_nemo.policy.distributed import exit_rank, init_distributed
from pact_nemo.policy.policy import MegatronPolicy
from pact_nemo.runtime.collective import on_rank_zero, rank, world_size
from pact_nemo.serving.adapters import AdapterRoom
from pact_nemo.serving.client import GenerationRequest, RolloutClient
from pact_nemo.serving.config import RolloutServerConfig
from pact_nemo.serving.refit import refit
from pact_nemo.serving.server import RolloutServer
from tools.benches.kit import LlamaShape, random_llama, scratch

GOAL = 0.8
CACHE = Path(".cache/pact_nemo")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model", type=Path, help="Hugging Face folder (default: the embedded SmolLM2-135M)")
    parser.add_argument(
        "--synthetic", type=float, metavar="GB", help="a random Llama of about this many GB in bfloat16 instead"
    )
    parser.add_argument(
        "--folder", type=Path, default=CACHE, help="where exports and copies go: the disk that is measured"
    )
    parser.add_argument("--dtype", default="bfloat16", help="of the export")
    parser.add_argument("--precision", default="bf16", help="of the policy: bf16, as large models are trained, or fp32")
    parser.add_argument("--lora-rank", type=int, default=0, help="adapters of this rank on every matrix")
    parser.add_argument("--refit", choices=(ADAPTER, MERGED), default=ADAPTER, help="with --lora-rank: what it brings")
    parser.add_argument("--no-server", action="store_true", help="export and verification only")
    for axis in ("tensor", "pipeline", "expert"):
        parser.add_argument(f"--{axis}-parallel", type=int, default=1)
    parser.add_argument("--writers", type=int, help="policy.export_writers")


def run(options: argparse.Namespace) -> int:
    init_distributed(600)
    rows: list[dict[str, float]] = []
    with scratch(options.folder, "refit") as folder:
        source = on_rank_zero(lambda: _source(options, folder))
        policy = MegatronPolicy(
            PolicyConfig(
                tensor_parallel=options.tensor_parallel,
                pipeline_parallel=options.pipeline_parallel,
                expert_parallel=options.expert_parallel,
                precision=options.precision,
                export_writers=options.writers,
                lora=LoraConfig(rank=options.lora_rank),
            ),
            OptimizerConfig(),
            source,
            seed=1,
            total_steps=1,
            trainable=False,
        )
        exports = folder / "exports"
        _leave_the_base(policy)
        export_version(policy, exports, 0, kind=_kind(options), dtype=options.dtype)
        with _serving(options, source, folder) as client:
            for version in range(1, options.rounds + 2):
                row = _round(policy, client, exports, version, options, folder / "copy", source)
                if version > 1:  # the first one warms up
                    rows.append(row)
    if rank() == 0:
        report(rows, options)
    exit_rank(0)
    return 0


@torch.no_grad()
def _round(
    policy: MegatronPolicy,
    client: RolloutClient | None,
    exports: Path,
    version: int,
    options: argparse.Namespace,
    copy: Path,
    source: Path,
) -> dict[str, float]:
    """Seconds of each part, and ``bytes``."""
    for param in _trained(policy):
        param.mul_(1 + 2**-6)  # every weight of every version differs in bfloat16
    row = on_rank_zero(lambda: _copy(exports / f"v{version - 1:06d}", copy))
    start = time.perf_counter()
    folder = export_version(policy, exports, version, kind=_kind(options), dtype=options.dtype)
    row["export_s"] = time.perf_counter() - start

    def reload() -> dict[str, float]:
        times: dict[str, float] = {}
        if client is None:
            start = time.perf_counter()
            verify_manifest(folder, expect_version=version)
            times["verify_s"] = time.perf_counter() - start
        else:
            report = refit(client, folder, version, like=source)
            times |= {name: getattr(report, name) for name in ("verify_s", "pause_s", "reload_s", "finish_s")}
            start = time.perf_counter()
            asyncio.run(_one_token(client))
            times["first_token_s"] = time.perf_counter() - start
        prune_exports(exports, keep=1)
        return times

    return row | on_rank_zero(reload)


def _kind(options: argparse.Namespace) -> str:
    return options.refit if options.lora_rank else MERGED


def _trained(policy: MegatronPolicy) -> Iterator[torch.nn.Parameter]:
    """The weights, or the adapters where there are some."""
    for chunk in policy.chunks:
        for name, param in chunk.named_parameters():
            if policy.adapters is None or ".adapter." in name:
                yield param


@torch.no_grad()
def _leave_the_base(policy: MegatronPolicy) -> None:
    """Adapters begin with B = 0, which no factor would change."""
    generator = torch.Generator().manual_seed(1)
    for param in _trained(policy) if policy.adapters is not None else ():
        param.copy_(0.01 * torch.randn(param.shape, generator=generator))


async def _one_token(client: RolloutClient) -> None:
    """Raises StaleWeights when the token is not of the version that the client expects."""
    async with client:
        await client.generate(GenerationRequest((1, 2, 3, 4, 5, 6, 7, 8), 1, 1.0, 1.0, (2,), 1))


def _copy(folder: Path, target: Path) -> dict[str, float]:
    """Copy the weight files to the same disk, each one made durable as an export's files are."""
    files = sorted(folder.glob("*.safetensors"))
    target.mkdir()
    os.sync()
    start = time.perf_counter()
    for path in files:
        shutil.copyfile(path, target / path.name)
        with open(target / path.name, "rb") as handle:
            os.fsync(handle.fileno())
    seconds = time.perf_counter() - start
    size = sum(path.stat().st_size for path in files)
    shutil.rmtree(
        target
    )  # so that the export finds free pages in memory, as the copy did; then nothing of it is left to do for the disk
    os.sync()
    return {"copy_s": seconds, "bytes": float(size), "files": float(len(files))}


@contextmanager
def _serving(options: argparse.Namespace, source: Path, folder: Path) -> Iterator[RolloutClient | None]:
    """A client of a real server of version 0; None without one, and on ranks other than 0."""
    if options.no_server or rank() != 0:
        yield None
        return
    dtype = options.dtype if options.dtype in ("float32", "float16") else "bfloat16"
    config = RolloutServerConfig(dtype=dtype, max_model_len=512, max_num_seqs=4, max_num_batched_tokens=512)
    names = tuple(name for matrices in LORA_MATRICES.values() for name in matrices)
    room = AdapterRoom(options.lora_rank, names) if _kind(options) == ADAPTER else None
    with RolloutServer(config, source, log_file=folder / "server.log", adapters=room) as server:
        yield RolloutClient(
            server.endpoint, weight_version=0, request_timeout_s=120.0, connect_retries=1, admin_timeout_s=600.0
        )


def _source(options: argparse.Namespace, folder: Path) -> Path:
    if options.synthetic is not None:
        return _synthetic_llama(folder / "model", options.synthetic, tokenizer=materialise_embedded_model(CACHE))
    return options.model if options.model is not None else materialise_embedded_model(CACHE)


def _synthetic_llama(folder: Path, gigabytes: float, tokenizer: Path) -> Path:
    """An untrained Llama, untied, of about this size in bfloat16: hidden 2048, as many layers as fit; the server wants
    some tokenizer.
    """
    hidden, ffn, vocabulary = 2048, 5632, 49152
    per_layer = 2 * (hidden * (2 * hidden + 2 * 512) + 3 * hidden * ffn)
    layers = max(2, round((gigabytes * 1e9 - 4 * hidden * vocabulary) / per_layer / 2) * 2)
    size = LlamaShape(hidden, ffn, layers, heads=32, kv_heads=8, vocabulary=vocabulary, positions=2048)
    return random_llama(folder, size, dtype="bfloat16", tokenizer=tokenizer)


def report(rows: list[dict[str, float]], options: argparse.Namespace) -> None:
    """Print each round, then the medians, the ratios last."""
    export = [row["copy_s"] / row["export_s"] for row in rows]
    reload = [row["copy_s"] / (row["verify_s"] + row["reload_s"]) for row in rows if "reload_s" in row]
    parts = [
        name for name in ("export_s", "verify_s", "pause_s", "reload_s", "finish_s", "first_token_s") if name in rows[0]
    ]
    medians = {name: statistics.median(row[name] for row in rows) for name in ["copy_s", *parts]}
    size = rows[0]["bytes"]
    ratios = [statistics.median(values) for values in (export, reload) if values]
    result: dict[str, Any] = {
        "ratio": min(ratios),
        "goal": GOAL,
        "copy_bytes_per_s": size / medians["copy_s"],
        "export_bytes_per_s": size / medians["export_s"],
        "export_ratio": ratios[0],
        "export_ratio_spread": [min(export), max(export)],
        "reload_bytes_per_s": size / (medians["verify_s"] + medians["reload_s"]) if reload else None,
        "reload_ratio": ratios[1] if reload else None,
        "reload_ratio_spread": [min(reload), max(reload)] if reload else None,
        "updated_to_first_token_s": sum(medians[name] for name in parts) if reload else None,
        "medians_s": medians,
        "bytes": int(size),
        "files": int(rows[0]["files"]),
        "ranks": world_size(),
        "rounds": len(rows),
        "dtype": options.dtype,
    }
    if options.json:
        print(json.dumps(result))
        return
    print(f"{size / 1e6:.0f} MB in {int(rows[0]['files'])} files, {world_size()} ranks, {options.dtype}; seconds")
    print("  ".join(f"{name.removesuffix('_s'):>12}" for name in medians))
    for row in [*rows, medians]:
        print("  ".join(f"{row[name]:12.3f}" for name in medians), "  median" if row is medians else "")
    print(
        f"copy {result['copy_bytes_per_s'] / 1e9:.2f} GB/s, export {result['export_bytes_per_s'] / 1e9:.2f} GB/s: "
        f"ratio {ratios[0]:.2f} ({min(export):.2f} to {max(export):.2f})"
    )
    if reload:
        print(
            f"verification and reload {result['reload_bytes_per_s'] / 1e9:.2f} GB/s: "
            f"ratio {ratios[1]:.2f} ({min(reload):.2f} to {max(reload):.2f})"
        )
        print(f"weights updated to first token of the new version: {result['updated_to_first_token_s']:.2f} s")
    print(f"ratio {result['ratio']:.2f}, goal {GOAL}")
