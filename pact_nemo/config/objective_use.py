"""Which settings of ``objective`` a method reads: another one changes nothing, whatever it is set to."""

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


def words_without_effect(config: Config, words: Iterable[str]) -> list[str]:
    """Of a command line's ``key=value`` words those that the method doesn't read. A method from outside may read any;
    files of settings are shared between methods, so theirs are not looked at.
    """
    if config.method not in METHODS:
        return []
    method = method_class(config.method)
    keys = unread(method)
    found = []
    for word in words:
        section, _, rest = word.partition("=")[0].partition(".")
        if section == "objective" and (not method.trains_by_rl or rest in keys or rest.partition(".")[0] in keys):
            found.append(word)
    return found
