"""How many engines a node of the job has, and where on it each runs: GPUs, cores, address. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pact_nemo.errors import ConfigError
from pact_nemo.serving.config import ALL_ENGINES, RolloutServerConfig


@dataclass(frozen=True)
class EnginePlace:
    """One engine's place. The default is a node of its own.

    Attributes:
        index, count: which one of the node's engines this is.
        devices: its GPUs, as ``CUDA_VISIBLE_DEVICES`` names them; empty: those that it finds.
        address: that it listens on and is reached by; None: ``rollout.server.host``.
        api_key: that it asks for; None: the environment's, or one of its own.
    """

    index: int = 0
    count: int = 1
    devices: tuple[str, ...] = ()
    address: str | None = None
    api_key: str | None = field(default=None, repr=False)

    def cores(self, cores: Sequence[int]) -> list[int]:
        """Its part of the node's cores; all of them where there are fewer than engines."""
        each = len(cores) // self.count
        return list(cores) if each == 0 else list(cores[self.index * each : (self.index + 1) * each])


def engines_per_node(config: RolloutServerConfig, nodes: int, gpus: int | None) -> int:
    """How many engines each node starts, where ``rollout.server.engines`` is more than one.

    Args:
        nodes: of the job's trainer ranks.
        gpus: that the trainer has on each; None: the engines run on the CPU.

    Raises:
        ConfigError: the number is no multiple of the nodes.
    """
    if config.engines == ALL_ENGINES:
        return 1 if gpus is None else max(1, gpus // config.tensor_parallel_size)
    if int(config.engines) % nodes:
        raise ConfigError(
            f"rollout.server.engines={config.engines} can't be shared evenly by {nodes} nodes; take 1 (on the first"
            f" node), a multiple of {nodes}, or {ALL_ENGINES}"
        )
    return int(config.engines) // nodes


def places_on_node(
    count: int, ranks: int, devices: Sequence[str] | None, *, address: str | None, api_key: str
) -> list[EnginePlace]:
    """One place for each engine of a node.

    Args:
        count: engines.
        ranks: GPUs that each is split over.
        devices: GPUs of the node, in order; None: it has none, the engines share its cores.
        address, api_key: of all of them.

    Raises:
        ConfigError: the node has too few GPUs.
    """
    if devices is not None and count * ranks > len(devices):
        raise ConfigError(
            f"{count} rollout engine(s) a node (rollout.server.engines) of rollout.server.tensor_parallel_size={ranks}"
            f" need {count * ranks} GPUs, this process sees {len(devices)} ({','.join(devices) or 'none'}); lower one"
            " of them, or let the first rank of a node see all of its GPUs"
        )
    own = [tuple(devices[index * ranks : (index + 1) * ranks]) if devices else () for index in range(count)]
    return [EnginePlace(index, count, gpus, address, api_key) for index, gpus in enumerate(own)]
