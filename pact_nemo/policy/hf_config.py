"""``config.json`` as transformers understands it: read, told apart by family, and resolved with every default.

Keys that transformers would take without a word, although the model may compute something else with them, are refused
here.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pact_nemo.errors import ConfigError
from pact_nemo.policy.families import FAMILIES, Family, harmless_keys, neutral_values
from pact_nemo.policy.hf_settings import REMEDY, among, refusal, show, whole
from pact_nemo.policy.other_formats import how_to_convert
from pact_nemo.runtime import strict_json


def read_config(source: Mapping[str, Any] | str | Path) -> tuple[dict[str, Any], str]:
    """(contents, name of the file for messages) of a model folder, its ``config.json``, or contents alone.

    Raises:
        ConfigError: there is no such file, or it holds no JSON object.
    """
    if isinstance(source, Mapping):
        return dict(source), "config.json"
    path = Path(source)
    path = path / "config.json" if path.name != "config.json" else path
    if not path.is_file():
        what = how_to_convert(path.parent) or "policy weights must be a local Hugging Face folder"
        raise ConfigError(f"{path.parent} holds no config.json; {what}")
    try:
        text = path.read_text(encoding="utf-8")
        if text.startswith("\ufeff"):  # read here, and refused by transformers and by servers
            raise ValueError("it begins with a byte-order mark; save it without one")
        raw = strict_json.loads(text)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: not a readable Hugging Face decoder config ({type(error).__name__}: {error})"
        ) from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: not a readable Hugging Face decoder config (a JSON object is needed)")
    return raw, str(path)


def unsupported(where: str, key: str, value: Any) -> ConfigError:
    """The error for an architecture that is not in the table."""
    known = ", ".join(f"{family.architecture} ({family.model_type})" for family in FAMILIES.values())
    return ConfigError(
        f"{where}: {key}={show(value)}: the policy does not compute this architecture; supported are {known}; use one"
        " of them"
    )


def family_of(raw: dict[str, Any], where: str) -> Family:
    """The row of the table that ``architectures`` and ``model_type`` name.

    Raises:
        ConfigError: there is none, or the two contradict each other.
    """
    names = raw.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str) or names[0] not in FAMILIES:
        raise unsupported(where, "architectures", names)
    family = FAMILIES[names[0]]
    if raw.get("model_type") != family.model_type:
        raise ConfigError(
            f"{where}: model_type={show(raw.get('model_type'))}: {family.architecture} has {family.model_type!r};"
            f" {REMEDY}"
        )
    return family


def resolve(family: Family, raw: dict[str, Any], where: str) -> Any:
    """Transformers' configuration object of ``raw``, after the keys were checked that it would take without a word.

    Raises:
        ConfigError: a key that the family lacks, or one that transformers refuses.
    """
    if "auto_map" in raw:
        raise ConfigError(
            f"{where}: auto_map={show(raw['auto_map'])}: the folder brings its own model code, which is not run; "
            f"if it computes what {family.architecture} computes, remove auto_map, else use another model"
        )
    if "num_local_experts" in raw and raw.get("num_experts", raw["num_local_experts"]) != raw["num_local_experts"]:
        raise ConfigError(
            f"{where}: num_experts={show(raw['num_experts'])} contradicts"
            f" num_local_experts={show(raw['num_local_experts'])}"
        )
    declared = set(family.settings) | set(getattr(family.config_class, "attribute_map", {}).values())
    harmless = harmless_keys()
    for key, value in raw.items():
        if key in declared or key in harmless or value is None or among(value, neutral_values(family, key)):
            continue
        raise ConfigError(
            f"{where}: {key}={show(value)}: {family.config_name} has no such setting, and it may change what the model"
            f" computes; if {family.architecture} computes the model without it, remove the key, else use another model"
        )
    # a copy, because transformers completes rope parameters in place
    values = {
        key: copy.deepcopy(value) for key, value in raw.items() if key not in ("model_type", "quantization_config")
    }
    for key in ("num_attention_heads", "hidden_size", "num_hidden_layers"):
        if key in values and (problem := whole(values[key])):
            raise refusal(where, key, values[key], problem)
    heads, hidden = values.get("num_attention_heads"), values.get("hidden_size")
    if family.model_type == "llama" and heads and hidden and hidden % heads:
        raise refusal(where, "hidden_size", hidden, f"it is no multiple of num_attention_heads={heads}")
    try:
        with silent():
            return family.config_class.from_dict(values)
    except Exception as error:  # its validation raises types of several packages
        text = " ".join(str(error).split())
        said = _named_by(text, values)
        named = "" if said is None else f"{said}={show(values[said])}: "
        raise ConfigError(
            f"{where}: {named}transformers refuses this {family.config_name}: {text}; {REMEDY}"
        ) from error


def _named_by(text: str, values: Mapping[str, Any]) -> str | None:
    """The key that an error of transformers is about: its name stands there, that of its other spelling, or its
    value.
    """
    longest = sorted(values, key=len, reverse=True)
    if "rope_parameters" in text and values.get("rope_scaling"):
        return "rope_scaling"
    said = next((name for name in longest if name in text), None)
    return said or next(
        (name for name in longest if isinstance(values[name], str) and values[name] and values[name] in text), None
    )


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Without transformers' remarks on configurations: what matters of them is refused here."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
