"""What a step's numbers say that a person should hear: spikes, as warnings, and failures that aren't the policy's,
which end a run that has too many of them. No I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from pact_nemo.config.schema import AlarmsConfig
from pact_nemo.rollouts.types import Rollout

#: metric -> (setting, what it is, what to look at)
_SPIKES = {
    "mismatch/mean_abs": (
        "mismatch",
        "sampler and trainer disagree by {value:.3g} nats a token",
        "the server's precision and rollout.export_dtype; with trainer.overlap a part of it is the weights' lag",
    ),
    "policy/kl_ref": (
        "kl",
        "the policy is {value:.3g} nats a token from its reference",
        "optimizer.lr, objective.kl_coef",
    ),
    "policy/clip_fraction_x": (
        "clip_fraction",
        "{share:.0f} % of the tokens under x are clipped",
        "optimizer.lr, trainer.mini_batch_size",
    ),
    "policy/clip_fraction_h": (
        "clip_fraction",
        "{share:.0f} % of the tokens under the trace are clipped",
        "optimizer.lr, trainer.mini_batch_size",
    ),
    "latent/gap_success": (
        "privilege_gap",
        "the trace moves passed rollouts by {value:.3g} nats a token",
        "whether the traces fit their tasks, unless traces.control says they don't",
    ),
    "latent/gap_failure": (
        "privilege_gap",
        "the trace moves failed rollouts by {value:.3g} nats a token",
        "whether the traces fit their tasks, unless traces.control says they don't",
    ),
}


def spikes(record: dict[str, Any], limits: AlarmsConfig) -> list[str]:
    """One sentence for each number of a step's record whose magnitude is above its limit; it names the setting of the
    limit and what to look at.
    """
    found = []
    for key, (setting, text, remedy) in _SPIKES.items():
        value, limit = record.get(key), getattr(limits, setting)
        if value is not None and limit is not None and abs(value) > limit:
            found.append(
                f"{text.format(value=value, share=100 * value)} ({key} above alarms.{setting}={limit:g}): look at"
                f" {remedy}"
            )
    return found


def engines_left(record: dict[str, Any]) -> str | None:
    """What a step's record says of rollout servers that were given up; None while all are there."""
    share = record.get("engines/share", 1.0)
    if share >= 1.0:
        return None
    return (
        f"{100 * share:.0f} % of the rollout servers are left (engines/share), so rollouts take longer; the run stops"
        " below rollout.server.min_engines_share: look at the servers' logs, and --resume starts all of them again"
    )


def kind_of(rollout: Rollout) -> str:
    """Type of a failed rollout's error."""
    return str(rollout.error).partition(":")[0]


def failures(rollouts: Sequence[Rollout]) -> dict[str, int]:
    """Failed rollouts by the type of their error, most frequent first. They are masked: none of their tokens is trained
    on.
    """
    return dict(Counter(kind_of(rollout) for rollout in rollouts if rollout.status == "failed").most_common())


def failure_summary(rollouts: Sequence[Rollout]) -> str | None:
    """How many rollouts failed and what the most frequent cause is; None if none did."""
    causes = Counter(str(rollout.error) for rollout in rollouts if rollout.status == "failed")
    if not causes:
        return None
    cause, count = causes.most_common(1)[0]
    return f"{causes.total()} of {len(rollouts)} rollouts failed and are masked; most often ({count} times): {cause}"


def too_many(rollouts: Sequence[Rollout], limits: AlarmsConfig) -> str | None:
    """Why the run has to end: more than ``alarms.failed_share`` of a step's rollouts failed through no fault of the
    policy; else None.
    """
    failed = sum(rollout.status == "failed" for rollout in rollouts)
    if failed <= limits.failed_share * len(rollouts):
        return None
    return f"{failure_summary(rollouts)}. More than alarms.failed_share={limits.failed_share:g}: repair the cause"
