"""Settings read from YAML and from command-line words: what a field of text gets is the text that stands there.

YAML gives each plain word a type of its own before anybody asks for the field: ``2024_01`` is the number 202401, ``no``
is False, ``1e3`` is 1000.0, and ``12:30`` is 750. Here the schema's type of the field decides first.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf._yaml import (
    get_yaml_loader,
)  # OmegaConf's own: no duplicate keys, no timestamps, floats as JSON has them, a limit on aliases

from pact_nemo.errors import ConfigError

_STRING, _NULL = "tag:yaml.org,2002:str", "tag:yaml.org,2002:null"
_NULLS = ("null", "Null", "NULL", "~")
_OCTAL_OR_SEXAGESIMAL = re.compile(
    r"[-+]?(0[0-9_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)"
)  # YAML 1.1's, which nobody means


def load_yaml(path: Path, schema: type) -> DictConfig | ListConfig:
    """A YAML file of settings; values of text fields of the dataclass ``schema`` stay as they are written.

    Raises:
        ConfigError: a text field holds something else than a text.
        yaml.YAMLError, OSError, ValueError, RecursionError: it can't be read.
    """
    value = _construct(path.read_text(encoding="utf-8"), schema, str(path))
    if value is not None and not isinstance(value, list | dict | str):
        raise ValueError(f"expected a mapping at the top level, found {type(value).__name__}")
    return OmegaConf.create(value if value is not None else {})


def load_word(word: str, schema: type) -> DictConfig:
    """One ``key=value`` word of a command line. The value of a text field is what is typed, without outer quotes; other
    values are YAML.

    ``null``, ``~`` and nothing at all clear a field that may be None.

    Raises:
        ConfigError: a text field gets something else than a text.
        yaml.YAMLError, ValueError: a value of another field can't be read.
    """
    key, _, text = word.partition("=")
    kind = _field(schema, [part for part in re.split(r"[.\[\]]", key) if part])
    config = OmegaConf.create({})
    OmegaConf.update(
        config, key, _text_word(text, kind) if _is_text(kind) else _construct(text, kind, f"command line {word!r}")
    )
    return config


def _text_word(text: str, kind: Any) -> str | None:
    if not text.strip() or (type(None) in typing.get_args(kind) and text.strip() in _NULLS):
        return None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:  # a colon, a bracket: fine in a text
        return text
    return str(node.value) if isinstance(node, yaml.ScalarNode) and node.style in ("'", '"') else text


def _construct(text: str, kind: Any, where: str) -> Any:
    class Loader(get_yaml_loader()):  # type: ignore[misc]
        def construct_document(self, node: yaml.Node) -> Any:
            return super().construct_document(_as_written(node, kind, where, "", {}))

    loader = Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _placeholder(node: yaml.Node) -> yaml.Node | None:
    """``{word}``, which YAML takes for an object with a key without a value, as the text that it looks like."""
    if not isinstance(node, yaml.MappingNode) or not node.flow_style or len(node.value) != 1:
        return None
    key, value = node.value[0]
    bare = isinstance(key, yaml.ScalarNode) and isinstance(value, yaml.ScalarNode) and value.tag == _NULL
    if not bare or value.value:
        return None
    return yaml.ScalarNode(_STRING, f"{{{key.value}}}", node.start_mark, node.end_mark)


def _as_written(node: yaml.Node, kind: Any, where: str, key: str, known: dict[tuple[int, str], yaml.Node]) -> yaml.Node:
    """The node with plain words tagged as texts where the schema has a text. Nodes that aliases share are rebuilt once
    for each type.
    """
    place = (id(node), repr(kind))
    if place in known:
        return known[place]
    found = node
    if _is_text(kind):
        node = _placeholder(node) or node
        if not isinstance(node, yaml.ScalarNode):
            line = node.start_mark.line + 1 if node.start_mark is not None else 1
            raise ConfigError(f"{where}: {key} (line {line}) is a text; put its value into quotes")
        if node.tag != _NULL:
            found = yaml.ScalarNode(_STRING, node.value, node.start_mark, node.end_mark, node.style)
    elif _is_number(kind):
        if (
            isinstance(node, yaml.ScalarNode)
            and not (node.style or "").strip()
            and _OCTAL_OR_SEXAGESIMAL.fullmatch(node.value)
        ):
            found = yaml.ScalarNode(_STRING, node.value, node.start_mark, node.end_mark, node.style)
    elif isinstance(node, yaml.MappingNode):
        pairs = [
            (name, _as_written(value, _of_key(kind, name), where, f"{key}.{name.value}".lstrip("."), known))
            for name, value in node.value
        ]
        found = yaml.MappingNode(node.tag, pairs, node.start_mark, node.end_mark, node.flow_style)
    elif isinstance(node, yaml.SequenceNode):
        item = (
            kind if dataclasses.is_dataclass(kind) else next(iter(typing.get_args(_without_none(kind))), Any)
        )  # `<<: [*a, *b]`
        items = [_as_written(value, item, where, f"{key}[{i}]", known) for i, value in enumerate(node.value)]
        found = yaml.SequenceNode(node.tag, items, node.start_mark, node.end_mark, node.flow_style)
    known[place] = found
    return found


def _of_key(kind: Any, name: yaml.Node) -> Any:
    """Type of a mapping's value: of the dataclass's field, or of all values of a dict."""
    kind = _without_none(kind)
    if name.tag == "tag:yaml.org,2002:merge":
        return kind
    if dataclasses.is_dataclass(kind):
        return _hints(typing.cast(Any, kind)).get(
            name.value, list[str] if name.value == "defaults" else Any
        )  # parents' names; a field of no section
    arguments = typing.get_args(kind)
    return arguments[1] if typing.get_origin(kind) is dict and len(arguments) == 2 else Any


def _field(kind: Any, names: list[str]) -> Any:
    for name in names:
        kind = _without_none(kind)
        kind = _hints(typing.cast(Any, kind)).get(name, Any) if dataclasses.is_dataclass(kind) else Any
    return kind


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _without_none(kind: Any) -> Any:
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        others = [item for item in typing.get_args(kind) if item is not type(None)]
        return others[0] if len(others) == 1 else Any
    return kind


def _is_text(kind: Any) -> bool:
    return _without_none(kind) is str


def _is_number(kind: Any) -> bool:
    return _without_none(kind) in (int, float)
