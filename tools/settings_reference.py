#!/usr/bin/env python
"""Write docs/reference/settings.md from the configuration classes.

    python tools/settings_reference.py             # write the page
    python tools/settings_reference.py --check     # exit code 1 where the page is not what the classes say

What a setting means is read where it stands in the code: the ``#:`` comment behind a field or on the lines above it, or
its entry under ``Attributes:`` in the docstring of its class.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import inspect
import re
import sys
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pact_nemo import checkout

checkout.enter(__file__)

from pact_nemo.config.ranges import RANGES, Ranges, range_of
from pact_nemo.config.schema import Config
from pact_nemo.environments.registry import ENVIRONMENTS, environment_spec
from pact_nemo.methods.registry import METHODS, method_class
from pact_nemo.tracking.base import Tracker
from tools.check_markdown import wrapped

ROOT = checkout.ROOT

PAGE = ROOT / "docs" / "reference" / "settings.md"
#: end of a setting's name, and the unit that it says
UNITS = (
    (r"_s$|^seconds$", "seconds"),
    (r"_gib$", "GiB"),
    (r"_mb$", "MB"),
    (r"_tokens$|_model_len$", "tokens"),
    (r"_chars$", "characters"),
    (r"(^|_)steps$|_every$|^horizon$", "steps"),
    (r"^epochs$", "epochs"),
)


@dataclass(frozen=True)
class Setting:
    key: str  #: dotted, as on the command line
    type: str
    default: str
    meaning: str
    readers: tuple[str, ...]  #: modules that read it
    range: str  #: what a number may be

    @property
    def unit(self) -> str:
        name = self.key.rpartition(".")[2]
        return next((unit for pattern, unit in UNITS if re.search(pattern, name)), "")


def meanings(cls: type) -> dict[str, str]:
    """What each field of a configuration class means, by its comments and docstring and those of its parents."""
    found: dict[str, str] = {}
    for parent in reversed([parent for parent in cls.__mro__ if dataclasses.is_dataclass(parent)]):
        found |= _own_meanings(parent)
    return found


def _own_meanings(cls: type) -> dict[str, str]:
    lines = textwrap.dedent(inspect.getsource(cls)).splitlines()
    node = ast.parse("\n".join(lines)).body[0]
    assert isinstance(node, ast.ClassDef)
    found = _attributes(inspect.getdoc(cls) or "")
    for entry in node.body:
        if not (isinstance(entry, ast.AnnAssign) and isinstance(entry.target, ast.Name)):
            continue
        assert entry.end_lineno is not None
        words: list[str] = []
        above = entry.lineno - 2
        while lines[above].strip().startswith("#:"):
            words.insert(0, lines[above].strip()[2:].strip())
            above -= 1
        for line in lines[entry.end_lineno - 1 :][:2]:  # a formatter may put the closing bracket on a line of its own
            behind = re.search(r"#: ?(.*)$", line)
            if behind and not line.strip().startswith("#:"):
                words.append(behind.group(1).strip())
                break
            if entry.end_lineno == entry.lineno:
                break
        if words:
            found[entry.target.id] = " ".join(words)
    return found


def _attributes(doc: str) -> dict[str, str]:
    """Entries of a docstring's ``Attributes:``."""
    _, _, part = doc.partition("Attributes:\n")
    found: dict[str, str] = {}
    name = None
    for line in part.splitlines():
        entry = re.match(r"^ {4}(\w+): (.*)$", line)
        if entry:
            name, found[entry.group(1)] = entry.group(1), entry.group(2)
        elif name and line.startswith("     "):
            found[name] += f" {line.strip()}"
        else:
            name = None
    return found


def settings(cls: type = Config, prefix: str = "", ranges: Ranges = RANGES, below: str = "") -> Iterator[Setting]:
    """Every setting below a configuration class, nested classes walked through.

    Args:
        prefix: of its keys on the command line.
        ranges: of its numbers, by keys that begin with ``below``.
    """
    hints, said = typing.get_type_hints(cls), meanings(cls)
    section = prefix.rstrip(".").rpartition(".")[2]
    nested = [field for field in dataclasses.fields(cls) if dataclasses.is_dataclass(hints[field.name])]
    for field in dataclasses.fields(cls):
        if field not in nested:
            key, kind = f"{prefix}{field.name}", _type(hints[field.name])
            read_by, allowed = readers(section, cls, field.name), range_of(f"{below}{field.name}", ranges)
            yield Setting(key, kind, _default(field), said.get(field.name, ""), read_by, allowed or "")
    for field in nested:
        inner = typing.cast(type, hints[field.name])
        yield from settings(inner, f"{prefix}{field.name}.", ranges, f"{below}{field.name}.")


def own() -> Iterator[tuple[str, str, type]]:
    """(title, section, class) of the settings that single environments, methods and trackers have."""
    for name in ENVIRONMENTS:
        yield f"environment_config, environment={name}", "environment_config", environment_spec(name).config
    for name in METHODS:
        yield f"method_config, method={name}", "method_config", method_class(name).Config
    for path in sorted((ROOT / "pact_nemo" / "tracking").glob("*.py")):
        module = importlib.import_module(f"pact_nemo.tracking.{path.stem}")
        for found in vars(module).values():
            if isinstance(found, type) and issubclass(found, Tracker) and found.__module__ == module.__name__:
                if found is not Tracker:
                    yield f"tracking.trackers.{path.stem}", f"tracking.trackers.{path.stem}", found.Settings


def _type(hint: Any) -> str:
    if hint is type(None):
        return "null"
    if typing.get_origin(hint) in (list, dict):
        inside = ", ".join(_type(part) for part in typing.get_args(hint))
        return f"{typing.get_origin(hint).__name__}[{inside}]"
    if typing.get_args(hint):
        return " | ".join(_type(part) for part in typing.get_args(hint))
    return {"Any": "any"}.get(getattr(hint, "__name__", str(hint)), getattr(hint, "__name__", str(hint)))


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "(to be given)"
    if dataclasses.is_dataclass(value):
        return "(below)"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(str, value)) + "]"
    return str(value)


@dataclass(frozen=True)
class Module:
    """What a module says of names: read once, asked for every setting."""

    path: str
    reads: frozenset[tuple[str, str]]  #: (last name of what stands before the dot, attribute)
    annotated: tuple[tuple[str, str], ...]  #: (name, its annotation)
    aliases: tuple[tuple[str, str], ...]  #: (name, attribute that was assigned to it)
    classes: frozenset[str]

    def names(self, section: str, kind: str) -> set[str]:
        """What a section of the configuration is called in it."""
        names = {section} | {name for name, attribute in self.aliases if attribute == section}
        names |= {name for name, annotation in self.annotated if re.search(rf"\b{kind}\b", annotation)}
        return names | ({"self"} if kind in self.classes else set())


@lru_cache
def modules() -> tuple[Module, ...]:
    """The package's modules but those that define and check settings."""
    package = ROOT / "pact_nemo"
    paths = [path for path in sorted(package.rglob("*.py")) if path.parent != package / "config"]
    return tuple(_module(path.relative_to(package).as_posix(), path.read_text(encoding="utf-8")) for path in paths)


def _module(path: str, text: str) -> Module:
    reads: set[tuple[str, str]] = set()
    annotated: list[tuple[str, str]] = []
    aliases: list[tuple[str, str]] = []
    classes: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute):
            reads.add((_last(node.value), node.attr))
        elif isinstance(node, ast.arg) and node.annotation is not None:
            annotated.append((node.arg, ast.unparse(node.annotation)))
        elif isinstance(node, ast.AnnAssign):
            annotated.append((_last(node.target), ast.unparse(node.annotation)))
        elif isinstance(node, ast.Assign):
            for target, value in _pairs(node.targets[0], node.value):
                if isinstance(value, ast.Attribute):
                    aliases.append((_last(target), value.attr))
        elif isinstance(node, ast.ClassDef):
            classes.add(node.name)
    return Module(path, frozenset(reads), tuple(annotated), tuple(aliases), frozenset(classes))


def _last(node: ast.expr) -> str:
    """``c`` of ``a.b.c``; nothing of a call or an index."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _pairs(target: ast.expr, value: ast.expr) -> list[tuple[ast.expr, ast.expr]]:
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        return list(zip(target.elts, value.elts, strict=False))
    return [(target, value)]


def readers(section: str, cls: type, name: str) -> tuple[str, ...]:
    """Modules that read a setting of a section."""
    return tuple(
        module.path
        for module in modules()
        if any((known, name) in module.reads for known in module.names(section, cls.__name__))
    )


def cell(text: str) -> str:
    return text.replace("``", "`").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def page() -> str:
    """The whole page."""
    out = [
        "# Settings",
        "",
        "This page is generated from the configuration classes. Don't edit it. Write it anew with",
        "",
        "    python tools/settings_reference.py",
        "",
        "Numbers outside the range are refused. `any` says that every number is right.",
        "Every setting is given as `key=value` on the command line, or in a YAML file. `null` is no value.",
        "A name that does not exist is refused, with the names that do.",
        "With `environment=own` the section `environment_config` may be written `agent`.",
        "",
        "Later sources win:",
        "",
        "1. the defaults of this page",
        "2. the files that a YAML file names under `defaults:`",
        "3. the YAML file itself",
        "4. words of the command line",
        "",
        "Modules are below `pact_nemo/`. A dash stands where a section is read as a whole.",
        "",
    ]
    sections: dict[str, tuple[type, list[Setting]]] = {}
    for row in settings():
        name = row.key.rpartition(".")[0]
        sections.setdefault(name or "The top level", (section_class(name), []))[1].append(row)
    for title, prefix, cls in own():
        if rows := list(settings(cls, f"{prefix}.", getattr(cls, "ranges", {}))):
            sections[title] = (cls, rows)
    for title, (cls, rows) in sections.items():
        out += [f"## {title}", ""]
        if doc := " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split()).replace("``", "`"):
            out += [*textwrap.wrap(doc, 100), ""]
        out += ["| setting | type | default | range | unit | meaning | read by |", "|---|---|---|---|---|---|---|"]
        for row in rows:
            modules = ", ".join(f"`{path}`" for path in row.readers) or "–"
            default = f"`{row.default}`".replace("|", "\\|") if row.default else "(empty)"
            words = [f"`{row.key}`", cell(row.type), default, row.range, row.unit, cell(row.meaning), modules]
            out.append(f"| {' | '.join(words)} |")
        out.append("")
    return wrapped("\n".join(out).rstrip() + "\n")


def section_class(key: str) -> Any:
    """The class of a section of the configuration."""
    cls: Any = Config
    for name in key.split(".") if key else []:
        cls = typing.get_type_hints(cls)[name]
    return cls


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; say whether the page is fresh")
    options = parser.parse_args()
    text = page()
    if options.check:
        fresh = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text
        print(f"{PAGE}: {'fresh' if fresh else 'not what the classes say; run python tools/settings_reference.py'}")
        return 0 if fresh else 1
    PAGE.write_text(text, encoding="utf-8")
    print(f"{PAGE}: {len(re.findall('(?m)^. `', text))} settings")
    return 0


if __name__ == "__main__":
    sys.exit(main())
