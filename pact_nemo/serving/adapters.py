"""Adapters beside a server's model: what it is started with to take them, and the name that requests give one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from pact_nemo.checkpoints.manifest import MANIFEST_NAME
from pact_nemo.errors import ConfigError
from pact_nemo.serving.endpoint import SERVED_MODEL_NAME

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  #: that vLLM's ``--max-lora-rank`` takes
#: asked for by vLLM before it has the paths that load and drop an adapter
RUNTIME_ENV = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
#: with it vLLM would answer a request for an absent adapter from the base
UNNAMED_ENV = "VLLM_SKIP_MODEL_NAME_VALIDATION"


@dataclass(frozen=True)
class AdapterRoom:
    """Room for one adapter at a time: refits come between batches, so no two versions are asked for together.

    Attributes:
        rank: of the adapters, at most.
        targets: matrices that they may have, as the Hugging Face model names them (``q_proj``).

    Raises:
        ConfigError: vLLM takes no adapters of such a rank.
    """

    rank: int
    targets: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.rank > RANKS[-1]:
            raise ConfigError(
                f"policy.lora.rank={self.rank}: vLLM's servers take adapters up to rank {RANKS[-1]}; lower it, or set"
                " rollout.lora_refit=merged"
            )

    @property
    def slot_rank(self) -> int:
        """The rank that vLLM is started for: the next one that it takes."""
        return next(rank for rank in RANKS if rank >= self.rank)

    def arguments(self) -> list[str]:
        """Of vLLM's command line."""
        return [
            "--enable-lora",
            "--max-loras=1",
            f"--max-lora-rank={self.slot_rank}",
            "--lora-target-modules",
            *self.targets,
        ]

    def lacks(self, rank: int, targets: Sequence[str] | None, runtime: bool) -> list[str]:
        """What a server that somebody else started would have to be started with, to take these adapters.

        Args:
            rank: that it was started for; 0: it takes no adapters.
            targets: that it was restricted to; None: to none.
            runtime: it has the paths that load and drop an adapter.
        """
        found = [] if rank else ["--enable-lora"]
        if rank < self.rank:
            found.append(f"--max-lora-rank={self.slot_rank}")
        if targets is not None and not set(self.targets) <= set(targets):
            found.append(f"--lora-target-modules {' '.join(self.targets)}")
        return found if runtime else [*found, f"{RUNTIME_ENV}=1"]


def adapter_name(folder: Path, version: int) -> str:
    """What requests call an adapter: its version, and what its manifest says of its bytes. vLLM's prefix cache goes by
    the name, so two versions never share a block.
    """
    return f"{SERVED_MODEL_NAME}-v{version:06d}-{blake3((folder / MANIFEST_NAME).read_bytes()).hexdigest()[:12]}"
