"""Whether this machine's memory holds what a run's ranks and engines keep in it."""

from __future__ import annotations

import dataclasses

from pact_nemo.config.schema import Config
from pact_nemo.errors import ConfigError
from pact_nemo.planning.from_config import hardware_of, run_plan
from pact_nemo.planning.host import ASLEEP, COPY, REFERENCE, SAVING, HostPlan
from pact_nemo.planning.memory import GIB
from pact_nemo.planning.plan import Plan
from pact_nemo.runtime.machine import HostMemory, host_memory

#: part -> what to set so that there is less of it, or none
REMEDIES = {
    COPY: "rollout.server.time_sharing=false keeps the trainer on its GPUs, beside an engine",
    ASLEEP: "rollout.server.engines=1 has fewer engines, which sleep with their weights here",
    REFERENCE: "objective.kl_coef=0 needs no reference",
    SAVING: "policy.distributed_optimizer=true shares the optimizer's state between data-parallel ranks",
}


def holds(plan: Plan) -> bool:
    """Whether this machine has the host memory that a node of a plan needs."""
    memory = host_memory()
    return plan.host is None or memory is None or plan.host.needed <= memory.total


def check_host_room(config: Config, *, world: int, ranks_here: int | None) -> None:
    """Refuse a run on GPUs whose node has too little memory.

    Args:
        world: trainer ranks of the job.
        ranks_here: those of this node; None: one on each of its GPUs.

    Raises:
        ConfigError: names the largest parts, what is needed and there, and a setting for each part.
    """
    hardware = hardware_of(config)
    if ranks_here is not None:
        hardware = dataclasses.replace(hardware, gpus_per_node=ranks_here)
    plan, memory = run_plan(config, world=world, hardware=hardware), host_memory()
    if plan.host is not None and memory is not None and not holds(plan):
        raise ConfigError(_refusal(plan.host, memory, sharded=config.policy.distributed_optimizer))


def _refusal(host: HostPlan, memory: HostMemory, *, sharded: bool) -> str:
    largest = sorted(host.parts, key=lambda name: -host.parts[name])
    parts = ", ".join(f"{name} {host.parts[name] / GIB:,.0f} GiB" for name in largest)
    remedies = [REMEDIES[name] for name in largest if name in REMEDIES and not (name == SAVING and sharded)]
    where = "this node has" if memory.limit is None else f"{memory.limit} allows"
    more = "" if memory.limit is None else " (under Slurm sbatch --mem=0 asks for all of a node's)"
    return (
        f"{host.ranks} rank(s) and {host.engines} engine(s) of a node need {host.needed / GIB:,.0f} GiB of host memory"
        f" by the plan, and {where} {memory.total / GIB:,.0f}{more}: {parts}. Take nodes with more memory, or more of"
        f" them; or {'; '.join(remedies)}"
    )
