"""Methods by name, and from outside by ``method=module:Class`` or ``method=path/to/file.py:Class``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pact_nemo.errors import ConfigError
from pact_nemo.methods.base import Method
from pact_nemo.runtime.plugins import check_overrides, load_plugin

if TYPE_CHECKING:
    from pact_nemo.config.schema import Config

#: name -> where its class is
METHODS = {
    "pact": "pact_nemo.methods.pact:Pact",
    "matchtir": "pact_nemo.methods.matchtir:MatchTIR",
    "grpo": "pact_nemo.methods.grpo:GRPO",
    "toolrl": "pact_nemo.methods.toolrl:ToolRL",
    "ftrl": "pact_nemo.methods.ftrl:FTRL",
    "chord": "pact_nemo.methods.chord:Chord",
    "chord_phi": "pact_nemo.methods.chord:ChordPhi",
    "sft": "pact_nemo.methods.sft:SFT",
    "luffy": "pact_nemo.methods.luffy:Luffy",
}


def method_class(name: str) -> type[Method]:
    """The class of a method.

    Raises:
        ConfigError: no method of this name, or what it names is no subclass of Method.
    """
    found = load_plugin("method", name, METHODS)
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise ConfigError(f"method={name}: {found!r:.80} is no subclass of pact_nemo.methods.base.Method")
    if name not in METHODS:
        check_overrides("method", name, found, Method)
    return found


def make_method(config: Config) -> Method:
    """The method of a run, with its settings.

    Raises:
        ConfigError: the method refuses its settings, or its class can't be made; names both.
    """
    try:
        return method_class(config.method)(config.objective, config.method_config)
    except ConfigError:
        raise
    except Exception as error:  # code of the user's own may raise anything
        raise ConfigError(f"method={config.method}: {type(error).__name__}: {error}") from error


def method_named(name: str, objective: Any, **own: Any) -> Method:
    """A method by name, with the given settings of its own."""
    found = method_class(name)
    return found(objective, found.Config(**own))
