"""The first step: the policy on one GPU without Transformer Engine, against transformers in float32 and the plan."""

from __future__ import annotations

import itertools
import re
import shutil
import statistics
import time
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tools.acceptance.hardware import disk, machine, waiting
from tools.acceptance.kit import Settings, checks_of
from tools.acceptance.models import (
    PROMPTS,
    difference,
    forget_peak,
    free_gib,
    lengths,
    memory_gib,
    random_model,
    rows,
    step_config,
    step_groups,
    synchronize,
)

FAMILIES = ("llama", "llama3", "qwen2", "qwen3", "qwen3_moe", "mistral", "qwen3_window", "llama_biases")


def families(settings: Settings) -> dict[str, Any]:
    """Log-probs and gradient norms of tiny random models of every family, in fp32 and bf16.

    The reference is transformers in float32 on the CPU, one sequence at a time.
    """
    from tests.test_policy_model import hf_logprobs, load_hf
    from tests.workers.policy_kit import loss_fn, make_model, make_trees
    from tests.workers.small_policy import build

    trees = make_trees(6, seed=11, scale=3)
    streams = {"weight": torch.cat([tree.streams["weight"] for tree in trees])}
    found: dict[str, Any] = {}
    for family in FAMILIES:
        folder = make_model(settings.folder / "families" / family, family)
        hf = load_hf(folder)
        expected = hf_logprobs(hf, trees)
        loss_fn(expected, streams)[0].backward()
        squares = [(param.grad.double() ** 2).sum() for param in hf.parameters() if param.grad is not None]
        norm = torch.stack(squares).sum().sqrt().item()
        expected = expected.detach()
        for precision in ("fp32", "bf16"):
            try:
                policy = build(folder, precision=precision, micro_batch_tokens=512)
                logprobs = rows(policy.logprobs(trees))
                result = policy.update(trees, loss_fn)
            except Exception as error:
                found[f"{family} {precision}"] = {"error": f"{type(error).__name__}: {error}"[:600]}
                continue
            found[f"{family} {precision}"] = {
                **difference(logprobs, expected),
                "first_ratio_equal": bool(torch.equal(rows(result.logprobs), logprobs)),
                "grad_norm_error": abs(result.grad_norm / norm - 1),
            }
        if torch.cuda.is_available():
            rounded = load_hf(folder).to("cuda", torch.bfloat16)
            with torch.no_grad(), torch.device("cuda"):
                found[f"{family} transformers bf16"] = difference(hf_logprobs(rounded, trees).float().cpu(), expected)
    return found


def step(settings: Settings) -> dict[str, Any]:
    """A PACT step of the recipe's model: seconds, tokens, FLOP/s and peak memory beside the plan, tree and separate."""
    from pact_nemo.planning.compute import model_operations
    from pact_nemo.planning.from_config import run_plan
    from tools.benches.kit import stand_in, still_policy, timed_step

    config = step_config(settings)
    groups = step_groups(config, settings)
    start = time.perf_counter()
    policy = still_policy(config, random_model(settings))
    built = time.perf_counter() - start
    plan = run_plan(config, world=1, lengths=lengths(settings))
    found: dict[str, Any] = {"built_s": built, "built_gib": memory_gib()}
    for name, shared, rounds in (("tree", True, 3), ("separate", False, 1)):
        policy.config.share_prefix = shared
        run = stand_in(config, policy)
        run.state.step = 1
        forget_peak()
        timed = [timed_step(run, groups) for _ in range(1 + rounds)][1:]
        seconds = {key: statistics.median(row[key] for row in timed) for key in ("score", "update", "total", "tokens")}
        found[name] = {**seconds, "memory_gib": memory_gib(), "tokens_per_s": seconds["tokens"] / seconds["update"]}
    work = model_operations(plan.shape, plan.work.mean_tree * float(PROMPTS))
    found["update_model_tflops"] = work / found["tree"]["update"] / 1e12
    found["plan"] = {**plan.as_json(), "parts_gib": {key: value / 2**30 for key, value in plan.memory.parts.items()}}
    return found


def same(settings: Settings) -> dict[str, Any]:
    """The tree's log-probs against those of separate sequences; the first update's ratios."""
    from pact_nemo.policy.policy import MegatronPolicy
    from tools.benches.packing import trees_of

    config = step_config(settings)
    trees = trees_of(step_groups(config, settings, prompts=1), config)
    policy = MegatronPolicy(
        replace(config.policy, recompute="none"), config.optimizer, random_model(settings), seed=0, total_steps=1
    )
    tree = rows(policy.logprobs(trees))
    again = rows(policy.logprobs(trees))
    policy.config.share_prefix = False
    separate = rows(policy.logprobs(trees))
    return {"again": difference(again, tree), "separate": difference(separate, tree), "mean": tree.mean().item()}


def kernels(settings: Settings) -> dict[str, Any]:
    """Where the time of one update goes: kernels, and reads back to the host by line."""
    from torch.profiler import ProfilerActivity, profile

    from tools.benches.kit import stand_in, still_policy, timed_step

    config = step_config(settings)
    groups = step_groups(config, settings, prompts=1)
    policy = still_policy(config, random_model(settings))
    run = stand_in(config, policy)
    timed_step(run, groups)
    reads = _host_reads(lambda: timed_step(run, groups)) if torch.cuda.is_available() else {}
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    synchronize()
    start = time.perf_counter()
    with profile(activities=activities) as profiler:
        timed_step(run, groups)
        synchronize()
    wall = time.perf_counter() - start
    events = profiler.key_averages()
    busy = {event.key: event.self_device_time_total / 1e6 for event in events if event.self_device_time_total}
    operators = {key: value for key, value in busy.items() if "::" in key.partition("(")[0] and " " not in key}
    kernels = {key: value for key, value in busy.items() if key not in operators}
    return {
        "wall_s": wall,
        "kernels_s": sum(kernels.values()),
        "operators": {key: round(value, 4) for key, value in _largest(operators)},
        "kernels": {key[:110]: round(value, 4) for key, value in _largest(kernels)},
        "attention": {
            key[:80]: round(value, 4) for key, value in kernels.items() if re.search("flash|fmha", key, re.I)
        },
        "host_reads": reads,
    }


def _largest(seconds: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(seconds.items(), key=lambda item: -item[1])[:25]


def _host_reads(run: Any) -> dict[str, int]:
    """Synchronising calls of ``run``, by line of this project or of megatron."""
    counts: Counter[str] = Counter()

    def note(message: Any, category: Any, filename: str, lineno: int, *_: Any) -> None:
        counts[f"{filename.rpartition('site-packages/')[2].rpartition('pact_nemo/')[2]}:{lineno}"] += 1

    before = warnings.showwarning
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = note  # type: ignore[assignment]
            run()
    finally:
        warnings.showwarning = before
        torch.cuda.set_sync_debug_mode("default")
    return dict(counts.most_common(20))


def resume(settings: Settings) -> dict[str, Any]:
    """A checkpoint of four layers, and the update after it: again from the checkpoint. And the export's speed."""
    policy, trees, config = _trained(settings)
    found = {"as_it_is": _repeated(policy, trees, settings.folder / "plain")}
    after, exports = rows(policy.logprobs(trees)), []
    for name in ("one", "two"):
        start = time.perf_counter()
        entries = policy.export_hf(settings.folder / f"export_{name}")
        size = sum(path.stat().st_size for path in (settings.folder / f"export_{name}").glob("*.safetensors"))
        exports.append({"seconds": time.perf_counter() - start, "gb": size / 1e9, "files": len(entries)})
    folder = settings.folder / "export_two"
    again = type(policy)(config.policy, config.optimizer, folder, seed=0, total_steps=1, trainable=False)
    return found | {"exports": exports, "reloaded_export": difference(rows(again.logprobs(trees)), after)}


def deterministic(settings: Settings) -> dict[str, Any]:
    """The same with ``policy.deterministic``: bit for bit."""
    policy, trees, _ = _trained(settings, deterministic=True)
    return _repeated(policy, trees, settings.folder / "deterministic")


def _trained(settings: Settings, **more: Any) -> tuple[Any, list[Any], Any]:
    """A policy of four layers after one update, its trees and its config."""
    from pact_nemo.policy.policy import MegatronPolicy
    from tests.workers.policy_kit import loss_fn
    from tools.benches.packing import trees_of

    config, model = step_config(settings), random_model(settings, layers=4)
    config = replace(config, policy=replace(config.policy, **more))
    trees = trees_of(step_groups(config, settings, prompts=1), config)
    for tree in trees:
        tree.streams = {"weight": torch.full((tree.num_scored,), 1.0 / tree.num_scored)}
    policy = MegatronPolicy(config.policy, replace(config.optimizer, lr=1e-5), model, seed=0, total_steps=99)
    policy.update(trees, loss_fn)
    return policy, trees, config


def _repeated(policy: Any, trees: list[Any], root: Path) -> dict[str, Any]:
    """An update of ``policy``, twice from the same checkpoint."""
    from pact_nemo.checkpoints import resume as checkpoints
    from tests.workers.policy_kit import loss_fn

    shutil.rmtree(root, ignore_errors=True)
    before, start = rows(policy.logprobs(trees)), time.perf_counter()
    folder = checkpoints.save(policy, root, {"step": 1})
    saved, start = time.perf_counter() - start, time.perf_counter()
    first = policy.update(trees, loss_fn)
    updated = time.perf_counter() - start
    after, start = rows(policy.logprobs(trees)), time.perf_counter()
    checkpoints.load(policy, folder)
    loaded = time.perf_counter() - start
    restored = rows(policy.logprobs(trees))
    second = policy.update(trees, loss_fn)
    return {
        "restored": difference(restored, before),
        "losses": [first.loss, second.loss],
        "grad_norms": [first.grad_norm, second.grad_norm],
        "after": difference(rows(policy.logprobs(trees)), after),
        "save_s": saved,
        "load_s": loaded,
        "update_s": updated,
        "checkpoint_gb": sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()) / 1e9,
    }


def offload(settings: Settings) -> dict[str, Any]:
    """The trainer's memory given back and taken again three times: bytes, seconds, free memory, equal bits."""
    from pact_nemo.policy.offload import trainer_memory
    from tools.benches.kit import stand_in, still_policy, timed_step

    config = step_config(settings)
    policy = still_policy(config, random_model(settings))
    timed_step(stand_in(config, policy), step_groups(config, settings, prompts=1))
    found: dict[str, Any] = {}
    for weights in (False, True):
        memory = trainer_memory(policy.wrapped, policy.optimizer, weights=weights)
        before, rounds = _fingerprint(memory.copied), []
        for _ in range(3):
            free = [free_gib()]
            released = memory.release()
            free.append(free_gib())
            restored = memory.restore()
            free.append(free_gib())
            rounds.append(
                {
                    "release_s": released.seconds,
                    "restore_s": restored.seconds,
                    "release_gb_s": released.copied / released.seconds / 1e9,
                    "restore_gb_s": restored.copied / restored.seconds / 1e9,
                    "free_gib": free,
                    "same_bits": _fingerprint(memory.copied) == before,
                }
            )
        found["with weights" if weights else "without weights"] = {
            "copied_gb": memory.copied_bytes / 1e9,
            "dropped_gb": memory.dropped_bytes / 1e9,
            "rounds": rounds,
        }
        del memory
    timed = timed_step(stand_in(config, policy), step_groups(config, settings, prompts=1))
    return found | {"update_after_s": timed["update"]}


def _fingerprint(storages: list[torch.Tensor]) -> list[int]:
    """A sum over the bytes of each storage, by position: equal bits have equal sums."""
    sums = []
    for view in storages:
        words = view[: view.numel() // 8 * 8].view(torch.int64)
        sums.append(int(words.sum()) ^ int((words[::2] * 31).sum()) ^ int((words[::7] * 131).sum()))
    return sums


def entropies(settings: Settings) -> dict[str, Any]:
    """The vocabulary head's kernels against a plain softmax in float64, with gradients."""
    from pact_nemo.policy.heads import vocab_parallel_logprobs_and_entropies

    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = {}
    for dtype, hidden, vocabulary in itertools.product((torch.float32, torch.bfloat16), (256,), (1001, 151936)):
        if settings.small and vocabulary > 2000:
            continue
        torch.manual_seed(1)
        h = torch.randn(500, hidden, device=device, dtype=dtype).requires_grad_()
        w = (torch.randn(vocabulary, hidden, device=device, dtype=dtype) * 0.1).requires_grad_()
        target = torch.randint(vocabulary, (500,), device=device)
        logprobs, entropy = vocab_parallel_logprobs_and_entropies(
            h, w, target, vocab_size=vocabulary, chunk=128, temperature=0.8, group=None, entropy=True
        )
        assert entropy is not None
        (logprobs.sum() + 0.3 * entropy.sum()).backward()
        hd, wd = (x.detach().double().requires_grad_() for x in (h, w))
        full = (hd @ wd.T / 0.8).log_softmax(-1)
        expected, plain = full.gather(1, target[:, None])[:, 0], -(full.exp() * full).sum(-1)
        (expected.sum() + 0.3 * plain.sum()).backward()
        assert h.grad is not None and hd.grad is not None and wd.grad is not None and w.grad is not None
        found[f"{str(dtype)[6:]} {vocabulary}"] = {
            "logprob": difference(logprobs, expected)["max"],
            "entropy": difference(entropy, plain)["max"],
            "hidden_gradient": ((h.grad - hd.grad).norm() / hd.grad.norm()).item(),
            "weight_gradient": ((w.grad - wd.grad).norm() / wd.grad.norm()).item(),
        }
    return found


GROUPS = (
    checks_of("machine", 60, machine, entropies),
    checks_of("deterministic", 150, deterministic),
    checks_of("offload", 100, offload),
    checks_of("same", 60, same),
    checks_of("step", 150, step),
    checks_of("waiting", 45, waiting),
    checks_of("resume", 90, disk, resume),
    checks_of("kernels", 60, kernels),
    checks_of("families", 100, families),
)
