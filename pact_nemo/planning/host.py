"""Host memory of a node: what all of its ranks and engines keep there at once. Nothing here asks the machine."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from pact_nemo.planning.generation import ServerPlan
from pact_nemo.planning.hardware import Hardware
from pact_nemo.planning.memory import LIBRARIES, state_bytes
from pact_nemo.planning.shape import Layout, ModelShape, rank_matrices, rank_parameters
from pact_nemo.planning.sharing import moved_bytes
from pact_nemo.planning.workload import StepWork
from pact_nemo.policy.config import PolicyConfig

BLOCK = 1 << 30  #: bytes that a trainer's copy is made of at a time (policy/offload.py)
USABLE_HOST = 0.95  #: of a node's memory; the rest is the system's and the environments' (assumed)
COPY, REFERENCE = "trainer's copy, in the engines' turn", "reference weights, page-locked"
SAVING, ASLEEP = "checkpoint copies (at a save)", "engines' weights, while they sleep"
PROCESSES = "Python and libraries"
_ENGINE_PROCESSES = 2  #: of an engine beside its workers: front end and scheduler


@dataclass(frozen=True)
class HostPlan:
    """The node that needs most.

    Attributes:
        ranks, engines: of that node.
        parts: bytes by name; they may all be there at once.
    """

    ranks: int
    engines: int
    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def needed(self) -> float:
        """Bytes that the node has to have."""
        return self.total / USABLE_HOST


def page_locked(size: float) -> float:
    """Bytes that torch's allocator takes for ``size`` page-locked ones: the next power of two."""
    return float(1 << max(int(size) - 1, 0).bit_length()) if size > 0 else 0.0


def copy_bytes(size: float) -> float:
    """Page-locked bytes of a trainer's copy of ``size``."""
    return size // BLOCK * BLOCK + page_locked(size % BLOCK)


def rank_host(
    shape: ModelShape, layout: Layout, policy: PolicyConfig, work: StepWork, *, stage: int, time_sharing: bool
) -> dict[str, float]:
    """Of one rank on a GPU, by name; ``policy.precision`` is fp32 or bf16, not auto.

    A save copies what it writes. Its writers read it while the next step may already be played.
    """
    parameters = rank_parameters(shape, layout, stage, policy.lora)
    state = state_bytes(parameters, layout, policy)
    width = 4 if policy.precision == "fp32" else 2
    parts = {PROCESSES: LIBRARIES}
    if time_sharing:
        parts[COPY] = copy_bytes(moved_bytes(state))
    if parameters.adapters is None:
        parts[SAVING] = moved_bytes(state)
        if work.reference:
            parts[REFERENCE] = sum(page_locked(width * count) for count in rank_matrices(shape, layout, stage))
    else:
        parts[SAVING] = float(width * parameters.adapters + state.optimizer)
    return parts


def engine_host(shape: ModelShape, server: ServerPlan) -> dict[str, float]:
    """Of one engine on GPUs, by name. Asleep with its weights it has them page-locked, matrix by matrix."""
    parts = {PROCESSES: LIBRARIES * (server.gpus + _ENGINE_PROCESSES)}
    if server.time_sharing:
        parts[ASLEEP] = sum(page_locked(server.width * count) for count in rank_matrices(shape, Layout(world=1), 0))
    return parts


def host_plan(
    shape: ModelShape,
    layout: Layout,
    policy: PolicyConfig,
    hardware: Hardware,
    work: StepWork,
    server: ServerPlan | None,
) -> HostPlan:
    """The node that needs most. Ranks are numbered node by node and, within the job, stage by stage.

    Args:
        policy: with its precision as it will run.
        server: engines that the trainer's nodes carry; None = none do.
    """
    each = min(layout.world, hardware.gpus_per_node)
    nodes = -(-layout.world // each)
    sharing = server is not None and server.time_sharing
    stages = [
        rank_host(shape, layout, policy, work, stage=stage, time_sharing=sharing) for stage in range(layout.pipeline)
    ]
    ranks_of_stage = max(1, layout.world // layout.pipeline)
    found: list[Counter[str]] = []
    for node in range(nodes):
        ranks = range(node * each, min((node + 1) * each, layout.world))
        parts: Counter[str] = Counter()
        for rank in ranks:
            parts.update(stages[min(rank // ranks_of_stage, layout.pipeline - 1)])  # type: ignore[arg-type]
        found.append(parts)
    worst = max(found, key=lambda parts: sum(parts.values()))
    engines = -(-server.servers // nodes) if server is not None else 0
    for _ in range(engines):
        assert server is not None
        worst.update(engine_host(shape, server))  # type: ignore[arg-type]
    return HostPlan(each, engines, {name: float(value) for name, value in worst.items()})
