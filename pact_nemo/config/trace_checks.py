"""Checks of ``traces``: what they are used for, and what stands in their place."""

from __future__ import annotations

from functools import reduce
from typing import Any

from pact_nemo.config.refusals import one_of, require
from pact_nemo.config.schema import Config
from pact_nemo.config.trace_use import meets_traces, method_teaches
from pact_nemo.methods.registry import method_class
from pact_nemo.traces.augment import KINDS
from pact_nemo.traces.controls import CONTROLS
from pact_nemo.traces.conversations import FIELDS
from pact_nemo.traces.spans import COMPONENTS, OVERLONG
from pact_nemo.traces.verification import VERIFY


def check_traces(config: Config) -> None:
    """Traces, and what stands in their place."""
    objective = config.objective
    method = method_class(config.method)
    one_of("traces.verify", config.traces.verify, VERIFY)
    odd = sorted(set(config.traces.fields) - set(FIELDS))
    require(not odd, f"traces.fields={config.traces.fields}: our fields are {', '.join(FIELDS)}")
    one_of("traces.overlong", config.traces.overlong, OVERLONG)
    one_of("traces.style", config.traces.style, ("full", "compact"))
    one_of("traces.calls_per_turn", config.traces.calls_per_turn, ("one", "all"))
    require(
        set(config.traces.components) <= COMPONENTS,
        f"traces.components={config.traces.components}: only reasoning, calls and observations exist",
    )
    require(
        config.traces.closing is None or bool(config.traces.closing.strip()),
        "traces.closing is empty: give the message that closes a turn, or null to teach none",
    )
    gated = method.conditions_on_trace

    def setting(key: str) -> Any:
        return reduce(getattr, key.split("."), config)

    weights = ", ".join(f"{key}={setting(key)}" for key in method.sft_settings)
    require(
        config.traces.closing is None or config.warmup.steps > 0 or method_teaches(method, setting, calls=True),
        f"traces.closing={config.traces.closing!r}: nothing teaches a trace with method={config.method},"
        f" {weights + ', ' if weights else ''}objective.anchor_prob={objective.anchor_prob},"
        f" objective.schedule.call={objective.schedule.call}, traces.share={config.traces.share} and warmup.steps=0;"
        " leave it out",
    )
    require(
        set(config.traces.augment) <= set(KINDS),
        f"traces.augment={config.traces.augment}: only {', '.join(KINDS)} exist",
    )
    if config.traces.control is not None:
        one_of("traces.control", config.traces.control, CONTROLS)
        require(
            objective.trace_rl and method.conditions_on_trace,
            f"traces.control={config.traces.control} replaces what RL is conditioned on, and"
            f" method={config.method} with objective.trace_rl={objective.trace_rl} conditions on nothing;"
            " leave it out",
        )
        require(
            meets_traces(setting, gated=gated),
            f"traces.control={config.traces.control}: no prompt is conditioned on anything with"
            f" objective.anchor_prob={objective.anchor_prob} and traces.share={config.traces.share}; leave it out, or"
            " lower objective.anchor_prob",
        )
    lowest = config.traces.min_score
    require(
        config.traces.verify != "replay" or 0.0 <= lowest <= 1.0,
        f"traces.min_score={lowest}: must be in [0, 1] with traces.verify=replay, as scores of episodes are",
    )
    require(
        config.traces.share is None or config.trainer.epochs is None,
        f"traces.share={config.traces.share} visits some tasks oftener than others, so that trainer.epochs="
        f"{config.trainer.epochs} has no meaning: set trainer.steps",
    )
