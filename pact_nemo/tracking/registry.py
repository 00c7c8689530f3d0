"""From a name in ``tracking.trackers`` to a tracker: a module of this package, or anyone's
``module:Class`` or ``path/to/file.py:Class``."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pact_nemo.tracking
from pact_nemo.config.own import own_config
from pact_nemo.errors import ConfigError
from pact_nemo.runtime.plugins import check_overrides, load_plugin
from pact_nemo.tracking.base import ResumePoint, RunFacts, Tracker, Trackers, flat_score
from pact_nemo.tracking.jsonl import MetricsLog

KEY = "tracking.trackers"


def built_in() -> dict[str, type[Tracker]]:
    """The trackers of this package, by name: its modules that have a ``TRACKER``."""
    modules = {
        found.name: importlib.import_module(f"pact_nemo.tracking.{found.name}")
        for found in pkgutil.iter_modules(pact_nemo.tracking.__path__)
    }
    return {name: module.TRACKER for name, module in modules.items() if hasattr(module, "TRACKER")}


def _built_in(name: str) -> type[Tracker]:
    if name.isidentifier() and importlib.util.find_spec(f"pact_nemo.tracking.{name}") is not None:
        found = getattr(importlib.import_module(f"pact_nemo.tracking.{name}"), "TRACKER", None)
        if found is not None:
            return found
    always = "metrics.jsonl is always written and needs no entry; " if name == "jsonl" else ""
    raise ConfigError(
        f"{KEY}.{name}: no such tracker; {always}there are {', '.join(sorted(built_in()))}, and your own as"
        " 'module:Class' or 'path/to/file.py:Class'"
    )


def _outside(name: str) -> type[Tracker]:
    found = load_plugin(KEY, name, {})
    if not (isinstance(found, type) and issubclass(found, Tracker)):
        raise ConfigError(
            f"{KEY}: '{name}' is no subclass of pact_nemo.tracking.base.Tracker; docs/extend/logger.md has an example"
        )
    check_overrides(KEY, name, found, Tracker)
    missing = [method for method in ("open", "log") if getattr(found, method) is getattr(Tracker, method)]
    if missing:
        raise ConfigError(f"{KEY}: '{name}' has no {' and no '.join(missing)}; docs/extend/logger.md has an example")
    return found


def _settings(name: str, tracker: type[Tracker], given: Mapping[str, Any]) -> Any:
    return own_config(f"{KEY}.{name}", dict(given), tracker.Settings, name)


def check_settings(trackers: Mapping[str, Any]) -> None:
    """Check the ``tracking.trackers`` mapping as far as that imports no code from outside.

    Raises:
        ConfigError: an unknown name, or a setting that its tracker doesn't have or can't take.
    """
    for name, given in trackers.items():
        if given is not None and not isinstance(given, Mapping):
            raise ConfigError(
                f"{KEY}.{name}={given!r}: give its settings, {{}} for the defaults, or null to leave it out"
            )
        if ":" not in str(name):
            _settings(name, _built_in(str(name)), given or {})


def chosen(trackers: Mapping[str, Any]) -> dict[str, tuple[type[Tracker], Any]]:
    """Class and settings of each tracker that is not null; imports those from outside. Raises ConfigError."""
    classes = {
        name: _outside(name) if ":" in name else _built_in(name)
        for name, given in trackers.items()
        if given is not None
    }
    return {name: (found, _settings(name, found, trackers[name])) for name, found in classes.items()}


def check_trackers(trackers: Mapping[str, Any]) -> None:
    """Refuse a tracker that can't work on this machine, before anything is started. On one rank only.

    Raises:
        ConfigError: its code, package or key is missing; the message has the remedy.
    """
    for found, settings in chosen(trackers).values():
        found.check(settings)


def open_trackers(
    folder: Path,
    config: dict[str, Any],
    *,
    resume_from: tuple[int, int] | None,
    scores: Mapping[str, Mapping[str, Any]],
    say: Callable[[str], None],
) -> Trackers:
    """The recorder of one run, to be entered; rank 0 only.

    Args:
        folder: run folder.
        config: the resolved settings, nested.
        resume_from: see :class:`pact_nemo.tracking.jsonl.MetricsLog`.
        scores: evaluations that the run has already, each a ``Score.to_dict()``.
        say: puts a line into the terminal and ``run.log``.

    Raises:
        ConfigError: see :func:`check_trackers`.
        DataError: ``metrics.jsonl`` of a resumed run is malformed.
    """
    trackers = {name: found(settings) for name, (found, settings) in chosen(config["tracking"]["trackers"]).items()}
    journal = MetricsLog(folder, resume_from=resume_from)
    resume = None
    if resume_from is not None:
        flat = {name: flat_score(name, score) for name, score in scores.items()}
        resume = ResumePoint(*resume_from, records=journal.kept, scores=flat)
    return Trackers(journal, trackers, RunFacts(folder.name, folder, config, resume, say))
