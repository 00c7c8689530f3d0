"""A plan: memory of the fullest GPU by part, seconds of a step by phase, the bottleneck; and the search for the fastest
layout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from pact_nemo.errors import ConfigError
from pact_nemo.planning.compute import model_operations
from pact_nemo.planning.generation import OUTSIDE_SHARE, ServerPlan, server_problems
from pact_nemo.planning.hardware import Hardware
from pact_nemo.planning.host import COPY, HostPlan, host_plan, rank_host
from pact_nemo.planning.memory import GIB, USABLE, MemoryPlan, memory_plan
from pact_nemo.planning.shape import Layout, ModelShape
from pact_nemo.planning.sharing import awake_share, largest_state, moved_bytes
from pact_nemo.planning.timing import checkpoint_seconds, export_bytes, phases, refit_seconds
from pact_nemo.planning.workload import StepWork
from pact_nemo.policy.config import PolicyConfig


@dataclass(frozen=True)
class Plan:
    """What :func:`make_plan` found.

    Attributes:
        policy: with precision, FP8 recipe and recompute as they will run.
        shares_gpus: the rollout server sits on trainer GPUs; its share of them counts against the fit.
        host: host memory of a node with GPUs; None on CPUs, where it is the trainer's own.
    """

    shape: ModelShape
    layout: Layout
    policy: PolicyConfig
    hardware: Hardware
    work: StepWork
    server: ServerPlan
    memory: MemoryPlan
    phases: dict[str, float]
    refit: dict[str, float]
    checkpoint: float
    shares_gpus: bool
    host: HostPlan | None = None

    @property
    def usable(self) -> float:
        """Bytes of a GPU that may be used."""
        return USABLE * self.hardware.memory

    @property
    def fits(self) -> bool:
        host = 0.0 if self.hardware.cuda else sum(self.memory.host.values())
        return self.memory.total + host <= self.usable

    @property
    def step(self) -> float:
        return sum(self.phases.values())

    @property
    def bottleneck(self) -> str:
        return max(self.phases, key=lambda name: self.phases[name])

    @property
    def update_tflops(self) -> float:
        """Model TFLOP/s of a GPU during the update."""
        row = self.work.mean_tree * float(self.work.prompts)
        work = model_operations(self.shape, row, frozen=self.policy.lora.rank > 0)
        return work / self.phases["update"] / self.layout.world / 1e12

    def as_json(self) -> dict[str, Any]:
        return {
            "layout": dataclasses.asdict(self.layout),
            "precision": "fp8" if self.policy.fp8 else self.policy.precision,
            "recompute": self.policy.recompute,
            "hardware": self.hardware.name,
            "lengths": dataclasses.asdict(self.work.lengths),
            "fits": self.fits,
            "memory_gib": {name: value / GIB for name, value in self.memory.parts.items()},
            "memory_host_gib": {name: value / GIB for name, value in self.memory.host.items()},
            "node_host_gib": {name: value / GIB for name, value in self.host.parts.items()} if self.host else {},
            "server_gib": self.memory.server / GIB,
            "total_gib": self.memory.total / GIB,
            "usable_gib": self.usable / GIB,
            "seconds": dict(self.phases),
            "refit_seconds": dict(self.refit),
            "engines": {"count": self.server.servers, "gpus": self.server.gpus, "share": self.server.share},
            "export_gib": export_bytes(self.shape, self.server) / GIB,
            "step_seconds": self.step,
            "checkpoint_seconds": self.checkpoint,
            "bottleneck": self.bottleneck,
            "update_model_tflops_per_gpu": self.update_tflops,
        }


def make_plan(
    shape: ModelShape,
    layout: Layout,
    policy: PolicyConfig,
    hardware: Hardware,
    work: StepWork,
    server: ServerPlan,
    *,
    shares_gpus: bool,
) -> Plan:
    """Plan one step.

    Raises:
        ConfigError: the model can't be cut this way.
    """
    if found := layout.problems(shape) + server_problems(shape, server.gpus):
        raise ConfigError("; ".join(found))
    policy = dataclasses.replace(
        policy,
        precision=policy.resolved_precision(cuda=hardware.cuda),
        fp8=policy.fp8 if hardware.fp8 else None,
    )
    state = largest_state(shape, layout, policy)
    if server.time_sharing and server.whole:
        server = dataclasses.replace(server, share=awake_share(layout, hardware, fp8_copies=state.fp8_copies))
    beside = 0.0
    if shares_gpus:
        asleep = server.time_sharing and hardware.cuda  # what it can't give back stays; on a CPU that is all
        beside = (0.0 if asleep else server.share * hardware.memory) + OUTSIDE_SHARE * hardware.cuda
    memory = memory_plan(shape, layout, policy, work, cuda=hardware.cuda, server=beside)
    host = None
    if hardware.cuda:
        host = host_plan(shape, layout, policy, hardware, work, server if shares_gpus else None)
        sharing = server.time_sharing
        memory.host.update(rank_host(shape, layout, policy, work, stage=memory.stage, time_sharing=sharing))
    elif server.time_sharing:
        memory.host[COPY] = moved_bytes(state)
    return Plan(
        shape,
        layout,
        policy,
        hardware,
        work,
        server,
        memory,
        phases(shape, layout, policy, hardware, work, server),
        refit_seconds(shape, layout, hardware, server),
        checkpoint_seconds(shape, layout, policy, hardware),
        shares_gpus,
        host,
    )


def _divisors(number: int) -> list[int]:
    return [value for value in range(1, number + 1) if number % value == 0]


def _policies(shape: ModelShape, world: int, policy: PolicyConfig, hardware: Hardware) -> Iterator[PolicyConfig]:
    """Every layout of ``world`` ranks that the launcher takes, with the settings of ``policy`` otherwise."""
    tensors, pipelines = _divisors(min(world, hardware.gpus_per_node)), _divisors(world)
    experts = _divisors(shape.experts) if shape.experts else [1]
    for tensor, pipeline, context, virtual, expert in product(tensors, pipelines, (1, 2, 4, 8), (1, 2, 4), experts):
        settings = dataclasses.replace(
            policy,
            tensor_parallel=tensor,
            pipeline_parallel=pipeline,
            context_parallel=context,
            expert_parallel=expert,
            virtual_pipeline=virtual if virtual > 1 else None,
            sequence_parallel=tensor > 1,
        )
        if Layout.of(settings, world).problems(shape):
            continue
        try:
            settings.validate_values()
        except ConfigError:  # e.g. Transformer Engine's attention under context parallelism
            continue
        yield settings


def search(
    shape: ModelShape,
    world: int,
    policy: PolicyConfig,
    hardware: Hardware,
    work: StepWork,
    server: ServerPlan,
    *,
    shares_gpus: bool,
) -> list[Plan]:
    """Every layout of ``world`` ranks that fits, fastest step first; of each layout the least recompute that fits.

    TP stays within a node, CP is tried up to 8; every update must give each data-parallel rank at least one prompt.
    Interleaved stages are tried with two and four chunks. What the launcher would refuse is not among them.

    Raises:
        ConfigError: nothing fits, and the message says what comes closest; or the server can't be split this way.
    """
    if refused := server_problems(shape, server.gpus):
        raise ConfigError("; ".join(refused))
    found: list[Plan] = []
    closest: Plan | None = None
    no_cache: ConfigError | None = None
    for settings in _policies(shape, world, policy, hardware):
        layout = Layout.of(settings, world)
        if work.prompts / work.updates < layout.data:
            continue
        for recompute in ("none", "selective", "full"):
            chosen = dataclasses.replace(settings, recompute=recompute)
            try:
                plan = make_plan(shape, layout, chosen, hardware, work, server, shares_gpus=shares_gpus)
            except ConfigError as error:  # the trainer keeps so much of a GPU that an engine has no room in its turn
                no_cache = error
                break
            if closest is None or plan.memory.total < closest.memory.total:
                closest = plan
            if plan.fits:
                found.append(plan)
                break
    if not found:
        if closest is None and no_cache is not None:
            raise no_cache
        if closest is None:
            raise ConfigError(
                f"no layout divides this model over {world} ranks with {work.prompts // work.updates} prompts an update"
            )
        raise ConfigError(
            f"nothing fits {world} x {hardware.name}: {closest.layout.describe()} comes closest and needs"
            f" {closest.memory.total / GIB:.1f} of {closest.usable / GIB:.1f} GiB; take more GPUs, a smaller"
            " policy.micro_batch_tokens, shorter lengths or less for the server"
        )
    return sorted(found, key=lambda plan: plan.step)
