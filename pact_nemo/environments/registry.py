"""From the text of ``environment`` to an environment: a name of the table, ``module:factory``, or
``path/to/file.py:factory``.

A factory is a callable that takes a :class:`~pact_nemo.environments.spec.Setup`, or an
:class:`~pact_nemo.environments.spec.EnvironmentSpec` that holds one. See docs/extend/environment.md.
"""

from __future__ import annotations

import dataclasses

from pact_nemo.environments.base import Environment
from pact_nemo.environments.outside import OutsideEnvironment
from pact_nemo.environments.spec import EnvironmentConfig, EnvironmentSpec, Setup
from pact_nemo.errors import ConfigError, PactError
from pact_nemo.runtime.plugins import load_plugin

ENVIRONMENTS = {
    "bfcl": "pact_nemo.environments.bfcl.environment:BFCL",
    "ftrl": "pact_nemo.environments.ftrl:FTRL",
    "toolhop": "pact_nemo.environments.toolhop:TOOLHOP",
    "own": "pact_nemo.environments.own.environment:OWN",
}


def environment_spec(name: str) -> EnvironmentSpec:
    """What the environment ``name`` says of itself.

    Raises:
        ConfigError: no such name, module, file or factory, or it is none; names value, known names and remedy.
    """
    found = load_plugin("environment", name, ENVIRONMENTS)
    if not isinstance(found, EnvironmentSpec):
        if not callable(found):
            raise ConfigError(
                f"environment={name!r} is a {type(found).__name__}; it has to be a class or function that"
                " takes a Setup, or an EnvironmentSpec"
            )
        found = EnvironmentSpec(found)
    config = found.config
    if not (isinstance(config, type) and issubclass(config, EnvironmentConfig) and dataclasses.is_dataclass(config)):
        raise ConfigError(
            f"environment={name!r}: its config {config!r} has to be a dataclass that inherits from EnvironmentConfig"
        )
    return found


def build_environment(name: str, setup: Setup) -> Environment:
    """The environment ``name`` for a setup, checked at every step where its spec says so.

    Raises:
        ConfigError: the factory takes no setup, raises, or what it returns lacks a method.
    """
    spec = environment_spec(name)
    if not spec.checked:
        environment: Environment = spec.build(setup)
        return environment
    try:
        found = spec.build(setup)
    except PactError:
        raise
    except Exception as error:
        raise ConfigError(
            f"environment={name!r}: building it raised {error!r}; its factory is called with one argument, a Setup"
        ) from error
    return OutsideEnvironment(name, found, spec, setup.max_observation_chars)
