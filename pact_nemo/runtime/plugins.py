"""What users bring along, by reference: a name of a table, ``module:attribute`` or ``path/to/file.py:attribute``."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pact_nemo.errors import ConfigError


def load_plugin(key: str, reference: str, known: Mapping[str, str]) -> Any:
    """The object that a setting refers to.

    Args:
        key: the setting, for messages.
        reference: a name of ``known``, or a reference to something from outside.
        known: name -> reference.

    Raises:
        ConfigError: there is none, or it can't be imported; names key, reference and remedy.
    """
    target = known.get(reference, reference)
    place, colon, attribute = target.rpartition(":")
    if not colon or not place or not attribute.isidentifier():
        raise ConfigError(
            f"{key}={reference!r}: must be one of {', '.join(known)}, or module:name or path/to/file.py:name of your"
            " own"
        )
    module = load_module(key, reference, place)
    if not hasattr(module, attribute):
        mine = {name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
        there = sorted(name for name in mine if name[0] != "_")
        raise ConfigError(f"{key}={reference!r}: {place} has no {attribute}; it has {', '.join(there) or 'nothing'}")
    return getattr(module, attribute)


def load_module(key: str, reference: str, place: str) -> Any:
    """The module of a name or of a file ``path/to/file.py``.

    Args:
        key, reference: the setting and its value, for messages.

    Raises:
        ConfigError: it can't be imported; names the error, its line, and the remedy.
    """
    try:
        return _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except (Exception, SystemExit) as error:  # code of the user's own may raise anything
        remedy = "; is its folder in PYTHONPATH?" if isinstance(error, ImportError) else ""
        if isinstance(error, FileNotFoundError):
            remedy = f"; a relative path starts at the working folder, {Path.cwd()}; start there or give the whole path"
        raise ConfigError(
            f"{key}={reference!r}: {place} can't be imported: {type(error).__name__}: {error}{line_of(error)}{remedy}"
        ) from error


def line_of(error: BaseException) -> str:
    """`` (file:line)`` of the last line of the user's code that an error went through; empty where there is none."""
    if isinstance(error, SyntaxError):
        return ""  # its text names both
    others = ("<", f"{Path(traceback.__file__).parent}/", f"{Path(__file__).parents[1]}/")
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(others)]
    return f" ({lines[-1].filename}:{lines[-1].lineno})" if lines else ""


def check_overrides(key: str, reference: str, found: type, base: type) -> None:
    """Hold a class from outside against the class that it extends.

    Raises:
        ConfigError: a method takes other arguments than the base's, or has a name that is nearly one of the base's.
    """
    known = {name for name in vars(base) if not name.startswith("_")}
    for name, value in vars(found).items():
        if name.startswith("_"):
            continue
        near = get_close_matches(name, known, n=1, cutoff=0.75)
        if name not in known and near and not hasattr(base, name):
            raise ConfigError(
                f"{key}={reference!r}: {found.__name__}.{name} overrides nothing; is {near[0]} meant? (Your own helpers"
                " may begin with an underscore.)"
            )
        wanted = getattr(base, name, None)
        if inspect.isfunction(value) and inspect.isfunction(wanted) and not _takes(value, wanted):
            raise ConfigError(
                f"{key}={reference!r}: {found.__name__}.{name}{inspect.signature(value)} can't be called like "
                f"{base.__name__}.{name}{inspect.signature(wanted)}"
            )


def _takes(given: Any, wanted: Any) -> bool:
    """Whether ``given`` can be called with the arguments of ``wanted``."""
    parameters = list(inspect.signature(wanted).parameters.values())
    positional = [None for each in parameters if each.kind is not each.KEYWORD_ONLY]
    named = {each.name: None for each in parameters if each.kind is each.KEYWORD_ONLY}
    try:
        inspect.signature(given).bind(*positional, **named)
    except TypeError:
        return False
    return True


def short_name(reference: str) -> str:
    """A name for folders and tables: that of the table, or the attribute of something from outside."""
    return reference.rpartition(":")[2]


def _from_file(path: Path) -> Any:
    """The module in a file, imported once under a name of its own, which worker processes find again."""
    file = path.expanduser().resolve(strict=True)
    name = f"{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
