"""The settings that belong to an environment: which one, and its own section ``environment_config``.

The section is checked against the dataclass of the environment that is named so far. A source that names another
environment starts the section anew: what was said before belongs to the one before.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pact_nemo.config.own import merge_own
from pact_nemo.environments.registry import environment_spec
from pact_nemo.errors import ConfigError

SECTION = "environment_config"


def named_environment(name: str, source: Any) -> str | None:
    """The environment that a source of settings names; None where it names none.

    Raises:
        ConfigError: it is an interpolation.
    """
    node = source._get_node("environment") if isinstance(source, DictConfig) else None
    if node is None:
        return None
    if node._is_interpolation():
        raise ConfigError(f"{name}: environment={node._value()!r}: give the name itself")
    value = node._value()
    return value if isinstance(value, str) else None


def schema_for(environment: str, base: type) -> type:
    """The dataclass ``base`` with the section ``environment_config`` as this environment has it.

    Raises:
        ConfigError: there is no such environment, or OmegaConf can't take its dataclass.
    """
    own = environment_spec(environment).config
    try:
        OmegaConf.structured(own)
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise ConfigError(
            f"environment={environment!r}: its {own.__name__} can't be a section of settings:"
            f" {str(error).splitlines()[0]}; give each field a plain type and a default"
        ) from error
    fields = [(SECTION, cast(Any, own), dataclasses.field(default_factory=own))]
    made: type = dataclasses.make_dataclass(base.__name__, fields, bases=(base,))
    made.__module__ = base.__module__  # where its other annotations are looked up
    return made


def check_section(name: str, source: DictConfig, environment: str) -> None:
    """Raises ConfigError where the section of a source has a key or a type that the environment doesn't."""
    section = source._get_node(SECTION)
    if section is None:
        return
    merge_own(f"{name}: {SECTION}", section, environment_spec(environment).config, f"environment={environment}")


def begin_anew(before: DictConfig, environment: str, named: str | None) -> None:
    """Take the section out of what was said ``before``, where another environment than ``environment`` is named."""
    if named is not None and named != environment and SECTION in before:
        before.pop(SECTION)
