"""One point of the ``growth`` bench: what it is, what the planner says of it, and its measurement in a process of its
own.

``python -m tools.benches.growth_point POINT.json OUT.json FOLDER``, or under torchrun with several processes; FOLDER
keeps the random models.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pact_nemo.config.load import load_config
from pact_nemo.config.schema import Config
from pact_nemo.planning.from_config import step_work
from pact_nemo.planning.hardware import Hardware
from pact_nemo.planning.memory import memory_plan
from pact_nemo.planning.shape import Layout, ModelShape
from pact_nemo.planning.timing import scoring_seconds, update_seconds
from pact_nemo.planning.workload import Lengths
from pact_nemo.runtime.collective import on_rank_zero, rank
from tools.benches.kit import (
    BOUNDARY,
    LlamaShape,
    PeakMemory,
    interleaved,
    random_llama,
    stand_in,
    synthetic_groups,
    timed_step,
)

METHODS = ("grpo", "pact")
ACTIVATIONS = (
    "activations",
    "layer at work",
    "log-prob head and chunk",
    "communication buffers",
    "scoring, beyond the update",
)


@dataclass(frozen=True)
class Point:
    """One step's size. Lengths are tokens; ``threads`` are each process's; ``micro_batch`` is
    ``policy.micro_batch_tokens``.
    """

    prompts: int = 1
    group: int = 8
    prompt: int = 512
    response: int = 128
    trace: int = 256
    vocabulary: int = 16384
    processes: int = 1
    threads: int = 1
    hidden: int = 256
    layers: int = 4
    micro_batch: int = 16384
    rounds: int = 3

    @property
    def lengths(self) -> Lengths:
        return Lengths(self.prompt, self.response, self.trace, longest=self.response, boundary=BOUNDARY)

    @property
    def model(self) -> LlamaShape:
        """The head is tied to the embedding."""
        heads = max(2, self.hidden // 64)
        return LlamaShape(
            self.hidden, self.hidden * 11 // 4, self.layers, heads, heads // 2, self.vocabulary, tied=True
        )

    @property
    def shape(self) -> ModelShape:
        m = self.model
        return ModelShape(
            m.layers,
            m.hidden,
            m.heads,
            m.kv_heads,
            m.hidden // m.heads,
            m.ffn,
            m.vocabulary,
            tied=m.tied,
            positions=m.positions,
        )

    def config(self, method: str) -> Config:
        """The defaults of :mod:`pact_nemo.config.schema` in float32; one update; every prompt is trained under its
        trace (q = 0).
        """
        return load_config(
            None,
            [
                f"method={method}",
                f"objective.group_size={self.group}",
                "objective.anchor_prob=0",
                f"trainer.batch_size={self.prompts}",
                f"trainer.mini_batch_size={self.prompts}",
                "policy.precision=fp32",
                f"policy.micro_batch_tokens={self.micro_batch}",
                "optimizer.lr=0",
            ],
        )


def predict(point: Point, method: str, hardware: Hardware) -> dict[str, float]:
    """The planner's ``seconds`` of a step from finished rollouts to new weights, and ``bytes`` above what lasts from
    step to step.

    Args:
        hardware: of one process, beside the others.
    """
    config = point.config(method)
    work = step_work(config, point.lengths)
    shape, layout = point.shape, Layout(point.processes)
    seconds = update_seconds(shape, layout, config.policy, hardware, work)
    seconds += sum(scoring_seconds(shape, layout, config.policy, hardware, work).values())
    tree = work.full_tree if work.conditioned > 0 else work.anchored_tree
    row = tree * float(-(-point.prompts // point.processes))  # what a process has, and at most a micro-batch of it
    if row.tokens > point.micro_batch:
        row = work.micro_batch(point.micro_batch)
    parts = memory_plan(shape, layout, config.policy, work, cuda=False, row=row).parts
    return {"seconds": seconds, "bytes": sum(parts.get(name, 0.0) for name in ACTIVATIONS)}


def measure(point: Point, folder: Path) -> dict[str, dict[str, float]]:
    """Of each method ``seconds`` (median of the rounds), ``bytes`` (peak above the start of a step, of the process that
    needs most), ``tokens``.
    """
    import torch.distributed as dist

    from pact_nemo.policy.distributed import init_distributed
    from pact_nemo.policy.policy import MegatronPolicy

    configs = {method: point.config(method) for method in METHODS}
    init_distributed(configs["pact"].policy.init_timeout_s)
    source = folder / f"llama-{point.hidden}-{point.layers}-{point.vocabulary}"
    on_rank_zero(lambda: source.exists() or random_llama(source, point.model))
    policy = MegatronPolicy(configs["pact"].policy, configs["pact"].optimizer, source, seed=0, total_steps=1)
    policy.load_reference(source)
    groups = {
        method: synthetic_groups(configs[method], point.lengths, point.prompts, vocabulary=point.vocabulary)
        for method in METHODS
    }

    def step(method: str) -> dict[str, float]:
        return timed_step(stand_in(configs[method], policy), groups[method])

    times = interleaved(point.rounds, {method: lambda method=method: step(method) for method in METHODS})  # type: ignore[misc]
    found = {}
    for method in METHODS:
        ctypes.CDLL(None).malloc_trim(
            0
        )  # what earlier steps freed goes back to the kernel, so that this step's own peak is seen
        with PeakMemory() as memory:
            step(method)
        peaks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(peaks, memory.bytes)
        found[method] = {
            "seconds": statistics.median(row["total"] for row in times[method]),
            "fastest": min(row["total"] for row in times[method]),
            "score": statistics.median(row["score"] for row in times[method]),
            "update": statistics.median(row["update"] for row in times[method]),
            "bytes": float(max(peaks)),
            "tokens": times[method][0]["tokens"],
        }
    return found


def main() -> None:
    point = Point(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    found = measure(point, Path(sys.argv[3]))
    if rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps({"point": dataclasses.asdict(point), **found}), encoding="utf-8")
    from pact_nemo.policy.distributed import exit_rank

    exit_rank(0)


if __name__ == "__main__":
    main()
