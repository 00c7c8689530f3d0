"""Which settings a run reads, of those that go with a method or with another setting: the others change nothing,
whatever they are set to.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from pact_nemo.methods.registry import METHODS, method_class
from pact_nemo.methods.rewards import REWARD_SETTINGS

if TYPE_CHECKING:
    from pact_nemo.config.schema import Config
    from pact_nemo.methods.base import Method


def unread(method: type[Method]) -> set[str]:
    """Keys below ``objective`` that the method's RL doesn't read; ``schedule`` stands for all that is below it."""
    found = set(REWARD_SETTINGS) - set(method.reward_settings)
    if not method.conditions_on_trace:
        found |= {"trace_rl", "anchor_prob", "schedule"}
    if not method.uses_traces or "objective.sft_coef" not in method.sft_settings:
        found.add("sft_coef")
    if not method.uses_traces or not method.sft_settings:
        found.add("sft_aggregation")
    if not method.turn_level:
        found |= {"turn_level", "gamma", "combine"}
    return found


def idle(config: Config) -> set[str]:
    """Keys that only have a meaning with another value of another key than the config has."""
    objective, schedule, traces = config.objective, config.objective.schedule, config.traces
    adaptive = schedule.kind == "adaptive"
    needs = {
        "objective.clip_low": objective.clip,
        "objective.clip_high": objective.clip,
        "objective.schedule.horizon": not adaptive,
        "objective.schedule.success_target": adaptive,
        "objective.schedule.smoothing": adaptive,
        "objective.schedule.fixed_level": schedule.reasoning == "fixed",
        "objective.schedule.reasoning_scale": schedule.reasoning != "none",
        "objective.schedule.call_start": schedule.call != "none",
        "objective.schedule.call_end": schedule.call == "scale",
        "objective.constant_length": "constant-length" in (objective.aggregation, objective.sft_aggregation),
        "traces.variants": bool(traces.augment),
        "traces.quality_smoothing": traces.quality,
        "traces.verify": traces.path is not None,
        "traces.min_score": traces.path is not None,
        "traces.fields": traces.path is not None,
    }
    return {key for key, needed in needs.items() if not needed}


def words_without_effect(config: Config, words: Iterable[str]) -> list[str]:
    """Of a command line's ``key=value`` words those that change nothing in this run. A method from outside may read any
    key of ``objective``; files of settings are shared between methods, so theirs are not looked at.
    """
    method = method_class(config.method) if config.method in METHODS else None
    keys = unread(method) if method is not None else set()
    without = idle(config)
    found = []
    for word in words:
        key = word.partition("=")[0]
        section, _, rest = key.partition(".")
        off = (
            method is not None
            and section == "objective"
            and (not method.trains_by_rl or rest in keys or rest.partition(".")[0] in keys)
        )
        if off or any(key == other or key.startswith(f"{other}.") for other in without):
            found.append(word)
    return found
