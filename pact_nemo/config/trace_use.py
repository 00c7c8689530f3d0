"""Whether a run's RL uses its traces at all, by the settings: a term can be off by more than its own weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

#: value of a dotted key, as ``objective.anchor_prob``; None where a run of another version had no such setting
Setting = Callable[[str], Any]


def meets_traces(setting: Setting, *, gated: bool) -> bool:
    """Whether RL's prompts include one that uses its trace.

    Args:
        gated: whether the method anchors prompts (eq. 13), as PACT does.
    """
    if setting("traces.share") == 0:
        return False
    first, last = setting("objective.anchor_prob"), setting("objective.schedule.anchor_end")
    return not (gated and first == 1 and last in (None, 1))


def teaches(setting: Setting, *, gated: bool, calls: bool = False) -> bool:
    """Whether the SFT term of the objective (eq. 14) has weight in some step; of its call tokens with ``calls``. It is
    annealed (eq. 10-11) in gated methods only.
    """
    schedules = {setting("objective.schedule.call"), *(() if calls else (setting("objective.schedule.reasoning"),))}
    annealed_away = gated and schedules == {"none"}
    return setting("objective.sft_coef") != 0 and not annealed_away and meets_traces(setting, gated=gated)
