"""Random-number states of all ranks, as a checkpoint keeps them: exact, and readable as JSON."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pact_nemo.errors import CheckpointError
from pact_nemo.runtime import strict_json

RNG_NAME = "rng.json"


def rng_state() -> dict[str, Any]:
    """This rank's random-number generators as JSON values, exact: whole numbers, bytes in hexadecimal, a float that
    reads back as it was.
    """
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [str(kind), [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
        "torch": _hex(torch.random.get_rng_state()),
        "cuda": _hex(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None,
    }


def _hex(state: torch.Tensor) -> str:
    return bytes(state.numpy()).hex()


def _from_hex(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def read_rng_states(folder: Path) -> list[dict[str, Any]]:
    """The states of a checkpoint's ranks, in their order.

    Raises:
        CheckpointError: the file is missing or can't be read.
    """
    path = folder / RNG_NAME
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing: an earlier version of this program made that checkpoint; resume with that version, or"
            " start anew"
        )
    try:
        states: list[dict[str, Any]] = strict_json.loads(path.read_bytes().decode("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read ({error}); resume from an older checkpoint") from error
    return states


def set_rng_state(state: dict[str, Any]) -> None:
    """Put this rank's generators where :func:`rng_state` found them."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.random.set_rng_state(_from_hex(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_from_hex(state["cuda"]))
