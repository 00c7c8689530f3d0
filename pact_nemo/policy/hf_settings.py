"""One setting of a Hugging Face ``config.json``: which values the policy computes, and how a refusal says so."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from pact_nemo.errors import ConfigError

REMEDY = "use another model, or a folder with a supported value (docs/reference/models.md lists them)"
Check = Callable[[Any], str | None]  # of a resolved value: what is wrong with it, or None


def whole(value: Any) -> str | None:
    """A size or a count."""
    return (
        None
        if isinstance(value, int) and not isinstance(value, bool) and value >= 1
        else "a whole number of at least 1 is needed"
    )


def flag(value: Any) -> str | None:
    """True or false."""
    return None if isinstance(value, bool) else "true or false is needed"


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def positive(value: Any) -> str | None:
    """A finite number above 0."""
    return None if _number(value) and value > 0 else "a positive number is needed"


def window_size(value: Any) -> str | None:
    """A size, or null."""
    return None if value is None else whole(value)


@dataclass(frozen=True)
class Setting:
    """How the policy treats one key of a configuration class.

    Attributes:
        kind: ``computed``, ``harmless`` or ``only``.
        check: of a computed key: what is wrong with its value.
        values: of an ``only`` key: what is accepted.
        note: what a refused value would need.
    """

    kind: str
    check: Check | None = None
    values: tuple[Any, ...] = ()
    note: str = ""

    def problem(self, value: Any) -> str | None:
        """Why the policy does not compute this value; None if it does."""
        if self.kind == "computed":
            return self.check(value) if self.check is not None else None
        if self.kind == "only" and not among(value, self.values):
            accepted = " or ".join(json.dumps(known) for known in self.values)
            return f"only {accepted} is computed" + (f"; {self.note}" if self.note else "")
        return None


def among(value: Any, values: tuple[Any, ...]) -> bool:
    """Equality in which 0 is not False and 1 is not True."""
    return any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in values)


def computed(check: Check | None = None) -> Setting:
    """A key of which every value is honoured that passes ``check``."""
    return Setting("computed", check)


def only(*values: Any, note: str = "") -> Setting:
    """A key of which these values alone are computed."""
    return Setting("only", values=values, note=note)


HARMLESS = Setting("harmless")


def refusal(where: str, key: str, value: Any, problem: str) -> ConfigError:
    """The error for one setting of the file ``where``."""
    return ConfigError(f"{where}: {key}={show(value)}: {problem}; {REMEDY}")


def show(value: Any) -> str:
    """A value as JSON, cut to 120 characters."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 120 else f"{text[:117]}..."


def name_layers(indices: Iterable[Any]) -> str:
    """ "layer 0" or "layers 1-3, 7", numbered as in Hugging Face names."""
    runs: list[list[Any]] = []
    for index in indices:
        if runs and isinstance(index, int) and runs[-1][1] == index - 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"layer {text}" if len(runs) == 1 and runs[0][0] == runs[0][1] else f"layers {text}"
