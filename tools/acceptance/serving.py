"""The third step: vLLM on the GPU: a whole PACT run beside it, then the server alone."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from pact_nemo.checkout import ROOT
from tools.acceptance.kit import Settings, checks_of
from tools.acceptance.models import free_gib

WORDS = (
    "trainer.steps=3",
    "trainer.batch_size=16",
    "trainer.mini_batch_size=8",
    "trainer.checkpoint_every=3",
    "objective.group_size=8",
    "objective.kl_coef=0.01",
    "rollout.importance=tis",
    "rollout.server.dtype=bfloat16",
    "rollout.export_dtype=bfloat16",
    "rollout.server.max_num_seqs=128",
    "rollout.server.gpu_memory_utilization=0.3",
    "rollout.sampling.concurrency=128",
    "policy.precision=auto",
    "policy.micro_batch_tokens=16384",
    "tasks.max_eval=24",
)
SMALL = (
    "trainer.steps=1",
    "trainer.batch_size=2",
    "trainer.mini_batch_size=2",
    "trainer.checkpoint_every=1",
    "tasks.max_eval=2",
    "warmup.steps=1",
)
KEPT = re.compile(
    r"^(time/|mismatch|importance|loss|grad|rollout/|tokens|reward|eval|step$|ratio|clip|kl|memory|moved|refit|server)"
)


def recipe(settings: Settings) -> dict[str, Any]:
    """``recipes/pact_bfcl.py`` with the embedded model: metrics of every step."""
    return _train(settings, "run", ())


def _train(settings: Settings, name: str, more: tuple[str, ...], seconds: float = 230) -> dict[str, Any]:
    root = settings.folder / name
    command = [sys.executable, str(ROOT / "recipes" / "pact_bfcl.py")]
    command += ["--config", str(ROOT / "conf" / "pact_bfcl-smollm2_135m-cpu.yaml"), f"run.root={root}"]
    command += [*WORDS, *(SMALL if settings.small else ()), *more]
    start = time.perf_counter()
    log = settings.folder / f"{name}.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
    metrics = next(iter(sorted(root.rglob("metrics.jsonl"))), None)
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics else []
    server = next(iter(sorted(root.rglob("server.log"))), None)
    return {
        "code": code,
        "seconds": time.perf_counter() - start,
        "tail": log.read_text()[-2500:],
        "metrics": [{key: value for key, value in row.items() if KEPT.match(key)} for row in rows],
        "server": _server_lines(server),
    }


def _server_lines(path: Path | None) -> list[str]:
    """What the server says of its memory, kernels and start; its errors; its last lines."""
    if path is None:
        return []
    lines = path.read_text(errors="replace").splitlines()
    wanted = re.compile(r"KV cache|memory|backend|took|Error|error|graph|compil", re.I)
    return [line[:260] for line in lines if wanted.search(line)][:60] + [line[:260] for line in lines[-15:]]


def alone(settings: Settings) -> dict[str, Any]:
    """The server by itself: start, tokens/s, log-probs against transformers, refit, sleep and wake."""
    from pact_nemo.chat.template import ChatFormat
    from pact_nemo.checkpoints.embedded import materialise_embedded_model
    from pact_nemo.serving.config import RolloutServerConfig
    from pact_nemo.serving.server import RolloutServer
    from tests.workers.server_kit import client_of, reference_logprobs, request, sample

    model = materialise_embedded_model(settings.folder / "cache")
    chat = ChatFormat.from_pretrained(model, "pythonic")
    more = [] if settings.small else ["--enable-sleep-mode"]
    config = RolloutServerConfig(
        dtype="float32" if settings.small else "bfloat16",
        max_model_len=1024,
        max_num_seqs=16 if settings.small else 256,
        max_num_batched_tokens=1024 if settings.small else None,
        gpu_memory_utilization=0.3,
        extra_args=more,
    )
    found: dict[str, Any] = {"free_gib": {"before": free_gib()}}
    with RolloutServer(config, model, log_file=settings.folder / "alone.log") as server:
        found["start_s"], found["free_gib"]["serving"] = server.start_seconds, free_gib()
        wanted = [request(chat, f"Tell me about the number {n}.", seed=n, max_tokens=64) for n in range(4)]
        once, again = (sample(client_of(server), *wanted) for _ in range(2))
        found["repeats"] = [a.token_ids == b.token_ids for a, b in zip(once, again, strict=True)]
        gaps = []
        for one, asked in zip(once, wanted, strict=True):
            expected = reference_logprobs(model, asked.prompt_ids, one.token_ids)
            gaps.append((torch.tensor(one.logprobs) - expected).abs())
        gap = torch.cat(gaps)
        found["against_transformers"] = {"mean": gap.mean().item(), "max": gap.max().item()}
        found["throughput"] = [_throughput(server, chat, count) for count in ((8,) if settings.small else (64, 256))]
        found["refit"] = _refit(server, model, settings)
        if not settings.small:
            exports = settings.folder / "exports"
            export = next(path for path in exports.iterdir() if path.name.endswith("2"))
            found["sleep"] = _sleep(server, chat, export)
    found["free_gib"]["after"] = free_gib()
    found["server"] = _server_lines(settings.folder / "alone.log")
    return found


def _throughput(server: Any, chat: Any, count: int) -> dict[str, float]:
    from tests.workers.server_kit import client_of, request, sample

    tokens = 128
    wanted = [request(chat, f"Story {n}.", seed=n, max_tokens=tokens, stop_token_ids=()) for n in range(count)]
    start = time.perf_counter()
    done = sample(client_of(server), *wanted)
    seconds = time.perf_counter() - start
    return {"requests": count, "seconds": seconds, "tokens_per_s": sum(len(one.token_ids) for one in done) / seconds}


def _refit(server: Any, model: Path, settings: Settings) -> dict[str, Any]:
    """Other weights in, twice; what is sampled afterwards has their log-probs."""
    from safetensors.torch import load_file, save_file

    from pact_nemo.chat.template import ChatFormat
    from pact_nemo.checkpoints.manifest import new_export
    from pact_nemo.serving.refit import refit
    from tests.workers.server_kit import client_of, reference_logprobs, request, sample

    weights, reports = load_file(model / "model.safetensors"), []
    chat = ChatFormat.from_pretrained(model, "pythonic")
    gap = torch.zeros(1)
    for version in (1, 2):
        with new_export(settings.folder / "exports", version) as folder:
            for path in model.iterdir():
                if path.is_file() and path.name not in ("model.safetensors", "manifest.json"):
                    (folder / path.name).write_bytes(path.read_bytes())
            changed = {name: value * (1.0 + 0.02 * version) for name, value in weights.items()}
            save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        export = next(path for path in (settings.folder / "exports").iterdir() if path.name.endswith(str(version)))
        client = client_of(server)
        report = refit(client, export, version)
        reports.append({name: getattr(report, name) for name in ("verify_s", "pause_s", "reload_s", "finish_s")})
        wanted = request(chat, seed=5, max_tokens=48)
        [one] = sample(client, wanted)
        gap = (torch.tensor(one.logprobs) - reference_logprobs(export, wanted.prompt_ids, one.token_ids)).abs()
    return {"seconds": reports, "against_transformers": {"mean": gap.mean().item(), "max": gap.max().item()}}


def _sleep(server: Any, chat: Any, export: Path) -> dict[str, Any]:
    """vLLM's sleep mode: memory given back, seconds; the same tokens after a nap that keeps the weights, and after one
    that drops them and a refit.
    """
    from pact_nemo.serving.refit import load
    from tests.workers.server_kit import client_of, reference_logprobs, request, sample

    admin = server.admin()
    found: dict[str, Any] = {}
    wanted = request(chat, seed=7, max_tokens=48)
    client = client_of(server, weight_version=2)
    [before] = sample(client, wanted)

    def timed(method: str, path: str, **query: str) -> float:
        start = time.perf_counter()
        admin._call(method, path, **query)
        return time.perf_counter() - start

    for level in ("1", "1", "2", "2"):
        row: dict[str, Any] = {"level": level, "sleep_s": timed("POST", "/sleep", level=level, mode="wait")}
        row["asleep_gib"] = free_gib()
        if level == "1":
            row["wake_s"] = timed("POST", "/wake_up")
        else:
            row["wake_weights_s"] = timed("POST", "/wake_up", tags="weights")
            row["weights_gib"] = free_gib()
            row["reload_s"] = load(client, export, 2).reload_s
            row["wake_cache_s"] = timed("POST", "/wake_up", tags="kv_cache")
        row["awake_gib"] = free_gib()
        [after] = sample(client, wanted)
        row["same_tokens"] = after.token_ids == before.token_ids
        row["same_logprobs"] = after.logprobs == before.logprobs
        expected = reference_logprobs(export, wanted.prompt_ids, after.token_ids)
        row["against_transformers"] = (torch.tensor(after.logprobs) - expected).abs().max().item()
        found.setdefault("naps", []).append(row)
    return found


GROUPS = (checks_of("alone", 200, alone), checks_of("recipe", 240, recipe))
