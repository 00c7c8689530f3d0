"""Settings from defaults, YAML files, recipes and ``key=value`` words, checked against the schema by OmegaConf.

Order of precedence, weakest first: the schema's defaults, the files a YAML names under ``defaults:`` (in order), the
YAML itself, ``key=value`` words.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pact_nemo.config.checks import validate
from pact_nemo.config.environment import (
    AGENT,
    SECTION,
    agent_section,
    agent_word,
    begin_anew,
    check_section,
    named_environment,
    schema_for,
)
from pact_nemo.config.own import own_config, refuse_moved
from pact_nemo.config.recipes import Recipe
from pact_nemo.config.schema import Config, ObjectiveConfig
from pact_nemo.config.text import load_word, load_yaml
from pact_nemo.errors import ConfigError
from pact_nemo.methods.registry import METHODS, make_method, method_class


def _read_yaml(path: Path, environment: str, seen: tuple[Path, ...] = ()) -> DictConfig:
    """A YAML file with its ``defaults:`` parents merged below it.

    Args:
        environment: the one that the settings below this file name.
    """
    if path in seen:
        raise ConfigError(f"{path}: 'defaults' go in a circle: {' -> '.join(map(str, (*seen, path)))}")
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist; the shipped ones are under conf/")
    try:
        loaded = load_yaml(path, Config)
    except ConfigError:
        raise
    except Exception as error:  # yaml and OmegaConf raise unrelated families; all mean "not a config file"
        raise ConfigError(f"{path}: not valid YAML: {error}; put a text with such characters into quotes") from error
    if isinstance(loaded, ListConfig):
        raise ConfigError(f"{path}: expected a mapping at the top level, found a list")
    try:
        parents = loaded.pop("defaults", [])
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"{path}: 'defaults' can't be read: {str(error).splitlines()[0]}; give a list of file names"
        ) from error
    if not isinstance(parents, ListConfig | list) or not all(
        isinstance(name, str) and name.isprintable() for name in _plain(parents, str(path))
    ):
        raise ConfigError(f"{path}: 'defaults' must be a list of file names")
    merged = OmegaConf.create({})
    for parent in parents:
        below = _read_yaml((path.parent / str(parent)).resolve(), environment, (*seen, path))
        named = named_environment(str(path), below)
        begin_anew(merged, environment, named)
        environment = named or environment
        merged = OmegaConf.unsafe_merge(merged, below)  # type: ignore[assignment]
    named = named_environment(str(path), loaded)
    begin_anew(merged, environment, named)
    loaded = _with_own_section(path, loaded, named or environment)
    try:
        return OmegaConf.unsafe_merge(merged, loaded)  # type: ignore[return-value]
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise ConfigError(
            f"{path}: it doesn't fit the files it names under 'defaults': {str(error).splitlines()[0]}; repair one of"
            " them"
        ) from error


def _with_own_section(path: Path, loaded: DictConfig, environment: str) -> DictConfig:
    """A file's settings with the section of its environment read by that environment's types, and checked."""
    if SECTION not in loaded and AGENT not in loaded:
        return loaded
    typed = load_yaml(path, schema_for(environment, Config, AGENT if AGENT in loaded else SECTION))
    assert isinstance(typed, DictConfig)  # it was one before
    typed.pop("defaults", None)
    agent_section(str(path), typed, environment)
    check_section(str(path), typed, environment)
    return typed


def _plain(source: Any, name: str) -> Any:
    """Lists and dicts, interpolations unresolved."""
    if not isinstance(source, DictConfig | ListConfig):
        return source
    try:
        return OmegaConf.to_container(source, resolve=False)
    except (OmegaConfBaseException, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{name}: can't be read: {str(error).splitlines()[0]}; give plain settings") from error


def _refuse_resolvers(name: str, source: Any) -> None:
    """Raises ConfigError for ``${oc.env:HF_TOKEN}`` and its kind: what they bring in would be written into the run's
    config.yaml and report.
    """
    todo = [_plain(source, name)]
    while todo:
        value = todo.pop()
        if isinstance(value, dict | list):
            todo += [*value, *value.values()] if isinstance(value, dict) else value
        elif isinstance(value, str) and _RESOLVER.search(value):
            raise ConfigError(f"{name}: {value!r}: settings don't read the environment; give the value itself")


_RESOLVER = re.compile(r"\$\{[^}]*:")


def load_config(
    path: str | Path | Sequence[str | Path | Recipe] | None = None, overrides: list[str] | None = None
) -> Config:
    """Resolve defaults, YAML files and recipes (later ones on top) and ``key=value`` overrides into a validated
    :class:`Config`.

    Raises:
        ConfigError: unknown key, wrong type, or settings that contradict each other; the message names the key and the
            source.
    """
    sources, environment = _sources(path, overrides)
    merged: Any = OmegaConf.structured(schema_for(environment, Config))
    for name, source in sources:
        try:
            _refuse_resolvers(name, source)
            refuse_moved(name, source)
            # in place: a merge that copies all settings for each source takes most of the time
            merged = OmegaConf.unsafe_merge(_with_method(merged, source), source)
        except (OmegaConfBaseException, ValueError, TypeError, AttributeError, RecursionError) as error:
            key = getattr(error, "full_key", None) or ""
            first_line = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"{name}: {first_line} (key '{key}'); the schema is pact_nemo/config/schema.py"
            ) from error
    try:
        config = OmegaConf.to_object(merged)
    except (
        OmegaConfBaseException,
        ValueError,
        TypeError,
        RecursionError,
    ) as error:  # an interpolation that leads nowhere, or in a circle
        names = ", ".join(name for name, _ in sources)
        raise ConfigError(
            f"{names}: {str(error).splitlines()[0]} (key '{getattr(error, 'full_key', None) or ''}'); give the value"
            " itself"
        ) from error
    if not isinstance(config, Config):
        raise ConfigError(
            f"{', '.join(name for name, _ in sources)}: no configuration, but a {type(config).__name__}; give settings"
            " by section"
        )
    own = method_class(config.method).Config
    config.method_config = own_config("method_config", config.method_config, own, f"method={config.method}")
    if config.trainer.epochs is not None and not any(
        _says(_plain(source, name), "trainer", "steps") for name, source in sources
    ):
        config.trainer.steps = None  # nobody has said a number of steps: the default isn't one to contradict
    if config.objective.constant_length is None:
        config.objective.constant_length = config.rollout.sampling.max_response_tokens
    config = Config(**{entry.name: getattr(config, entry.name) for entry in dataclasses.fields(Config)})
    validate(config)
    make_method(config)  # so that what the method itself refuses is refused here
    return config


def _sources(
    path: str | Path | Sequence[str | Path | Recipe] | None, overrides: list[str] | None
) -> tuple[list[tuple[str, Any]], str]:
    """Files, recipes and words as named sources of settings, and the environment that they name."""
    environment = Config.environment
    sources: list[tuple[str, Any]] = []
    for file in [] if path is None else [path] if isinstance(path, str | Path) else path:
        if isinstance(file, Recipe):
            sources.append(
                (
                    f"recipe {file.name}",
                    OmegaConf.create({**file.settings(), "model": {**file.settings()["model"], "recipe": file.name}}),
                )
            )
            continue
        sources.append((str(file), _read_yaml(Path(file).resolve(), environment)))
        environment = _environment_after(sources, environment)
    # what brings settings of its own comes first, so that the order of words says nothing
    first = ("environment", "method")
    for word in sorted(overrides or [], key=lambda word: word.partition("=")[0] not in first):
        sources.append(_word(word, environment))
        environment = _environment_after(sources, environment)
    return sources, environment


def _word(word: str, environment: str) -> tuple[str, DictConfig]:
    """A ``key=value`` word of the command line as a named source of settings.

    Raises:
        ConfigError: it is none.
    """
    name, said = f"command line '{word}'", word
    word = agent_word(word, environment)
    key, separator, _ = word.partition("=")
    if not separator or key.startswith("-"):
        raise ConfigError(f"command line: {said!r} is not a key=value override, e.g. trainer.steps=50")
    try:
        source = load_word(word, schema_for(environment, Config) if key.startswith(SECTION) else Config)
    except ConfigError:
        raise
    except Exception as error:  # yaml and OmegaConf raise unrelated families; all mean "not a setting"
        raise ConfigError(
            f"command line {said!r}: the value can't be read: {error}; give it as YAML, e.g. trainer.steps=50"
        ) from error
    check_section(name, source, environment)
    return name, source


def _environment_after(sources: list[tuple[str, Any]], environment: str) -> str:
    """The environment after the last source; where that names another one, the sections before it are taken out."""
    named = named_environment(*sources[-1])
    for _, source in sources[:-1]:
        begin_anew(source, environment, named)
    return named or environment


def _says(source: dict[str, Any], section: str, key: str) -> bool:
    """Whether a source of settings has a key, null included."""
    found = source.get(section)
    return isinstance(found, str) or (
        isinstance(found, dict) and key in found
    )  # a text: an interpolation of the whole section


def _method_of(source: Any) -> str | None:
    value = OmegaConf.select(source, "method") if isinstance(source, DictConfig) else None
    return value if isinstance(value, str) else None


def _with_method(merged: Any, source: Any) -> Any:
    """``merged``, and where ``source`` changes the method: with this method's defaults in place of the other one's, and
    without the other one's own settings.

    A method's defaults so lie below the source that names it and above the sources before it."""
    method = _method_of(source)
    if method is None or method == merged.method:
        return merged
    plain, before, after = ObjectiveConfig(), method_class(merged.method).defaults, method_class(method).defaults
    names = sorted({name for known in METHODS for name in method_class(known).defaults} | {*before, *after})
    unknown = [name for name in after if not hasattr(plain, name)]
    if unknown:
        raise ConfigError(f"method={method}: its defaults name {', '.join(unknown)}, which objective doesn't have")
    merged = OmegaConf.merge(merged, {"objective": {name: after.get(name, getattr(plain, name)) for name in names}})
    merged.method_config = {}
    return merged
