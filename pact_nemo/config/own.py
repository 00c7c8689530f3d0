"""Settings of a part that has a config class of its own: the section is checked against that class."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pact_nemo.config.ranges import check_ranges
from pact_nemo.errors import ConfigError

#: settings that have moved: old key -> new key
MOVED = {
    "objective.method": "method",
    "objective.mu_start": "method_config.mu_start",
    "objective.mu_end": "method_config.mu_end",
    "objective.mu_decay_steps": "method_config.mu_decay_steps",
    "objective.mu_schedule": "method_config.mu_schedule",
    "objective.shaping": "method_config.shaping",
    "objective.ftrl_count_malformed": "method_config.count_malformed",
    "objective.toolrl_strict": "method_config.strict",
    "tasks.benchmark": "environment",
    "tasks.answer_rule": "environment_config.answer_rule",
    "tasks.categories": "environment_config.categories",
    "tasks.grounded_only": "environment_config.grounded_only",
    "tasks.max_calls": "environment_config.max_calls",
    "tasks.max_tools": "environment_config.max_tools",
    "tasks.max_user_chars": "environment_config.max_user_chars",
    "tasks.scenario": "environment_config.scenario",
    "tasks.window": "environment_config.window",
}


def refuse_moved(name: str, source: Any) -> None:
    """Raises ConfigError when a source says a setting by its old key; names the new one."""
    if not isinstance(source, DictConfig):
        return
    for old, new in MOVED.items():
        section, _, key = old.partition(".")
        inner = source.get(section) if section in source and not OmegaConf.is_missing(source, section) else None
        if isinstance(inner, DictConfig) and key in inner:
            raise ConfigError(f"{name}: {old} is now {new}; rename it")


def merge_own(section: str, given: Any, schema: type, owner: str) -> DictConfig:
    """The defaults of ``schema`` with the settings that ``given`` (a mapping) has laid over them.

    Args:
        section: its key, for messages; a source's name may stand before it.
        owner: whose settings they are, for messages, as in ``method=chord``.

    Raises:
        ConfigError: a key that the class has no field for, or a value of another type.
    """
    try:
        return cast(DictConfig, OmegaConf.merge(OmegaConf.structured(schema), given))
    except (OmegaConfBaseException, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _refusal(section, schema, owner, error) from error


def own_config(section: str, given: Any, schema: type, owner: str) -> Any:
    """:func:`merge_own` as an instance of ``schema``.

    Raises:
        ConfigError: see :func:`merge_own`; also what its ``ranges`` or the class itself refuse.
    """
    merged = merge_own(section, given, schema, owner)
    values = OmegaConf.to_container(merged)
    assert isinstance(values, dict)  # merge_own gives a mapping
    check_ranges({str(key): value for key, value in values.items()}, section, getattr(schema, "ranges", {}))
    try:
        return OmegaConf.to_object(merged)
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise _refusal(section, schema, owner, error) from error


def _refusal(section: str, schema: type, owner: str, error: Exception) -> ConfigError:
    key = getattr(error, "full_key", None) or ""
    known = ", ".join(sorted(field.name for field in dataclasses.fields(schema))) or "none"
    return ConfigError(
        f"{section}{'.' + key if key else ''}: {str(error).splitlines()[0]}; settings of {owner}: {known}"
    )
