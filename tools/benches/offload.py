"""A trainer's memory, released and restored, against a plain copy of the same bytes.

The trainer is a policy after one update: weights, main weights and moments are copied to the host and back, gradients
are dropped (``policy/offload.py``). The plain copy is one block of as many bytes, to memory of the host that is there
already (page-locked beside a GPU) and back. Memory that was given back has to be taken again. On a CPU that costs as
much as the copy, so there the plain copy gives its memory back and takes it again, too. ``ratio`` is the worse of the
two directions: the plain copy's seconds over ours, medians of the rounds' own ratios. Making the host's memory is once
a run and is not in it.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from pact_nemo.config.load import load_config
from pact_nemo.planning.workload import Lengths
from pact_nemo.policy.device import give_back_freed_memory
from pact_nemo.policy.offload import HostMemory, trainer_memory
from pact_nemo.policy.policy import MegatronPolicy
from tools.benches.kit import LlamaShape, interleaved, median_ratio, random_llama, report, scratch, seconds
from tools.benches.packing import CONFIG, trees_of

GOAL = 0.8
WAYS = ("release", "restore")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--hidden", type=int, default=1024, help="of an untrained Llama")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--precision", default="bf16", help="of the policy: bf16, as large models are trained, or fp32")
    parser.add_argument("--without-weights", action="store_true", help="the weights stay")


def run(options: argparse.Namespace) -> int:
    policy = trained(options)
    memory = trainer_memory(policy.wrapped, policy.optimizer, weights=not options.without_weights, host=HostMemory())
    found = interleaved(
        options.rounds,
        {
            "ours": lambda: (memory.release().seconds, memory.restore().seconds),
            "plain": plain_copy(memory.copied_bytes),
        },
    )
    rows, ratios = [], []
    for index, way in enumerate(WAYS):
        ours, plain = ([each[index] for each in found[name]] for name in ("ours", "plain"))
        ratio, spread = median_ratio(plain, ours)
        ratios.append(ratio)
        rows.append(
            {
                "way": way,
                "ours s": statistics.median(ours),
                "plain s": statistics.median(plain),
                "ours GB/s": memory.copied_bytes / statistics.median(ours) / 1e9,
                "plain GB/s": memory.copied_bytes / statistics.median(plain) / 1e9,
                "ratio": ratio,
                "lowest": spread[0],
                "highest": spread[1],
            }
        )
    result = {
        "copied_bytes": memory.copied_bytes,
        "dropped_bytes": memory.dropped_bytes,
        "ratio": min(ratios),
        "goal": f">= {GOAL}",
    }
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    report(options, f"a trainer's memory released and restored, {where}, {options.precision}", rows, result)
    return 0


def trained(options: argparse.Namespace) -> MegatronPolicy:
    """A policy after one update: it has moments."""
    from tests.workers.policy_kit import loss_fn
    from tools.benches.kit import synthetic_groups

    words = [f"policy.precision={options.precision}", "objective.kl_coef=0", "rollout.importance=off"]
    config = load_config(CONFIG, words)
    heads = max(1, options.hidden // 64)
    size = LlamaShape(options.hidden, 3 * options.hidden, options.layers, heads, heads, vocabulary=4096, tied=True)
    with scratch(Path(config.run.cache_dir), "offload") as folder:
        model = random_llama(folder / "model", size)
        policy = MegatronPolicy(config.policy, config.optimizer, model, seed=0, total_steps=1)
    trees = trees_of(synthetic_groups(config, Lengths(40, 10, 10), 1, vocabulary=4096), config)
    for tree in trees:
        tree.streams = {"weight": torch.full((tree.num_scored,), 1.0 / tree.num_scored)}
    policy.update(trees, loss_fn)
    return policy


def plain_copy(size: int) -> Callable[[], tuple[float, float]]:
    """Seconds of a copy of ``size`` bytes to the host and of one back."""
    cuda = torch.cuda.is_available()
    host = torch.empty(size, dtype=torch.uint8, pin_memory=cuda)
    held = [torch.ones(size, dtype=torch.uint8, device="cuda" if cuda else "cpu")]

    def down() -> None:
        host.copy_(held[0], non_blocking=True)
        if cuda:
            torch.cuda.synchronize()
        else:
            held.clear()
            give_back_freed_memory()

    def back() -> None:
        if not cuda:
            held.append(torch.empty_like(host))
        held[0].copy_(host, non_blocking=True)
        if cuda:
            torch.cuda.synchronize()

    return lambda: (seconds(down), seconds(back))
