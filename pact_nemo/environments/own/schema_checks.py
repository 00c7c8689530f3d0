"""Arguments of a call against a tool's JSON schema, by jsonschema."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

log = logging.getLogger(__name__)

_FAULT_CHARS = 500


@dataclass(frozen=True)
class ArgumentError:
    """What is wrong with arguments.

    Attributes:
        place: in them, such as ``.day`` or ``.days[1]``; empty for the whole.
        text: why.
    """

    place: str
    text: str


def validator_of(parameters: dict[str, Any], what: str) -> Any:
    """A validator of arguments; None where the schema is none, so that the tool itself has to judge.

    Args:
        what: the tool, for the log.
    """
    import jsonschema
    from jsonschema_specifications import REGISTRY

    kind = jsonschema.validators.validator_for(parameters, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(parameters)
    except jsonschema.SchemaError as error:
        log.warning("%s: no valid JSON schema: %s", what, str(error.message)[:_FAULT_CHARS])
        return None
    return kind(parameters, registry=REGISTRY)  # given, so that nothing is ever fetched from the network


def argument_error(validator: Any, arguments: Mapping[str, Any], what: str) -> ArgumentError | None:
    """The worst fault of arguments; None where there is none, or no validator."""
    from jsonschema.exceptions import best_match

    if validator is None:
        return None
    try:
        worst = best_match(validator.iter_errors(dict(arguments)))
    except Exception as odd:  # e.g. a reference that leads nowhere: the tool has to judge then
        log.debug("the schema of %s can't be checked against: %r", what, odd)
        return None
    if worst is None:
        return None
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in worst.absolute_path)
    return ArgumentError(place, str(worst.message)[:_FAULT_CHARS])
