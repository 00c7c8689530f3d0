"""What a token of an expert trace is part of. The one home of these ids."""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Component(IntEnum):
    """What a token of h* is part of."""

    OTHER = 0
    OBSERVATION = 1
    CALL = 2
    REASONING = 3


OTHER, OBSERVATION, CALL, REASONING = Component.OTHER, Component.OBSERVATION, Component.CALL, Component.REASONING


def is_taught(component: np.ndarray) -> np.ndarray:
    """[H] bools of [H] component ids: the tokens that a supervised term may score, reasoning and calls."""
    return (component == CALL) | (component == REASONING)
