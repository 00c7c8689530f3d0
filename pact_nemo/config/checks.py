"""Checks that types can't express. Each refusal names key, value and remedy."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

from pact_nemo.chat.contexts import EARLIER_THOUGHTS
from pact_nemo.config.lora import adapter_room
from pact_nemo.config.ranges import check_ranges
from pact_nemo.config.refusals import one_of, require
from pact_nemo.config.schema import BRIDGE, EXPORT_FORMATS, Config, to_dict
from pact_nemo.config.trace_checks import check_traces
from pact_nemo.environments.registry import environment_spec
from pact_nemo.methods.registry import method_class
from pact_nemo.objective.schedules import CALL_SCHEDULES, REASONING_SCHEDULES
from pact_nemo.objective.weights import AGGREGATIONS, SFT_AGGREGATIONS
from pact_nemo.policy.config import ADAPTER, MERGED
from pact_nemo.runtime.quarantine import POLICIES
from pact_nemo.tracking.registry import check_settings


def require_writable(value: Any, key: str = "") -> None:
    """Numbers are finite and texts can be written: into config.yaml, a folder's name or a command line."""
    if isinstance(value, dict):
        for name, item in value.items():
            require_writable(item, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list):
        for item in value:
            require(
                isinstance(item, str | int | float), f"{key}: {item!r:.40} in a list of plain values; take it out"
            )  # OmegaConf lets it pass
            require_writable(item, key)
    elif isinstance(value, float):
        require(math.isfinite(value), f"{key}={value}: must be a finite number")
    elif isinstance(value, int):
        require(abs(value) < 2**63, f"{key}: must fit into 64 bits")
    elif isinstance(value, str):
        require(
            not re.search(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", value),
            f"{key}={value!r}: must be a text without control characters",
        )


def _validate_environment(config: Config) -> None:
    """What the environment needs and refuses of the settings."""
    name, tasks = config.environment, config.tasks
    spec = environment_spec(name)
    require(
        isinstance(config.environment_config, spec.config),
        f"environment_config={config.environment_config!r:.80}: must be the settings of environment={name}",
    )
    own = config.environment_config
    check_ranges(dataclasses.asdict(own), spec.section, own.ranges)
    own.validate()
    require(
        spec.tasks_file != "required" or tasks.path is not None,
        f"environment={name} needs tasks.path=FILE, the benchmark's published rows",
    )
    for key in ("path", "eval_path"):
        require(
            spec.tasks_file != "none" or getattr(tasks, key) is None,
            f"tasks.{key}={getattr(tasks, key)}: environment={name} reads no file of tasks; leave it out",
        )
    require(
        config.objective.outcome == "checker" or spec.reference_answers,
        f"objective.outcome={config.objective.outcome}: environment={name} has no reference answers to compare with;"
        " set objective.outcome=checker",
    )


def validate(config: Config) -> None:
    """Raises ConfigError at the first setting, or pair of settings, that can't be used."""
    for check in (_run, _rollout, _tasks, check_traces, _objective, _annealing, _trainer, _observation, _export):
        check(config)


def _run(config: Config) -> None:
    """Run, model, and the sections that check themselves."""
    values = to_dict(config)
    require_writable(values)
    check_ranges({key: value for key, value in values.items() if key not in ("environment_config", "method_config")})
    for key, name in (("run.name", config.run.name), ("run.label", config.run.label)):
        require(
            name is None or (name.strip() == name != "" and "/" not in name and name not in (".", "..")),
            f"{key}={name!r}: must be a name that a folder can have, without a slash or spaces around it",
        )
    config.rollout.server.validate()
    config.policy.validate_values()
    config.optimizer.validate()
    if config.model.earlier_thoughts is not None:
        one_of("model.earlier_thoughts", config.model.earlier_thoughts, EARLIER_THOUGHTS)
    one_of("run.bad_rows", config.run.bad_rows, POLICIES)


def _rollout(config: Config) -> None:
    """Rollouts and their export."""
    server = config.rollout.server
    one_of("rollout.importance", config.rollout.importance, ("tis", "off"))
    one_of("rollout.export_dtype", config.rollout.export_dtype, ("bfloat16", "float16", "float32", "fp8_block"))
    if config.rollout.lora_refit is not None:
        one_of("rollout.lora_refit", config.rollout.lora_refit, (ADAPTER, MERGED))
    require(
        adapter_room(config, cuda=True) is None or config.rollout.export_dtype != "fp8_block",
        f"rollout.export_dtype=fp8_block with rollout.lora_refit={config.rollout.lora_refit}: adapters are trained"
        " beside the base in the policy's own precision, and a base in FP8 is another one; set"
        " rollout.lora_refit=merged, or rollout.export_dtype=bfloat16",
    )
    require(
        config.rollout.exports_dir is None or Path(config.rollout.exports_dir).is_absolute(),
        f"rollout.exports_dir={config.rollout.exports_dir}: must be an absolute path, the same for every rank and"
        " server",
    )
    require(
        not server.time_sharing or server.url is None,
        f"rollout.server.time_sharing=true: the servers of rollout.server.url={server.url} don't sleep for this"
        " trainer; leave time_sharing out, or start the server with the run and leave url out",
    )
    require(
        not (server.time_sharing and config.trainer.overlap),
        "rollout.server.time_sharing=true with trainer.overlap=true: a server that sleeps during the update can't"
        " sample meanwhile; leave one of them out",
    )


def _tasks(config: Config) -> None:
    """Tasks and their environment."""
    tasks = config.tasks
    _validate_environment(config)
    one_of("tasks.overlong", tasks.overlong, ("drop", "stop"))


def _objective(config: Config) -> None:
    """The objective."""
    objective = config.objective
    one_of("objective.outcome", objective.outcome, ("checker", "answer_f1"))
    one_of("objective.combine", objective.combine, ("sum", "mean"))
    one_of("objective.matching", objective.matching, ("hungarian", "greedy"))
    one_of("objective.aggregation", objective.aggregation, AGGREGATIONS)
    one_of("objective.sft_aggregation", objective.sft_aggregation, SFT_AGGREGATIONS)
    top = objective.clip_high if objective.clip else 0.0
    require(
        objective.dual_clip is None or objective.dual_clip > 1.0 + top,
        f"objective.dual_clip={objective.dual_clip}: must be above {1.0 + top:g}, where the clip range ends, or null",
    )
    require(
        objective.advantage_std or objective.advantage_std_floor == 0.0,
        f"objective.advantage_std_floor={objective.advantage_std_floor} needs objective.advantage_std=true: nothing is"
        " divided otherwise",
    )
    require(
        not (config.policy.lora.rank and config.warmup.steps and objective.kl_coef),
        f"policy.lora.rank={config.policy.lora.rank} has the base for its KL reference, and warmup.steps="
        f"{config.warmup.steps} makes another policy of it before RL begins; set objective.kl_coef=0 or warmup.steps=0",
    )


def _annealing(config: Config) -> None:
    """The schedule of annealing."""
    objective = config.objective
    one_of("objective.schedule.reasoning", objective.schedule.reasoning, REASONING_SCHEDULES)
    one_of("objective.schedule.kind", objective.schedule.kind, ("fixed", "adaptive"))
    require(
        objective.schedule.anchor_end is None or objective.schedule.kind == "adaptive",
        f"objective.schedule.anchor_end={objective.schedule.anchor_end}: for objective.schedule.kind=adaptive only",
    )
    one_of("objective.schedule.call", objective.schedule.call, CALL_SCHEDULES)


def _trainer(config: Config) -> None:
    """The length of the run and its batches."""
    trainer = config.trainer
    method = method_class(config.method)
    require(
        (trainer.steps is None) != (trainer.epochs is None),
        (
            f"trainer.steps={trainer.steps} and trainer.epochs={trainer.epochs}: one of them says how long the run is;"
            " set the other one to null"
            if trainer.steps is not None
            else (
                "trainer.steps=null and trainer.epochs=null: one of them has to say how long the run is; set"
                " trainer.steps=24, or trainer.epochs=3"
            )
        ),
    )
    require(
        (
            (trainer.steps == 0 and config.warmup.steps > 0)
            if not method.trains_by_rl
            else trainer.steps is None or trainer.steps >= 1
        ),
        f"trainer.steps={trainer.steps}: must be >= 1, and 0 for method=sft, which has warmup.steps > 0 only",
    )
    require(
        trainer.batch_size % trainer.mini_batch_size == 0,
        f"trainer.mini_batch_size={trainer.mini_batch_size} must divide trainer.batch_size={trainer.batch_size}",
    )
    require(
        not trainer.overlap or config.rollout.importance == "tis",
        "trainer.overlap=true trains on rollouts of older weights: it needs rollout.importance=tis, which corrects for"
        " that",
    )


def _observation(config: Config) -> None:
    """Evaluation, diagnostics, alarms, trackers."""
    diagnostics = config.diagnostics
    require(
        diagnostics.gradient_every == 0 or config.trainer.mini_batch_size >= 2,
        f"diagnostics.gradient_every={diagnostics.gradient_every} compares two halves of a mini-batch, and"
        f" trainer.mini_batch_size={config.trainer.mini_batch_size} has no halves: set it to at least 2, or"
        " gradient_every to 0",
    )
    check_settings(config.tracking.trackers)


def _export(config: Config) -> None:
    """What is left at the end."""
    formats = config.export.formats
    for name in formats:
        one_of("export.formats", name, EXPORT_FORMATS)
    require(
        "hf" in formats and len(set(formats)) == len(formats),
        f"export.formats={formats}: must have hf, which evaluation and comparisons read, and each format once",
    )
    rank = config.policy.lora.rank
    require(
        BRIDGE not in formats or not rank,
        f"export.formats={formats} with policy.lora.rank={rank}: a Megatron-Bridge checkpoint holds all weights; leave"
        f" {BRIDGE} out and let AutoBridge.import_ckpt make one of hf/, or set policy.lora.rank=0",
    )
    require(
        config.model.hf_config is None or config.model.path is not None,
        f"model.hf_config={config.model.hf_config} describes a checkpoint in model.path, and there is none; set it",
    )
