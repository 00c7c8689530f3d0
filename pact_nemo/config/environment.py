"""The settings that belong to an environment: which one, and its own section ``environment_config``.

The section is checked against the dataclass of the environment that is named so far. A source that names another
environment starts the section anew: what was said before belongs to the one before.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pact_nemo.config.own import merge_own
from pact_nemo.environments.registry import environment_spec
from pact_nemo.errors import ConfigError

SECTION = "environment_config"
AGENT = "agent"  #: another spelling of the section, where the environment's spec says so


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


def agent_word(word: str, environment: str) -> str:
    """A word ``agent.KEY=value`` as the setting that it is, ``environment_config.KEY=value``; other words as they are.

    Raises:
        ConfigError: the environment is not ``own``.
    """
    if not word.startswith((f"{AGENT}.", f"{AGENT}=", f"{AGENT}[")):
        return word
    _refuse_agent(f"command line {word!r}", environment)
    return SECTION + word[len(AGENT) :]


def agent_section(name: str, source: DictConfig, environment: str) -> None:
    """Give the section ``agent`` of a file the name that it has in the schema.

    Raises:
        ConfigError: the environment is not ``own``, or the file has both spellings.
    """
    if AGENT not in source:
        return
    _refuse_agent(name, environment)
    if SECTION in source:
        raise ConfigError(f"{name}: {AGENT} and {SECTION} are the same section; keep one of them")
    source[SECTION] = source.pop(AGENT)


def _refuse_agent(name: str, environment: str) -> None:
    if environment_spec(environment).section != AGENT:
        raise ConfigError(
            f"{name}: {AGENT}.* are settings of environment=own, and this is environment={environment}; start"
            " recipes/pact_own.py, or say environment=own"
        )


def schema_for(environment: str, base: type, section: str = SECTION) -> type:
    """The dataclass ``base`` with the section ``environment_config`` as this environment has it.

    Args:
        section: another spelling of it.

    Raises:
        ConfigError: there is no such environment, or OmegaConf can't take its dataclass.
    """
    own = environment_spec(environment).config
    try:
        return _with_section(cast(Any, own), base, section)
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise ConfigError(
            f"environment={environment!r}: its {own.__name__} can't be a section of settings:"
            f" {str(error).splitlines()[0]}; give each field a plain type and a default"
        ) from error


@functools.cache
def _with_section(own: type, base: type, section: str) -> type:
    OmegaConf.structured(own)  # raises what it can't take
    fields = [(section, cast(Any, own), dataclasses.field(default_factory=own))]
    made: type = dataclasses.make_dataclass(base.__name__, fields, bases=(base,))
    made.__module__ = base.__module__  # where its other annotations are looked up
    return made


def check_section(name: str, source: DictConfig, environment: str) -> None:
    """Raises ConfigError where the section of a source has a key or a type that the environment doesn't."""
    section = source._get_node(SECTION)
    if section is None:
        return
    spec = environment_spec(environment)
    merge_own(f"{name}: {spec.section}", section, spec.config, f"environment={environment}")


def begin_anew(before: DictConfig, environment: str, named: str | None) -> None:
    """Take the section out of what was said ``before``, where another environment than ``environment`` is named."""
    if named is not None and named != environment and SECTION in before:
        before.pop(SECTION)
