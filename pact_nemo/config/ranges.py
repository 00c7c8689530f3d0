"""The range of every numeric setting: one table, which a generic check reads.

What belongs to an environment, a method or a tracker has its ranges in its own class, as ``ranges``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pact_nemo.config.refusals import require

Ranges = Mapping[str, str | tuple[str, str]]  #: key: range, or range and why

ANY = "any"  #: every number is right, as with seeds

_SHARE = "in [0, 1]"
_PROBABILITY = (_SHARE, "it is a probability")
_TAUGHT = (">= 0", "a negative weight would unteach the trace")
_EVERY = (">= 0", "steps from one measurement to the next, or 0 for none")
#: of the schema's keys; null is not looked at
RANGES: Ranges = {
    "run.seed": ANY,
    "run.ranks": ">= 1",
    "tasks.max_observation_chars": ">= 1",
    "tasks.max_prompt_tokens": ">= 1",
    "tasks.held_out": (">= 1", "at least one scenario group must be held out"),
    "tasks.validation": ">= 0",
    "tasks.split_seed": ANY,
    "tasks.max_train": ">= 1",
    "tasks.max_eval": ">= 1",
    "sandbox.workers": ">= 1",
    "sandbox.seconds": "> 0",
    "sandbox.memory_mb": ">= 1",
    "sandbox.processes": ">= 1",
    "traces.min_score": ANY,  # rewards of a row have a scale of their own; what a replay scores, trace_checks knows
    "traces.max_missing": _SHARE,
    "traces.max_unreferenced": _SHARE,
    "traces.max_tasks": ">= 1",
    "traces.share": _SHARE,
    "traces.max_tokens": ">= 1",
    "traces.variants": ">= 1",
    "traces.quality_smoothing": "in [0, 1)",
    "rollout.server.max_model_len": ">= 1",
    "rollout.server.max_num_seqs": ">= 1",
    "rollout.server.max_num_batched_tokens": ">= 1",
    "rollout.server.seed": ("in [0, 4294967295]", "the engine's generators take no other seed"),
    "rollout.server.cpu_threads": ">= 1",
    "rollout.server.cpu_kv_cache_gib": ">= 1",
    "rollout.server.cpu_block_size": (">= 32", "a multiple of 32 is needed"),
    "rollout.server.tensor_parallel_size": ">= 1",
    "rollout.server.gpu_memory_utilization": "in (0, 1]",
    "rollout.server.start_timeout_s": "> 0",
    "rollout.server.stop_timeout_s": "> 0",
    "rollout.server.request_timeout_s": "> 0",
    "rollout.server.refit_timeout_s": "> 0",
    "rollout.server.heartbeat_s": "> 0",
    "rollout.server.heartbeat_timeout_s": "> 0",
    "rollout.server.max_restarts": ">= 0",
    "rollout.server.min_engines_share": _SHARE,
    "rollout.server.reissue_limit": ">= 0",
    "rollout.server.log_mb": ">= 1",
    "rollout.server.connect_retries": ">= 0",
    "rollout.sampling.temperature": (
        "> 0",
        "K greedy rollouts of a prompt are all alike, and greedy choice is no distribution whose log-probs could be"
        " trained; evaluation.temperature may be 0",
    ),
    "rollout.sampling.top_p": (
        "exactly 1",
        "the trainer's log-probs are those of the whole softmax, not of a truncated one, and the update would be off"
        " by what was cut; lower rollout.sampling.temperature instead",
    ),
    "rollout.sampling.max_turns_per_user_turn": ">= 1",
    "rollout.sampling.max_turns": ">= 1",
    "rollout.sampling.max_turn_tokens": ">= 1",
    "rollout.sampling.max_response_tokens": ">= 1",
    "rollout.sampling.concurrency": ">= 1",
    "rollout.importance_cap": ">= 1",
    "rollout.keep_exports": ">= 1",
    "objective.group_size": (">= 2", "group-normalised advantages need K >= 2"),
    "objective.clip_low": "in (0, 1)",
    "objective.clip_high": "> 0",
    "objective.dual_clip": ("> 1", "it has to be above the clip range, too"),
    "objective.gamma": _SHARE,
    "objective.advantage_eps": ">= 0",
    "objective.advantage_std_floor": ">= 0",
    "objective.call_penalty": (">= 0", "it is subtracted: a negative one would reward unmatched calls"),
    "objective.outcome_weight": ">= 0",
    "objective.sft_coef": ">= 0",
    "objective.anchor_prob": _PROBABILITY,
    "objective.kl_coef": ">= 0",
    "objective.entropy_coef": ">= 0",
    "objective.constant_length": ">= 1",
    "objective.schedule.reasoning_scale": _TAUGHT,
    "objective.schedule.fixed_level": ("in [0, 4]", "these are the prefix levels"),
    "objective.schedule.call_start": _TAUGHT,
    "objective.schedule.call_end": _TAUGHT,
    "objective.schedule.horizon": ">= 1",
    "objective.schedule.success_target": "in (0, 1]",
    "objective.schedule.smoothing": "in [0, 1)",
    "objective.schedule.anchor_end": _PROBABILITY,
    "policy.tensor_parallel": ">= 1",
    "policy.pipeline_parallel": ">= 1",
    "policy.context_parallel": ">= 1",
    "policy.expert_parallel": ">= 1",
    "policy.virtual_pipeline": ">= 2",
    "policy.micro_batch_tokens": ">= 1",
    "policy.logprob_chunk": ">= 1",
    "policy.fp8_bf16_layers": ">= 0",
    "policy.lora.rank": (">= 0", "0 trains every weight"),
    "policy.lora.alpha": "> 0",
    "policy.lora.dropout": (
        "exactly 0",
        "only 0 is computed, for the update has to see the log-probs that its ratios are taken against",
    ),
    "policy.export_writers": ">= 1",
    "policy.init_timeout_s": ">= 1",
    "optimizer.lr": ">= 0",
    "optimizer.min_lr": ">= 0",
    "optimizer.warmup_steps": ">= 0",
    "optimizer.weight_decay": ">= 0",
    "optimizer.betas": "in [0, 1)",
    "optimizer.eps": ">= 0",
    "optimizer.clip_grad": ">= 0",
    "warmup.steps": ">= 0",
    "warmup.batch_size": ">= 1",
    "warmup.lr": ">= 0",
    "warmup.max_tasks": ">= 1",
    "warmup.seed": ANY,
    "warmup.reasoning_weight": _TAUGHT,
    "warmup.call_weight": _TAUGHT,
    "trainer.steps": ">= 0",
    "trainer.epochs": ">= 1",
    "trainer.batch_size": ">= 1",
    "trainer.mini_batch_size": ">= 1",
    "trainer.checkpoint_every": (">= 0", "steps from one to the next, or 0 for the last one alone"),
    "trainer.keep_checkpoints": ">= 1",
    "trainer.keep_rollouts": (">= 0", "steps to keep, or 0 for all"),
    "evaluation.every": (">= 0", "steps from one to the next, or 0 for none"),
    "evaluation.max_turns_per_user_turn": ">= 1",
    "evaluation.temperature": (">= 0", "0 is greedy"),
    "evaluation.samples": ">= 1",
    "evaluation.episodes_in_report": ">= 0",
    "diagnostics.gradient_every": _EVERY,
    "diagnostics.trace_every": _EVERY,
    "diagnostics.trace_tasks": ">= 1",
    "alarms.mismatch": ">= 0",
    "alarms.kl": ">= 0",
    "alarms.clip_fraction": _SHARE,
    "alarms.privilege_gap": ">= 0",
    "alarms.failed_share": _SHARE,
}


def inside(value: float, allowed: str) -> bool:
    """Whether a number lies in a range of the table: ``>= 1``, ``> 0``, ``in [0, 1)``, ``exactly 0`` or ``any``.

    Raises:
        ValueError: that is no range.
    """
    if allowed == ANY:
        return True
    if found := re.fullmatch(r"(>=|>|exactly) (\S+)", allowed):
        bound = float(found.group(2))
        return {">=": value >= bound, ">": value > bound, "exactly": value == bound}[found.group(1)]
    found = re.fullmatch(r"in ([\[(])(\S+), (\S+)([\])])", allowed)
    if found is None:
        raise ValueError(f"{allowed!r} is no range")
    low, high = float(found.group(2)), float(found.group(3))
    return (value >= low if found.group(1) == "[" else value > low) and (
        value <= high if found.group(4) == "]" else value < high
    )


def range_of(key: str, ranges: Ranges) -> str | None:
    """The range of a key, without its reason; None where it has none."""
    entry = ranges.get(key)
    return entry[0] if isinstance(entry, tuple) else entry


def _below(key: str, ranges: Ranges) -> Ranges:
    return {name[len(key) + 1 :]: entry for name, entry in ranges.items() if name.startswith(f"{key}.")}


def check_ranges(values: Mapping[str, Any], section: str = "", ranges: Ranges | None = None) -> None:
    """Every number that has a range lies in it.

    Args:
        values: nested settings of the section.
        section: where they stand, for messages; empty: the whole configuration.
        ranges: by dotted key within the section; None: those of :data:`RANGES`.

    Raises:
        ConfigError: names key, value and range.
    """
    for key, value in values.items():
        here = f"{section}.{key}" if section else key
        if isinstance(value, Mapping):
            inner = ranges if ranges is None else _below(key, ranges)
            check_ranges(value, here, inner)
            continue
        entry = RANGES.get(here) if ranges is None else ranges.get(key)
        if entry is None:
            continue
        allowed, why = entry if isinstance(entry, tuple) else (entry, "")
        for number in value if isinstance(value, list | tuple) else [value]:
            require(
                isinstance(number, bool) or not isinstance(number, int | float) or inside(number, allowed),
                f"{here}={number}: must be {allowed}{f': {why}' if why else ''}",
            )
