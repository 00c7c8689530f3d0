"""Whether a run's RL uses its traces at all, by the settings: a term can be off by more than its own weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pact_nemo.methods.base import Method

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
    annealed_away = gated and not (_weighs_calls(setting) or (not calls and _weighs_reasoning(setting)))
    return setting("objective.sft_coef") != 0 and not annealed_away and meets_traces(setting, gated=gated)


def _weighs_calls(setting: Setting) -> bool:
    kind, start, end = (setting(f"objective.schedule.{key}") for key in ("call", "call_start", "call_end"))
    return kind != "none" and (start != 0 or (kind == "scale" and end != 0))


def _weighs_reasoning(setting: Setting) -> bool:
    kind, scale, level = (
        setting(f"objective.schedule.{key}") for key in ("reasoning", "reasoning_scale", "fixed_level")
    )
    return kind != "none" and scale != 0 and not (kind == "fixed" and level == 0)


def method_teaches(method: type[Method], setting: Setting, *, calls: bool = False) -> bool:
    """Whether a method's RL teaches traces in some step, by its SFT term or a term of its own; their call tokens with
    ``calls``.
    """
    weights = method.sft_settings
    if not method.uses_traces or (weights and all(setting(key) == 0 for key in weights)):
        return False
    if method.conditions_on_trace:
        return teaches(setting, gated=True, calls=calls)
    return meets_traces(setting, gated=False)
